"""One directory has one owner, whose results replace each other together; a signal ends it tidily."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from amc.errors import RunError, UsageError
from benchmarks.faults.harness import finished_trials, words
from search.run_directory import RunDirectory, check_free, owned

ROOT = Path(__file__).parent.parent


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
