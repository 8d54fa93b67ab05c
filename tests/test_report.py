"""The report: every number is what the files say, nothing is made up, and equal runs give equal pages."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil

import optuna
import pytest

from search.finished import read_run, read_trials
from search.numbers import accuracy_text, amount, duration, wilson
from search.report import dense_cost, predictions, write_report
from search.sensitivity import GroupSensitivity, Sensitivity
from tests.finished_run import GROUPS, TRIALS, Page, at, change


def test_every_number_of_the_page_is_that_of_result_json_or_study_db(finished):
    page, result = Page(finished / "report.html"), json.loads((finished / "result.json").read_text())
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{finished / 'study.db'}")
    trials = {str(trial.number): trial for trial in study.trials}
    shown = set()
    for row, key, value, text in page.numbers:
        if row is None:
            known = at(result, key)
        elif row.startswith("layer"):
            known = result["layers"][int(row.removeprefix("layer"))][key]
        else:
            known = trials[row].user_attrs[key]
        assert float(value) == known, (row, key)
        shown.add((row, key))
        field = key.rpartition(".")[2]
        if "accuracy" in field:
            assert text == accuracy_text(known)
        elif field in ("dense_flops", "best_flops", "dense_ms", "best_ms"):
            assert text == amount(known, "flops" if "flops" in field else "latency")
        elif field in ("flops", "params", "size", "latency_ms"):
            assert text == amount(known, field.removesuffix("_ms"))
        elif field in ("seconds", "evaluation_seconds"):
            assert text == duration(known)
        elif field in ("trials", "failed", "seed"):
            assert text == str(known)
    for model in ("dense", "best", "uniform"):
        for field in ("accuracy", "test_accuracy", "flops", "params", "size", "latency_ms"):
            assert (None, f"{model}.{field}") in shown
    assert {(None, "best.speedup"), (None, "budget.0.achieved"), (None, "budget.0.limit")} <= shown
    best = sorted(study.trials, key=lambda t: (-t.value, t.number))[:10]
    ranked = [row for row, key, *_ in page.numbers if key == "accuracy" and row in trials]
    assert ranked == [str(trial.number) for trial in best]
    layers = {(f"layer{i}", field) for i in range(2) for field in ("dense_flops", "best_flops", "dense_ms", "best_ms")}
    assert layers <= shown


def test_the_figures_show_every_trial_and_every_group(finished):
    page = Page(finished / "report.html")
    layers, rest = ["layer-flops", "layer-ms"], ["best-by-trial", "best-by-minute", "trade-off-flops"]
    assert page.figures() == ["keep-ratios", *layers, *rest]
    images = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(image["role"] == "img" and len(image["aria-label"]) > 40 for image in images)
    for name in ("best-by-trial", "best-by-minute", "trade-off-flops"):
        figure = re.search(rf'<figure id="{name}".*?</figure>', (finished / "report.html").read_text(), re.S)[0]
        cloud = re.findall(r"var\(--trial, #\w+\); stroke: var\(--trial", figure)
        legend = figure.count("a trial")
        assert len(cloud) == TRIALS + legend, name
    for i in range(GROUPS):
        # In the figure and in the table of widths; two are layers too, in both figures, one alternative text, a table.
        assert page.text.count(f"layer{i:02d}") == (5 if i < 2 else 2)


def test_a_metric_of_ones_own_goes_by_its_name(run):
    change(run, "result.json", lambda r: r["search"].update(metric="iou"))
    write_report(run)
    page = Page(run / "report.html")
    assert "50.0 % of the FLOPs and 1.85 times the speed, at iou 0.95 on the unseen split: −0.025 against" in page.text
    assert {(None, "best.accuracy", "0.96", "0.96"), (None, "dense.test_accuracy", "0.975", "0.975")} <= set(
        page.numbers
    )
    for text in ("iou, search split", "iou, unseen split", "Iou against FLOPs", "Highest iou on the search split"):
        assert text in page.text
    assert "accuracy, search" not in page.text
    assert "to 96" not in page.text  # an interval of a share


def test_trials_are_counted_from_one_without_repeats(run):
    trials = read_trials(run / "study.db")
    assert [trial.count for trial in trials] == list(range(1, TRIALS + 1))
    best = max(trials, key=lambda trial: (trial.reward, -trial.number))
    row = re.search(r'<tr data-trial="(\d+)"><td>(\d+)</td>', (run / "report.html").read_text())
    assert row.groups() == (str(best.number), str(best.count))
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{run / 'study.db'}")
    study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={**study.trials[0].user_attrs, "repeat": True}))
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
    study.add_trial(optuna.trial.create_trial(value=0.9, user_attrs=study.trials[0].user_attrs))
    study._storage.remove_session()
    assert [trial.count for trial in read_trials(run / "study.db")][-2:] == [TRIALS, TRIALS + 2]


def test_an_accuracy_has_the_interval_of_its_examples_and_none_where_these_are_unknown(finished, run):
    low, high = wilson(0.95, 360)
    assert f"{100 * low:.2f} to {100 * high:.2f}" in Page(finished / "report.html").text
    change(run, "settings.json", lambda d: d["resolved"].pop("test_examples"))
    write_report(run)
    text = Page(run / "report.html").text
    assert f"{100 * low:.2f}" not in text
    assert "the number of test examples is not recorded" in text


def test_what_was_not_measured_is_left_out_and_said(run):
    def forget(result):
        for model in ("dense", "best", "uniform"):
            result[model].update(latency_ms=None, test_accuracy=None)
        result["best"].update(speedup=None, speedup_ci95=None)

    change(run, "result.json", forget)
    write_report(run)
    page = Page(run / "report.html")
    assert "accuracy on an unseen split; latency; predicted latency" in page.text
    assert not [key for _, key, *_ in page.numbers if "latency" in key or "speedup" in key or "test" in key]
    assert "50.0 % of the FLOPs, at 96.00 % on the search split: −3.00 points against the dense model" in page.text


def test_what_was_measured_later_gets_its_figures(run):
    def measured(result):
        result["proxy"] = {
            "spearman": 0.87,
            "samples": 3,
            "anchors": [{"score": s, "accuracy": s} for s in (0.7, 0.8, 0.9)],
        }
        result["best"]["latency_predicted_ms"] = 0.43

    change(run, "result.json", measured)
    curve = GroupSensitivity(name="layer00", channels=64, widths=(16, 32), accuracy=(None, 0.9))
    Sensitivity(dense=0.98, ratios=(0.25, 0.5), groups=(curve,)).save(run / "sensitivity.json")
    write_report(run)
    page = Page(run / "report.html")
    assert page.figures()[-3:] == ["proxy", "latency", "sensitivity"]
    assert (None, "proxy.spearman", "0.87", "0.870") in page.numbers


@pytest.mark.parametrize(
    ("change_result", "sentence"),
    [
        (lambda r: r["best"].update(source="uniform"), "the uniform policy ended better"),
        (lambda r: r["uniform"].update(widths=r["best"]["widths"]), "it is the uniform policy: the search found none"),
        (lambda r: r["best"].update(speedup=0.9), "0.90 times the speed (slower)"),
        (lambda r: r["budget"][0].update(met=False), ": exceeded"),
        (lambda r: r["budget"][0].update(met=False), "policy at the same budget. It is above the limit of FLOPs."),
        (lambda r: r["budget"][0].update(met=None, achieved=None), ": not measured"),
        (lambda r: r["budget"][0].update(met=None), "Whether it keeps the limit of FLOPs was not measured."),
        (lambda r: r["settings"].update(finetune_epochs=0), "Neither policy was fine-tuned (--finetune-epochs 0)"),
        (lambda r: r["settings"].update(finetune_epochs=3), "fine-tuned the same way, for 3 epochs"),
        (lambda r: r["best"].update(test_accuracy=0.5), "−47.50 points against the dense model; on"),
        (lambda r: r["best"].update(test_accuracy=0.974), "(their 95 % intervals overlap)"),
        (lambda r: r["dense"].update(accuracy=-3.25), "-3.25"),
    ],
)
def test_the_page_says_what_a_reader_must_not_miss(run, change_result, sentence):
    change(run, "result.json", change_result)
    (run / "study.db").unlink()  # its figures take their time
    write_report(run)
    assert sentence in Page(run / "report.html").text


def test_trials_latency_is_a_share_of_what_the_table_says_of_the_dense_model(run):
    """The machine's mood on the day of the table is in the trials' milliseconds, and not in their share."""
    change(run, "result.json", lambda r: r["budget"].append({"cost": "latency", "limit": 1.2, "fraction": 0.6}))
    assert dense_cost(read_run(run).result, "latency") == pytest.approx(2.0)
    assert dense_cost(read_run(run).result, "flops") == 1000000


def test_predictions_name_a_policy_once(run):
    def predicted(result):
        for model in ("best", "uniform"):
            result[model]["latency_predicted_ms"] = 0.4

    change(run, "result.json", predicted)
    assert predictions(read_run(run).result) == {"best": (0.4, 0.4321), "uniform": (0.4, 0.4321)}
    change(run, "result.json", lambda r: r["uniform"].update(widths=r["best"]["widths"]))
    assert predictions(read_run(run).result) == {"best, uniform": (0.4, 0.4321)}


def test_a_front_has_a_section_that_says_how_to_apply_its_policies(run):
    trials = sorted(read_trials(run / "study.db"), key=lambda trial: trial.costs["flops"])
    line = {"policy": "front-1.json", "score": trials[0].accuracy, "flops": trials[0].costs["flops"], "widths": {}}
    change(run, "result.json", lambda r: r.update(front=[line, {**line, "policy": "front-2.json", "flops": 900000}]))
    change(run, "result.json", lambda r: r["settings"].update(pareto=True, exclude=["a"]))
    write_report(run)
    page = Page(run / "report.html")
    rows = [(row, key, float(value)) for row, key, value, _ in page.numbers if row and row.startswith("front")]
    scores = [(f"front{i}", "score", line["score"]) for i in range(2)]
    assert rows == [scores[0], ("front0", "flops", line["flops"]), scores[1], ("front1", "flops", 900000)]
    assert page.figures()[0] == "trade-off-flops", "not hidden behind the others"
    assert page.figures().count("trade-off-flops") == 1
    assert f"amc apply {run}/front-1.json \\\n    --weights {run}/dense.safetensors \\\n    --out slim" in page.text
    assert "--pareto \\\n    --exclude a" in page.text, "a flag has no value"
    assert "gain over uniform" in page.text, "which the trials' rewards are"


def test_a_run_of_an_older_version_lacks_settings(run):
    change(run, "result.json", lambda r: [r["settings"].pop(name) for name in ("latency_providers", "seed")])
    write_report(run)
    assert "--latency-providers" not in Page(run / "report.html").text


def test_equal_runs_give_equal_pages(finished, tmp_path):
    again = shutil.copytree(finished, tmp_path / finished.name)
    write_report(again)
    here, there = (again / "report.html").read_text(), (finished / "report.html").read_text()
    assert here.replace(str(again), "RUN") == there.replace(str(finished), "RUN")


def test_the_commands_are_quoted_and_hold_what_differs_from_the_defaults(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "it's a run")
    other = {"seed": 3, "exclude": ["a b", "c"], "model": "my models/net.py:make", "mean": [0.5]}
    change(run, "result.json", lambda r: r["settings"].update(other))
    (run / "study.db").unlink()
    write_report(run)
    blocks = re.findall(r"<pre[^>]*>(.*?)</pre>", (run / "report.html").read_text(), re.S)
    apply, _, again = (shlex.split(html.unescape(block).replace("\\\n", "")) for block in blocks)
    weights = ["--weights", f"{run}/dense.safetensors", "--out", "slim"]
    model = ["--model", "my models/net.py:make", "--mean", "0.5"]
    assert apply == ["amc", "apply", f"{run}/policy.json", *model, *weights]
    search_words = ["--budget", "flops=0.5", "--strategy", "random", "--trials", str(TRIALS), "--seed", "3"]
    assert again == ["amc", "search", *model, *search_words, "--exclude", "a b", "--exclude", "c"]


def test_a_model_that_was_an_object_is_applied_from_python(run):
    change(run, "result.json", lambda r: r["settings"].update(model="MyNet"))
    (run / "study.db").unlink()
    write_report(run)
    text = Page(run / "report.html").text
    assert f"amc.load_policy('{run}/policy.json')" in text
    assert "search.run(\n    model=...,  # yours\n    data=...,\n    budget=['flops=0.5']," in text
    assert "amc apply" not in text
