"""A resumed run takes what may change; what may not is refused by name; no file of it makes us run code."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from amc.errors import DataError, Interrupted, UsageError
from benchmarks.faults.harness import HERE, finished_trials, words
from benchmarks.faults.hostile import Bomb
from benchmarks.faults.tiny import data, net
from search import job
from search.cli import main
from search.job import run
from search.run_directory import RunDirectory
from search.start import resumed_settings
from search.storage import open_storage
from search.study import open_study
from search.trust import names_code

FACTORIES = ("--model", f"{HERE / 'tiny.py'}:net", "--data", f"{HERE / 'tiny.py'}:data")
RESUME = ("search", "--resume", "--quiet", *FACTORIES, "--out")
"""A copied run is not one whose factories were named on the command line."""


# ---- what may change


@pytest.mark.parametrize(
    ("option", "value"),
    [("seed", 1), ("strategy", "tpe"), ("budget", ("flops=0.6",)), ("score_steps", 9), ("importance", "l2")],
)
def test_a_changed_setting_is_refused_by_name(tiny_run, option, value):
    with pytest.raises(UsageError, match=rf"--{option.replace('_', '-')} was .* can't become"):
        resumed_settings(tiny_run, {"model": _spec("net"), "data": _spec("data"), option: value})


@pytest.mark.parametrize(("option", "value"), [("trials", 2), ("finetune_epochs", 1), ("time_limit", 5.0)])
def test_less_than_the_run_began_with_is_refused(tiny_run, option, value):
    with pytest.raises(UsageError, match="may only take more"):
        resumed_settings(tiny_run, {"model": _spec("net"), "data": _spec("data"), option: value})


@pytest.mark.parametrize(("option", "value"), [("trials", 9), ("finetune_epochs", 7)])
def test_more_is_taken(tiny_run, option, value):
    given = {"model": _spec("net"), "data": _spec("data"), option: value}
    assert getattr(resumed_settings(tiny_run, given), option) == value


def _spec(name: str) -> str:
    return f"{HERE / 'tiny.py'}:{name}"


def test_a_finished_run_says_so_and_a_longer_one_goes_on(server, tiny_copy):
    before = finished_trials(tiny_copy)
    assert server.run(*RESUME, str(tiny_copy), below=tiny_copy).operations < 10
    ended = server.run(*RESUME, str(tiny_copy), "--trials", "5", below=tiny_copy)
    assert ended.status == 0, ended.said
    after = finished_trials(tiny_copy)
    assert len(after) == 5
    assert before.items() <= after.items()
    assert json.loads((tiny_copy / "result.json").read_text())["search"]["trials"] == 5


def test_a_finished_study_is_one_whole_file(tiny_run):
    assert [path.name for path in tiny_run.glob("study.db*")] == ["study.db"]


def test_data_that_changed_is_refused(tmp_path):
    model, out = _net(), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "search_to_budget", _interrupt)
        with pytest.raises(Interrupted):
            run(model=model, data=_data(200), budget="flops=0.5", out=out)
    with pytest.raises(DataError, match=r"the data of the run in .* has changed"):
        run(model=model, data=_data(100), out=out, resume=True)


def test_measured_latencies_keep_their_unit_on_a_slower_machine(tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(job, "finish", _interrupt)
    given = {"budget": "flops=0.5", "reward": "amc_latency", "strategy": "random", "score_steps": 0, "trials": 2}
    for milliseconds in (2.0, 6.0):
        reading = SimpleNamespace(median_ms=milliseconds, ratio=0.5)
        monkeypatch.setattr("latency.measured.measure", lambda models, now=reading, **_: dict.fromkeys(models, now))
        with pytest.raises(Interrupted):
            run(model=_net(), data=_data(100), out=out, **given)
        given = {"trials": 4, "resume": True}
    trials = open_study(open_storage(out / "study.db"), "search", None).get_trials()
    assert [trial.user_attrs["latency"] for trial in trials] == [1.0] * 4


def _interrupt(*_):
    raise KeyboardInterrupt


def _net():
    from benchmarks.faults.tiny import net

    return net()


def _data(count):
    from torch.utils.data import Subset

    from benchmarks.faults.tiny import data

    return {**data(), "val": Subset(data()["val"], range(count))}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: d["settings"].update(nothing=1), "nothing"),
        (lambda d: d["settings"].update(seed="x"), "--seed 'x'"),
        (lambda d: d["settings"].update(seed=1.5), "--seed '1.5'"),
        (lambda d: d["settings"].update(strategy=["ddpg"]), "strategy"),
        (lambda d: d.update(settings=[]), "settings"),
        (lambda d: d["resolved"].update(threads=-1), "threads"),
        (lambda d: d["resolved"].update(threads=1025), "threads"),
        (lambda d: d["settings"].update(threads=1025), "--threads '1025' can't be used: write a whole number from 1"),
        (lambda d: d["resolved"].update(groups=7), "groups"),
    ],
)
def test_settings_that_no_run_writes_are_refused_by_field(tiny_copy, damage, says, capsys):
    document = json.loads((tiny_copy / "settings.json").read_text())
    damage(document)
    (tiny_copy / "settings.json").write_text(json.dumps(document))
    (tiny_copy / "result.json").unlink()
    assert main([*RESUME[1:], str(tiny_copy)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_what_a_resume_was_refused_is_not_kept(tmp_path):
    def go_on(**more):
        return run(model=net(), data=data(), out=tmp_path / "run", resume=True, **more)

    run(model=net(), data=data(), out=tmp_path / "run", budget="flops=0.5", trials=2, strategy="random", score_steps=0)
    with pytest.raises(UsageError, match="--workers"):
        go_on(trials=4, workers=2)
    assert go_on(trials=3).summary["search"]["trials"] == 3


# ---- code is named on the command line


@pytest.mark.parametrize("place", ["dense.safetensors", "study.db", "settings.json"])
def test_a_pickle_in_the_run_directory_is_never_executed(tiny_copy, tmp_path, place, capsys):
    bomb = pickle.dumps(Bomb(tmp_path / "boom"))
    for name in ("model.pt", "agent.zip", "replay_buffer.pkl", place):
        (tiny_copy / name).write_bytes(bomb)
    for name in ("result.json", "report.html"):
        (tiny_copy / name).unlink()
    assert main([*RESUME[1:], str(tiny_copy)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "boom").exists()
    pickle.loads(bomb)
    assert (tmp_path / "boom").exists()  # it would have


def test_a_factory_that_only_a_file_names_is_not_run(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    tiny_copy = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'boom')!r}, 'w')\ndef net(): ...\n")
    document = json.loads((tiny_copy / "settings.json").read_text())
    document["settings"]["model"] = f"{evil}:net"
    (tiny_copy / "settings.json").write_text(json.dumps(document))
    (tiny_copy / "result.json").unlink()
    assert main(["--out", str(tiny_copy), "--resume", "--quiet"]) == 2
    assert "a file can't make this program run code" in capsys.readouterr().err
    assert not (tmp_path / "boom").exists()


def test_a_run_that_dies_as_it_begins_still_knows_whom_it_asked(tmp_path, monkeypatch):
    class Died(BaseException):
        pass

    def dies(directory, name, value):
        write(directory, name, value)
        raise Died

    write = RunDirectory.write_json
    monkeypatch.setattr(RunDirectory, "write_json", dies)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.raises(Died):
        main(words(tmp_path / "run", "random", 3))
    assert resumed_settings(tmp_path / "run", {}).model == FACTORIES[1]


def test_what_names_code():
    for code in ("net.py:make", "package.module:Net", "dir/x.py:data"):
        assert names_code("model", code)
        assert names_code("data", code)
    assert not any(names_code("model", known) for known in ("resnet20", "torchvision:resnet18", "timm:x", "hf:dir"))
    assert not any(names_code("data", known) for known in ("digits", "imagefolder:x", "npz:a"))
    assert all(names_code("model", module) for module in ("npz:build", "digits:net", "imagefolder:x", "timm:"))
    assert all(names_code("data", file) for file in ("timm:x/d.py:splits", "torchvision:x.py:f", "hf:x"))
