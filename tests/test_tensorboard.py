"""What other programs show of a run: TensorBoard its scalars, optuna-dashboard its study; both are started here."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest

from amc.errors import UsageError
from search import tensorboard
from search.job import run_job
from search.settings import settings_from
from search.storage import open_storage
from search.strategies import make_sampler
from search.study import open_study, search
from search.tensorboard import Scalars
from tests.synthetic import concave

GROUPS, TRIALS = 4, 6


def ask(address: str, **query: str) -> Any:
    """A JSON answer from loopback."""
    url = f"{address}?{urllib.parse.urlencode(query)}" if query else address
    with urllib.request.urlopen(url) as answer:
        return json.loads(answer.read())


@contextmanager
def served(program: list[str], log: Path, port_options: str, ready: str) -> Iterator[str]:
    """The address of a server while it runs on a free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as out:
        words = [sys.executable, *program, *port_options.format(port=port).split()]
        process = subprocess.Popen(words, stdout=out, stderr=out)
        try:
            address = f"http://127.0.0.1:{port}"
            while True:
                assert process.poll() is None, log.read_text()
                try:
                    ask(address + ready)
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, optuna.Study]:
    """A study in a file and its scalars, with a failed trial and one that an earlier process had found."""
    folder = tmp_path_factory.mktemp("run")
    problem, _ = concave(GROUPS)
    score, calls = problem._evaluate, []

    def evaluate(widths):
        calls.append(widths)
        return float("nan") if len(calls) == 3 else score(widths)

    problem._evaluate = evaluate
    study = open_study(
        open_storage(folder / "study.db"), "search", make_sampler("random", problem, trials=TRIALS, seed=0)
    )
    search(problem, study, trials=1, seed=0)
    pytest.importorskip("tensorboard", reason="needs TensorBoard")
    with Scalars(folder / "tensorboard", problem) as scalars:
        scalars.catch_up(study)
        search(problem, study, trials=TRIALS, seed=0, on_trial=lambda _: scalars.catch_up(study))
    return folder, study


def expected(study: optuna.Study) -> dict[str, list[tuple[int, float]]]:
    """The scalars by name, from the study: (trial from 1, value)."""
    problem, _ = concave(GROUPS)
    dense, found, best = problem.costs["flops"](problem.budget.dense), {}, float("-inf")
    for count, trial in enumerate(study.trials, 1):
        if trial.value is None:
            continue
        best = max(best, trial.value)
        row = {
            "reward/last": trial.value,
            "reward/best": best,
            "info/accuracy": trial.user_attrs["accuracy"],
            "info/compress_ratio": trial.user_attrs["flops"] / dense,
            **{f"preserve_rate/{i}": trial.params[g.name] / g.channels for i, g in enumerate(problem.groups)},
        }
        for name, value in row.items():
            found.setdefault(name, []).append((count, value))
    return found


def shown(api: str, tag: str) -> list[tuple[float, int, float]]:
    """The points of a scalar that TensorBoard has read by now: (time, step, value)."""
    try:
        return ask(f"{api}/scalars", run=".", tag=tag)
    except urllib.error.HTTPError as none_so_far:
        none_so_far.close()
        return []


def test_tensorboard_shows_a_runs_scalars_by_amcs_names(run, tmp_path):
    pytest.importorskip("tensorboard", reason="needs TensorBoard")
    folder, study = run
    assert [trial.value is None for trial in study.trials].index(True) == 2
    options = "--host 127.0.0.1 --port {port} --load_fast=false"
    start = ["-m", "tensorboard.main", "--logdir", str(folder / "tensorboard")]
    api = "/data/plugin/scalars"
    with served(start, tmp_path / "log", options, f"{api}/tags") as address:
        wanted = expected(study)
        last = list(wanted)[-1]
        while len(shown(f"{address}{api}", last)) < len(wanted[last]):  # it answers before it has read all
            time.sleep(0.5)
        assert set(ask(f"{address}{api}/tags")["."]) == set(wanted)
        for name, points in wanted.items():
            found = shown(f"{address}{api}", name)
            assert [step for _, step, _ in found] == [count for count, _ in points]
            assert [value for *_, value in found] == pytest.approx([value for _, value in points])


def test_a_process_that_starts_writes_all_trials_again_in_place_of_what_was_left(run, tmp_path):
    pytest.importorskip("tensorboard", reason="needs TensorBoard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, study = run
    problem, _ = concave(GROUPS)
    for _ in range(2):
        with Scalars(tmp_path, problem) as scalars:
            scalars.catch_up(study)
            scalars.catch_up(study)
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.step for event in read.Scalars("reward/last")] == [
        count for count, _ in expected(study)["reward/last"]
    ]


def test_a_trial_of_another_process_that_ends_late_is_written_and_none_is_twice(tmp_path):
    pytest.importorskip("tensorboard", reason="needs TensorBoard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    problem, _ = concave(GROUPS)
    study = open_study(None, "test", make_sampler("random", problem, trials=TRIALS, seed=0))
    search(problem, study, trials=3)
    early, late = study.ask(), study.ask()
    with Scalars(tmp_path, problem) as scalars:
        for trial, value in ((late, 0.75), (early, 0.25)):
            widths = {g.name: trial.suggest_int(g.name, g.floor, g.channels) for g in problem.groups}
            for name, attribute in {"accuracy": value, **problem.evaluate(widths).costs}.items():
                trial.set_user_attr(name, attribute)
            study.tell(trial, value)
            scalars.catch_up(study)
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    written = [(event.step, event.value) for event in read.Scalars("reward/last")]
    assert written[3:] == [(4, 0.75), (5, 0.25)]


def test_without_tensorboard_the_option_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    settings = settings_from({"budget": "flops=0.5", "tensorboard": True})
    with pytest.raises(UsageError, match=r"pip install 'amc-pruning-search\[tensorboard\]'"):
        run_job(settings, out=tmp_path / "run", display=None)
    assert not (tmp_path / "run").exists()


def test_optuna_dashboard_shows_a_runs_study(run, tmp_path):
    pytest.importorskip("optuna_dashboard", reason="needs optuna-dashboard")
    folder, study = run
    start = ["-m", "optuna_dashboard", f"sqlite:///{folder / 'study.db'}"]
    try:
        import optuna_dashboard.__main__  # noqa: F401
    except ImportError:
        start = ["-c", "from optuna_dashboard._cli import main; main()", start[-1]]
    with served(start, tmp_path / "log", "--host 127.0.0.1 --port {port}", "/api/studies") as address:
        (summary,) = ask(f"{address}/api/studies")["study_summaries"]
        assert summary["study_name"] == "search"
        trials = ask(f"{address}/api/studies/{summary['study_id']}", after="0")["trials"]
    assert [trial["state"] for trial in trials] == ["Fail" if t.value is None else "Complete" for t in study.trials]
    values = [trial.get("values") for trial in trials]
    assert [each and float(each[0]) for each in values] == [trial.value for trial in study.trials]
