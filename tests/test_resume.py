"""Resumed equals unbroken, byte for byte; what may not change is refused by name; one directory has one owner."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState

from amc.errors import DataError, Interrupted, RunError, UsageError
from benchmarks.faults.disk import FAULTS, disk_campaign
from benchmarks.faults.harness import HERE, finished_trials, harness, words
from benchmarks.faults.hostile import Bomb
from benchmarks.faults.kills import kill_campaign, tiny_job
from benchmarks.faults.tiny import data, net
from search import job
from search.cli import main
from search.job import run
from search.run_directory import RunDirectory, check_free, owned
from search.start import resumed_settings
from search.storage import open_storage
from search.strategies import STRATEGIES, make_sampler
from search.study import open_study, search
from search.trust import names_code
from tests.synthetic import concave

ROOT = Path(__file__).parent.parent
FACTORIES = ("--model", f"{HERE / 'tiny.py'}:net", "--data", f"{HERE / 'tiny.py'}:data")
RESUME = ("search", "--resume", "--quiet", *FACTORIES, "--out")
"""A copied run is not one whose factories were named on the command line."""


@pytest.fixture(scope="module")
def server():
    if not shutil.which("cc"):
        pytest.skip("faults are injected by a small C library, and there is no C compiler (cc)")
    with harness() as server:
        yield server


@pytest.fixture(scope="module")
def finished(server, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert server.run(*words(folder, "random", 3), below=folder).status == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# ---- kills and full disks


def test_ten_kills_lose_nothing_and_change_nothing(server, tmp_path):
    assert kill_campaign(server, tiny_job("ddpg", trials=5), tmp_path, kills=10, seed=1)["kills"] == 10


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_or_broken_disk_stops_the_run_and_harms_nothing(server, tmp_path, fault):
    found = disk_campaign(server, tmp_path, fault=fault, every=45, trials=2)
    assert found["stopped and resumed"] >= 3


def test_a_longer_run_that_is_killed_keeps_the_earlier_result_until_the_new_one_is_whole(server, copy, tmp_path):
    longer = [*RESUME, str(copy), "--finetune-epochs", "3"]
    twin = Path(shutil.copytree(copy, tmp_path / "twin"))
    assert server.run(*longer, below=copy).status == 0
    before = {name: (twin / name).read_bytes() for name in ("policy.json", "model.safetensors", "result.json")}
    again = [str(twin) if word == str(copy) else word for word in longer]
    operations = server.run(*again, below=twin, fault="kill", at=10**9).operations  # counted to the end
    assert operations > 0
    for at in (20, 60, 100):
        twin = Path(shutil.copytree(copy, tmp_path / f"twin{at}"))
        for name, content in before.items():
            (twin / name).write_bytes(content)
        again = [str(twin) if word == str(copy) else word for word in longer]
        ended = server.run(*again, below=twin, fault="kill", at=at)
        after = {name: (twin / name).read_bytes() for name in before if (twin / name).exists()}
        assert ended.status == 0 or after == before or "result.json" not in after
        assert server.run(*RESUME, str(twin), below=twin).status == 0
        assert (twin / "policy.json").read_bytes() == (copy / "policy.json").read_bytes()


# ---- interrupted trials


PROPOSES = {"uniform": 1, "tilt": 4, "gp": 6}
"""Trials of strategies that propose few, or take seconds for each; 12 of the others."""


def interrupted_after(folder: Path, strategy: str, whole: int, parameters: int) -> None:
    """A study with so many finished trials, and one of which so many parameters were stored when the process died."""
    problem = concave(6)[0]
    storage = open_storage(folder)
    trials = PROPOSES.get(strategy, 12)
    study = open_study(storage, "search", make_sampler(strategy, problem, trials=trials, seed=0))
    search(problem, study, trials=whole)
    trial = study.ask()
    for group in problem.groups[:parameters]:
        trial.suggest_int(group.name, group.floor, group.channels)
    storage.engine.dispose()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("parameters", [0, 3, 6])
def test_an_interrupted_trial_is_evaluated_again_in_its_place(tmp_path, strategy, parameters):
    def trials(study):
        return [(t.number, t.state, t.params, t.value, t.user_attrs.get("widths")) for t in study.trials]

    most = PROPOSES.get(strategy, 12)
    problem = concave(6)[0]
    unbroken = open_study(None, "x", make_sampler(strategy, problem, trials=most, seed=0))
    search(problem, unbroken, trials=most)
    interrupted_after(tmp_path / "study.db", strategy, most * 2 // 3, parameters)
    fresh, storage = concave(6)[0], open_storage(tmp_path / "study.db")
    resumed = open_study(storage, "search", make_sampler(strategy, fresh, trials=most, seed=0))
    search(fresh, resumed, trials=most)
    assert trials(resumed) == trials(unbroken)
    assert len(trials(resumed)) == most
    storage.engine.dispose()


def test_failures_and_repeats_are_counted_over_resumes(tmp_path):
    def broken(problem):
        def fail(widths):
            raise RuntimeError("no")

        problem._evaluate = fail
        return problem

    for trials in (4, 8):
        problem = broken(concave(4)[0])
        study = open_study(open_storage(tmp_path / "a"), "search", make_sampler("random", problem, trials=9, seed=0))
        search(problem, study, trials=trials)
    problem = broken(concave(4)[0])
    study = open_study(open_storage(tmp_path / "a"), "search", make_sampler("random", problem, trials=9, seed=0))
    with pytest.raises(Exception, match="10 trials in a row failed"):
        search(problem, study, trials=99)
    assert len(study.get_trials(states=[TrialState.FAIL])) == 10


# ---- what may change


@pytest.mark.parametrize(
    ("option", "value"),
    [("seed", 1), ("strategy", "tpe"), ("budget", ("flops=0.6",)), ("score_steps", 9), ("importance", "l2")],
)
def test_a_changed_setting_is_refused_by_name(finished, option, value):
    with pytest.raises(UsageError, match=rf"--{option.replace('_', '-')} was .* can't become"):
        resumed_settings(finished, {"model": _spec("net"), "data": _spec("data"), option: value})


@pytest.mark.parametrize(("option", "value"), [("trials", 2), ("finetune_epochs", 1), ("time_limit", 5.0)])
def test_less_than_the_run_began_with_is_refused(finished, option, value):
    with pytest.raises(UsageError, match="may only take more"):
        resumed_settings(finished, {"model": _spec("net"), "data": _spec("data"), option: value})


@pytest.mark.parametrize(("option", "value"), [("trials", 9), ("finetune_epochs", 7)])
def test_more_is_taken(finished, option, value):
    given = {"model": _spec("net"), "data": _spec("data"), option: value}
    assert getattr(resumed_settings(finished, given), option) == value


def _spec(name: str) -> str:
    return f"{HERE / 'tiny.py'}:{name}"


def test_a_finished_run_says_so_and_a_longer_one_goes_on(server, copy):
    before = finished_trials(copy)
    assert server.run(*RESUME, str(copy), below=copy).operations < 10
    ended = server.run(*RESUME, str(copy), "--trials", "5", below=copy)
    assert ended.status == 0, ended.said
    after = finished_trials(copy)
    assert len(after) == 5
    assert before.items() <= after.items()
    assert json.loads((copy / "result.json").read_text())["search"]["trials"] == 5


def test_a_finished_study_is_one_whole_file(finished):
    assert [path.name for path in finished.glob("study.db*")] == ["study.db"]


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
def test_settings_that_no_run_writes_are_refused_by_field(copy, damage, says, capsys):
    document = json.loads((copy / "settings.json").read_text())
    damage(document)
    (copy / "settings.json").write_text(json.dumps(document))
    (copy / "result.json").unlink()
    assert main([*RESUME[1:], str(copy)]) == 2
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
def test_a_pickle_in_the_run_directory_is_never_executed(copy, tmp_path, place, capsys):
    bomb = pickle.dumps(Bomb(tmp_path / "boom"))
    for name in ("model.pt", "agent.zip", "replay_buffer.pkl", place):
        (copy / name).write_bytes(bomb)
    for name in ("result.json", "report.html"):
        (copy / name).unlink()
    assert main([*RESUME[1:], str(copy)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "boom").exists()
    pickle.loads(bomb)
    assert (tmp_path / "boom").exists()  # it would have


def test_a_factory_that_only_a_file_names_is_not_run(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'boom')!r}, 'w')\ndef net(): ...\n")
    document = json.loads((copy / "settings.json").read_text())
    document["settings"]["model"] = f"{evil}:net"
    (copy / "settings.json").write_text(json.dumps(document))
    (copy / "result.json").unlink()
    assert main(["--out", str(copy), "--resume", "--quiet"]) == 2
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


# ---- one owner


def test_of_fifty_starts_at_once_one_owns_the_directory(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from amc.errors import RunError; "
        "from search.run_directory import owned\n"
        "sys.stdin.read()\n"
        "try:\n"
        "    with owned(Path(sys.argv[1]), resume=False) as d:\n"
        "        d.write_json('settings.json', {})\n"
        "        print('owner', flush=True)\n"
        "        time.sleep(600)\n"
        "except RunError as error:\n"
        "    print(error)\n"
    )
    line = [sys.executable, "-c", code, str(tmp_path / "run")]
    starts = [
        subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(50)
    ]
    for start in starts:
        start.stdin.close()
    try:
        said = [start.stdout.readline() for start in starts]
    finally:
        for start in starts:
            start.kill()
            start.wait()
            start.stdout.close()
    assert said.count("owner\n") == 1
    assert sum("is in use by" in text or "exists and is not empty" in text for text in said) == 49
    with owned(tmp_path / "run", resume=True):  # the lock of a killed owner is nobody's
        pass


def test_the_owner_is_named(tmp_path):
    with owned(tmp_path / "run", resume=False):
        code = "import sys; from search.cli import main; sys.exit(main(sys.argv[1:]))"
        line = [sys.executable, "-c", code, "--budget", "flops=0.5", "--out", str(tmp_path / "run"), "--quiet"]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"is in use by process {os.getpid()} on " in done.stderr


def test_a_refused_start_leaves_nothing_and_touches_nothing(tmp_path):
    def refused():
        with owned(tmp_path / "a" / "b", resume=False) as directory:
            directory.write_json("settings.json", {})
            raise UsageError("no")

    with pytest.raises(UsageError):
        refused()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(RunError, match="not empty"), owned(tmp_path / "run", resume=False):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_results_are_replaced_together_or_not_at_all(tmp_path):
    directory = RunDirectory(tmp_path)
    for name in ("model.onnx", "policy.json", "result.json", "report.html"):
        (tmp_path / name).write_text("old")

    def broken():
        with directory.replacing() as new:
            (new / "policy.json").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    directory.settle()
    assert (tmp_path / "policy.json").read_text() == "old"
    assert not (tmp_path / ".making").exists()
    (tmp_path / ".complete").mkdir()  # killed between the renames
    (tmp_path / ".complete" / "result.json").write_text("new")
    (tmp_path / ".finetuned-x").touch()
    directory.settle()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "model.onnx": "old",
        "policy.json": "old",
        "result.json": "new",
    }


@pytest.mark.parametrize("kill", range(9))
def test_an_earlier_front_goes_with_its_result_wherever_a_kill_comes(tmp_path, monkeypatch, kill):
    (tmp_path / ".complete").mkdir()
    for name in ("front-1.json", "front-77.json", "policy.json", "result.json"):
        (tmp_path / name).write_text("old")
    new = dict.fromkeys(("front-1.json", "front-2.json", "model.onnx", "policy.json", "result.json"), "new")
    for name in new:
        (tmp_path / ".complete" / name).write_text("new")
    left = iter(range(kill))

    def dying(step):
        def step_or_die(*arguments, **options):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return step(*arguments, **options)

        return step_or_die

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        with pytest.raises(KeyboardInterrupt):
            RunDirectory(tmp_path).settle()
    RunDirectory(tmp_path).settle()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == new


def test_traces_of_a_run_that_never_began_are_no_obstacle(tmp_path):
    for name in (".lock", ".owner.json", "run.log", ".settings.json.abc.tmp"):
        (tmp_path / name).touch()
    check_free(tmp_path)
    with owned(tmp_path, resume=False):
        assert not (tmp_path / ".settings.json.abc.tmp").exists()


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_tidily_and_a_second_one_at_once(number):
    code = (
        "import sys, time; from search import cli\n"
        "cli._listen()\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
        "except KeyboardInterrupt:\n"
        "    print('tidying up', flush=True)\n"
        "    time.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    assert child.stdout.readline() == "tidying up\n"
    child.send_signal(number)
    assert child.wait() == -number
    child.stdout.close()


def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path, monkeypatch):
    out = tmp_path / "a run"
    arguments = [sys.executable, str(ROOT / "search.py"), *words(out, "random", 10**6)]
    child = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while len(finished_trials(out)) < 2:
        assert child.poll() is None
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate()
    assert child.returncode == 3
    assert f"amc search --out '{out}' --resume" in said
    assert len(finished_trials(out)) >= 2
    assert not (out / ".lock").exists()
