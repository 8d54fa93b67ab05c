"""The report: every number is what the files say, nothing is made up, and nothing in a file becomes code."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import subprocess
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import optuna
import pytest

from amc.errors import RunError
from amc.policy import GroupPolicy, InputInfo, ModelInfo, Policy
from search.cli import main
from search.figures import pareto_front
from search.finished import busy_minutes, read_run, read_trials
from search.numbers import accuracy_text, amount, duration, wilson
from search.report import write_report
from search.sensitivity import GroupSensitivity, Sensitivity
from search.settings import settings_from
from search.storage import open_storage
from search.strategies import make_sampler
from search.study import open_study, search
from tests.synthetic import concave

GROUPS, TRIALS = 9, 14


def write_run(path: Path) -> Path:
    """A finished run of a problem without a network: a real study and policy, and figures as a run would write them."""
    path.mkdir(parents=True)
    problem, _ = concave(GROUPS)
    study = open_study(
        open_storage(path / "study.db"), "search", make_sampler("random", problem, trials=TRIALS, seed=0)
    )
    found = search(problem, study, trials=TRIALS, seed=0)
    uniform = problem.named(problem.budget.project(problem.budget.dense))
    chosen = settings_from({"budget": "flops=0.5", "strategy": "random", "trials": TRIALS})
    spent = found.best.costs["flops"]
    figures = {"params": 1234, "size": 45678, "latency_ms": 0.4321, "latency_predicted_ms": None}
    result = {
        "schema_version": 1,
        "settings": chosen.as_json(),
        "budget": [{"cost": "flops", "limit": 500000, "fraction": 0.5, "achieved": spent, "met": True}],
        "dense": {
            "accuracy": 0.99,
            "test_accuracy": 0.975,
            "flops": 1000000,
            "params": 2345,
            "size": 90123,
            "latency_ms": 0.8,
        },
        "best": {
            "source": "search",
            "accuracy": 0.96,
            "test_accuracy": 0.95,
            "flops": spent,
            **figures,
            "speedup": 1.852,
            "speedup_ci95": [1.801, 1.913],
            "widths": dict(found.best.widths),
        },
        "uniform": {
            "source": "uniform",
            "accuracy": 0.94,
            "test_accuracy": 0.93,
            "flops": 499000,
            **figures,
            "widths": uniform,
        },
        "layers": [
            {"name": "layer00", "dense_flops": 600000, "best_flops": 200000, "dense_ms": 0.5, "best_ms": 0.25},
            {
                "name": "layer01",
                "dense_flops": 400000,
                "best_flops": spent - 200000,
                "dense_ms": 0.25,
                "best_ms": 0.125,
            },
            {"name": "[ReorderOutput]", "dense_flops": None, "best_flops": None, "dense_ms": 0.05, "best_ms": 0.05},
        ],
        "proxy": {"spearman": None, "samples": 0},
        "search": {
            "strategy": "random",
            "trials": found.trials,
            "failed": found.failed,
            "seconds": found.seconds,
            "evaluation_seconds": found.evaluation_seconds,
            "seed": 0,
        },
    }
    groups = [
        GroupPolicy(name=g.name, kind="channel", channels=64, width=found.best.widths[g.name], keep_ratio=0.5)
        for g in problem.groups
    ]
    info = ModelInfo(
        name="digits_resnet",
        inputs=[InputInfo(name="x", shape=[1, 1, 8, 8], dtype="float32")],
        structure_sha256="0" * 64,
        weights_sha256="1" * 64,
    )
    Policy(model=info, groups=groups, importance="l1").save(path / "policy.json")
    resolved = {"frozen": [{"name": "fc", "reason": "its outputs are the model's"}], "test_examples": 360}
    document = {"settings": chosen.as_json(), "resolved": resolved, "versions": {"torch": "2.13.0"}, "machine": {}}
    (path / "settings.json").write_text(json.dumps(document))
    (path / "result.json").write_text(json.dumps(result))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path = write_run(tmp_path_factory.mktemp("runs") / "one")
    write_report(path)
    return path


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(finished, tmp_path / "run")


def change(run: Path, name: str, edit) -> None:
    """Rewrites a JSON file of a run."""
    document = json.loads((run / name).read_text())
    edit(document)
    (run / name).write_text(json.dumps(document))


class Page(HTMLParser):
    """The numbers, figures and texts of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.numbers: list[tuple[str | None, str, str, str]] = []  # (trial or run, key, value, text)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._row, self._open = None, None
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "tr":
            self._row = attributes.get("data-trial", attributes.get("data-run"))
            if "data-layer" in attributes:
                self._row = f"layer{attributes['data-layer']}"
        if tag == "data":
            self._open = (self._row, attributes["data-key"], attributes["value"])

    def handle_endtag(self, tag):
        if tag == "tr":
            self._row = None

    def handle_data(self, data):
        self.text += data
        if self._open:
            self.numbers.append((*self._open, data))
            self._open = None

    def figures(self) -> list[str]:
        return [attributes["id"] for tag, attributes in self.tags if tag == "figure"]


def at(document, key: str):
    """`budget.0.limit` of a JSON document."""
    for part in key.split("."):
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


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


def test_wilson_against_the_published_example():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, and none of 20.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


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
        (lambda r: r["best"].update(speedup=0.9), "0.90 times the speed (slower)"),
        (lambda r: r["budget"][0].update(met=False), ": exceeded"),
        (lambda r: r["budget"][0].update(met=None, achieved=None), ": not measured"),
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


def test_equal_runs_give_equal_pages(finished, tmp_path):
    again = shutil.copytree(finished, tmp_path / finished.name)
    write_report(again)
    here, there = (again / "report.html").read_text(), (finished / "report.html").read_text()
    assert here.replace(str(again), "RUN") == there.replace(str(finished), "RUN")


def test_a_report_changes_nothing_else_in_the_directory(run):
    def files():
        return {path.name: path.read_bytes() for path in run.iterdir() if path.name != "report.html"}

    before = files()
    write_report(run)
    assert files() == before


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>{{{ 7*7 }}\ud800\n& "\'$\\frac{}$'


def test_texts_of_a_stranger_stay_texts(run):
    change(run, "result.json", lambda r: r["settings"].update(model=HOSTILE, exclude=[HOSTILE], unknown=HOSTILE))
    change(run, "result.json", lambda r: r["search"].update(strategy=HOSTILE))
    change(run, "settings.json", lambda d: d["resolved"].update(frozen=[{"name": HOSTILE, "reason": HOSTILE}]))
    change(run, "settings.json", lambda d: d.update(versions={HOSTILE: HOSTILE}, machine={"cpu": HOSTILE}))
    renamed = "layer00" + HOSTILE.replace("\ud800", "")
    change(run, "policy.json", lambda d: d["groups"][0].update(name=renamed))
    for model in ("best", "uniform"):
        change(run, "result.json", lambda r, m=model: r[m]["widths"].update({renamed: 7}))
    write_report(run)
    page = Page(run / "report.html")
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "foreignobject"}
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert "alert(1)" in page.text
    assert "{{{ 7*7 }}" in page.text
    assert "default-src 'none'" in (run / "report.html").read_text()


def test_the_page_needs_no_network_and_no_script(finished):
    text = (finished / "report.html").read_text()
    page = Page(finished / "report.html")
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    fetched = [
        v for _, attributes in page.tags for name, v in attributes.items() if name in ("src", "href", "xlink:href")
    ]
    assert all(value.startswith("#") for value in fetched)
    assert "url(http" not in text
    assert "@import" not in text


FILES = ("study.db", "policy.json", "settings.json", "sensitivity.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"no such thing", b'{"settings": [1]}', bytes(range(256)) * 64])
def test_a_broken_file_is_named(run, name, content):
    (run / name).write_bytes(content)
    (note,) = read_run(run).notes
    assert str(run / name) in note


@pytest.mark.parametrize("name", FILES)
def test_without_a_broken_file_the_rest_is_shown(run, name):
    (run / name).write_text("[]")
    write_report(run)
    page = Page(run / "report.html")
    assert f"{run / name} " in page.text
    assert (None, "best.test_accuracy", "0.95", "95.00 %") in page.numbers
    assert ("best-by-trial" in page.figures()) == (name != "study.db")
    assert ("keep-ratios" in page.figures()) == (name != "policy.json")


def test_a_damaged_page_of_the_study_is_an_error_with_a_message(run):
    content = bytearray((run / "study.db").read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    (run / "study.db").write_bytes(content)
    with pytest.raises(RunError, match=r"study\.db can't be read as a study: "):
        read_trials(run / "study.db")


@pytest.mark.parametrize("name", ["study.db", "policy.json", "settings.json"])
def test_a_missing_file_is_named(run, name):
    (run / name).unlink()
    assert read_run(run).notes == (f"{run / name} is missing or not a file",)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.pop("dense"), "`dense`: Field required"),
        (lambda r: r["best"].update(accuracy="high"), "`best.accuracy"),
        (lambda r: r["budget"][0].update(limit=0), "`budget.0.limit"),
        (lambda r: r.update(schema_version=2), "`schema_version`"),
    ],
)
def test_a_result_that_is_not_ours_is_refused(run, edit, message):
    change(run, "result.json", edit)
    with pytest.raises(RunError, match=message):
        write_report(run)


def test_the_verb_refuses_what_is_no_finished_run(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "is no run directory" in capsys.readouterr().err
    (tmp_path / "settings.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert f"`amc search --resume --out {tmp_path}` goes on with it" in capsys.readouterr().err


def test_the_verb_writes_the_page_again(run, capsys):
    (run / "report.html").unlink()
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(run / "report.html"), "left_out": []}
    assert (run / "report.html").is_file()


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


def test_minutes_leave_out_the_time_in_which_nothing_ran():
    def span(start: int, end: int) -> tuple[datetime, datetime]:
        zero = datetime(2030, 1, 1)
        return zero + timedelta(minutes=start), zero + timedelta(minutes=end)

    # Two at once, then a pause of an hour, then two more.
    assert busy_minutes([span(0, 3), span(1, 2), span(62, 63), span(63, 65)]) == [3, 2, 4, 6]


def test_the_front_holds_what_no_other_beats():
    points = [(3, 0.9), (1, 0.5), (2, 0.5), (2, 0.8), (2, 0.7), (4, 0.9), (2, 0.8)]
    assert pareto_front(points) == [1, 3, 6, 0]


def test_runs_are_compared_in_a_table_and_a_page(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    other = shutil.copytree(finished, tmp_path / "a run with a long name [bold]&")
    change(other, "result.json", lambda r: r["best"].update(test_accuracy=0.96, flops=700000, latency_ms=0.4))
    page = tmp_path / "compared.html"
    assert main(["compare", str(finished), str(other), "--out", str(page)]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 100
    assert all(figure in table for figure in ("95.00 %", "96.00 %", " 700 k*", " 0.4*", " 0.4321 "))
    numbers = {(row, key): float(value) for row, key, value, _ in Page(page).numbers}
    for run in (finished, other):
        result = json.loads((run / "result.json").read_text())
        for field in ("test_accuracy", "flops", "params", "size", "latency_ms", "speedup"):
            assert numbers[run.name, f"best.{field}"] == result["best"][field]
    assert Page(page).figures() == [
        *("front-flops", "front-params", "front-size", "front-latency"),
        *("best-by-trial", "best-by-minute"),
    ]
    assert main(["compare", str(finished), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["path"] for run in found["runs"]] == [str(finished), str(other)]
    assert found["front"]["flops"] == [str(finished), str(other)]
    assert found["front"]["latency"] == [str(other)]
    assert found["same_dense"] is True


def test_a_comparison_says_when_the_dense_models_differ(finished, tmp_path, capsys):
    other = shutil.copytree(finished, tmp_path / "other")
    change(other, "policy.json", lambda p: p["model"].update(weights_sha256="2" * 64))
    assert main(["compare", str(finished), str(other), "--out", str(tmp_path / "page.html")]) == 0
    assert "did not start from the same dense model" in capsys.readouterr().out
    assert "did not start from the same dense model" in Page(tmp_path / "page.html").text


def test_a_comparison_writes_over_no_file_of_a_run(finished, capsys):
    assert main(["compare", str(finished), "--out", str(finished / "policy.json")]) == 2
    assert "must end in .html" in capsys.readouterr().err


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
LOOK = """<body style="margin:0"><iframe id=f width={width} height=3000 style="border:0" srcdoc="{page}"></iframe>
<script>
f.onload = () => {{
  const page = f.contentDocument, wide = f.contentWindow.innerWidth;
  const seen = [...page.querySelectorAll("figure svg")].filter(s => s.getBoundingClientRect().height > 100);
  document.title = JSON.stringify({{wide, content: page.documentElement.scrollWidth, figures: seen.length,
    dark: f.contentWindow.getComputedStyle(page.body).backgroundColor}});
}}
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, to look at the page as a reader would")
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_every_figure_within_the_page(finished, tmp_path, width, scheme):
    source = (finished / "report.html").read_text()
    (tmp_path / "look.html").write_text(LOOK.format(width=width, page=html.escape(source)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={max(width, 500)},3000", "--dump-dom"]
    options += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    done = subprocess.run(
        [CHROMIUM, *options, f"file://{tmp_path}/look.html"], capture_output=True, text=True, check=True
    )
    seen = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    assert seen["wide"] == seen["content"] == width
    assert seen["figures"] == len(Page(finished / "report.html").figures())
    assert seen["dark"] == ("rgb(20, 23, 27)" if scheme == "dark" else "rgb(254, 254, 254)")
    assert "CONSOLE" not in done.stderr
