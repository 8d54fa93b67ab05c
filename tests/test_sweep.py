"""A sweep: a run for each budget from one dense model, resumable as a whole, and their comparison at the end."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import search.job
import search.run_sensitivity
import search.start
from amc.errors import BudgetError, Interrupted, UsageError
from search import sweep
from search.cli import main
from search.display import Display
from search.sweep import budgets_of, folder_of
from tests.test_display import OWN

QUICK = ["--trials", "2", "--score-steps", "1", "--finetune-epochs", "0", "--strategy", "random"]
ANCHORED = ["--trials", "7", "--anchor-share", "0.8"]
WORDS = ["--model", "own.py:net", "--data", "own.py:data", "--budget", "params=0.9", *QUICK]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def test_a_sweep_that_is_stopped_goes_on_and_ends_in_the_comparison(folder, monkeypatch, capsys):
    exported, real, started = [], search.start.export_onnx, []

    def counted(*arguments):
        exported.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(search.start, "export_onnx", counted)
    monkeypatch.setattr(search.run_sensitivity, "SHARE", 1.0)
    looked_at, look = [], search.run_sensitivity.sensitivity

    def looking(*arguments, **options):
        looked_at.append(arguments)
        return look(*arguments, **options)

    monkeypatch.setattr(search.run_sensitivity, "sensitivity", looking)
    run_job = search.job.run_job

    def stopped(settings, **options):
        started.append(settings.budget)
        if len(started) == 2:
            raise Interrupted("stopped")
        return run_job(settings, **options)

    monkeypatch.setattr(search.job, "run_job", stopped)
    words = [*WORDS, *ANCHORED, "--seed", "4", "--quiet"]
    assert main([*words, "--sweep", "flops=0.7,0.5,0.3", "--out", "all runs"]) == 3
    assert "amc search --out 'all runs' --resume" in capsys.readouterr().err
    assert started == [("params=0.9", "flops=0.7"), ("params=0.9", "flops=0.5")]
    before = (folder / "all runs/flops-0.7/result.json").read_bytes()
    (folder / "all runs/flops-0.5").mkdir()
    (folder / "all runs/flops-0.5/dense.onnx").write_text("a run was killed when it had been given this")

    assert main(["--out", "all runs", "--resume", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    runs = [folder / "all runs" / name for name in ("flops-0.7", "flops-0.5", "flops-0.3")]
    assert [run["path"] for run in found["runs"]] == [str(run.relative_to(folder)) for run in runs]
    assert before == (runs[0] / "result.json").read_bytes()
    for run, limit in zip(runs, (0.7, 0.5, 0.3), strict=True):
        result = json.loads((run / "result.json").read_text())
        assert result["best"]["flops"] <= limit * result["dense"]["flops"]
        assert result["best"]["params"] <= 0.9 * result["dense"]["params"]
        assert result["settings"]["seed"] == 4
    assert len(exported) == 1, "the dense model is exported once"
    assert len(looked_at) == 1, "each group alone is looked at once"
    proxies = [json.loads((run / "result.json").read_text())["proxy"] for run in runs]
    own = [proxy["samples"] for proxy in proxies]
    assert min(own) >= 5, "each run has anchors of its own"
    assert [proxy["shared"] for proxy in proxies] == [0, own[0], own[0] + own[1]]
    for run, proxy in zip(runs, proxies, strict=True):
        told = re.search(r'data-key="proxy.shared" value="(\d+)"', (run / "report.html").read_text())
        assert (told is not None) == (proxy["shared"] > 0)
        assert told is None or int(told[1]) == proxy["shared"]
    assert found["same_dense"]
    assert len({(run / "dense.safetensors").read_bytes() for run in runs}) == 1
    page = (folder / "all runs/compared.html").read_text()
    assert all(f'data-run="{run.name}"' in page for run in runs)
    assert main(["--out", "all runs", "--resume", "--seed", "5"]) == 2
    assert "--seed was 4" in capsys.readouterr().err


def test_a_sweep_whose_first_budget_was_left_out_goes_on_from_another(folder, monkeypatch):
    assert main([*WORDS, "--sweep", "flops=0.7,0.5", "--out", "runs", "--quiet"]) == 0
    shutil.rmtree("runs/flops-0.7")
    started = []
    monkeypatch.setattr(search.job, "run_job", lambda settings, **options: started.append(settings.budget))
    sweep.go_on(Path("runs"), {}, Display(quiet=True))
    assert started == [("params=0.9", "flops=0.7"), ("params=0.9", "flops=0.5")]


def test_a_sweep_that_dies_before_its_first_run_has_settings_starts_again(folder, monkeypatch, capsys):
    class Died(BaseException):
        pass

    def dies(*_):
        shutil.copytree("runs", "left")  # what a kill would leave
        raise Died

    words = [*WORDS, "--sweep", "flops=0.7,0.5", "--quiet", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(search.start, "allow", dies)
        with pytest.raises(Died):
            main([*words, "runs"])
    assert {path.name for path in (folder / "left/flops-0.7").iterdir()} == {".lock", ".owner.json", "run.log"}
    assert main(["--out", "left", "--resume"]) == 2
    assert "start it again without --resume" in capsys.readouterr().err
    monkeypatch.setattr(search.job, "prepare", lambda *_, **__: pytest.fail("began"))
    (folder / "left/mine").touch()
    assert main([*words, "left"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    (folder / "left/mine").unlink()
    with pytest.raises(pytest.fail.Exception, match="began"):
        main([*words, "left"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sweep", "flops=0.7,0.00001"], "lowest reachable: flops=0."),
        (["--sweep", "flops"], "write one cost and its limits"),
        (["--sweep", "flops=0.7,params=0.5"], "write one cost and its limits"),
        (["--sweep", "flops=0.7,1.7"], "must be in (0, 1]"),
        (["--sweep", "flops=0.7,0.7"], "has a limit twice"),
        (["--sweep", "flops=0.5,0.5%"], "would share a folder (flops-0.5, flops-0.5)"),
        (["--sweep", "params=0.7,0.5"], "limits `params` 2 times"),
        (["--sweep", "flops=0.7", "--dry-run"], "nothing to --sweep"),
        (["--sweep", "flops=0.7", "--resume", "--out", "x"], "leave --sweep out"),
        (["--sweep", "flops=0.7,0.5", "--storage", "postgresql://x@localhost/y"], "each budget needs a study"),
        (["--sweep", "flops=0.7,0.5", "--augment", "bogus"], "bogus"),
        (["--sweep", "flops=0.7,0.5", "--warm-start", "nowhere", "--out", "a/b"], "no policy file"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_is_written(folder, words, says, capsys):
    assert main([*WORDS, *words, "--quiet"]) == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in folder.iterdir() if path.name != "__pycache__"] == ["own.py"]


def test_a_sweeps_file_from_a_stranger_names_no_folder_elsewhere(folder, capsys):
    (folder / "x").mkdir()
    for budgets in (["../../flops=0.5"], ["flops=0.5/../../y"], [], "flops=0.5", [3]):
        (folder / "x/sweep.json").write_text(json.dumps({"format": "amc/sweep", "version": 1, "budgets": budgets}))
        assert main(["--out", "x", "--resume"]) == 2
        assert "Traceback" not in capsys.readouterr().err
        assert [path.name for path in (folder / "x").iterdir()] == ["sweep.json"]
    assert folder_of("../../a/b=.") == "a-b"


def test_the_limits_of_a_sweep():
    assert budgets_of(" latency = 8ms, 4ms") == ["latency=8ms", "latency=4ms"]
    assert [folder_of(budget) for budget in ("flops=50%", "params=300k")] == ["flops-50", "params-300k"]
    with pytest.raises(BudgetError):
        budgets_of("flop=0.5")
    with pytest.raises(UsageError):
        budgets_of("flops=0.5,,0.3")
