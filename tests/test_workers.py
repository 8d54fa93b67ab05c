"""Several workers: the same study each time, whoever is quicker; a dead one costs one trial; resumed as unbroken."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
from optuna.trial import TrialState

from amc.errors import UsageError
from amc.evaluate import Evaluator
from amc.problem import Problem
from benchmarks.faults.tiny import data, net
from search import engines
from search import study as study_module
from search.child import Isolated
from search.compose import compose
from search.executor import EvaluationFailed, Here, Pool
from search.job import run
from search.settings import Settings, apart_from_workers
from search.start import resumed_settings
from search.storage import open_storage
from search.strategies import make_sampler
from search.study import SearchResult, open_study, search
from tests.synthetic import concave

TINY = Path(__file__).parent.parent / "benchmarks" / "faults" / "tiny.py"
NAMED = {"model": f"{TINY}:net", "data": f"{TINY}:data", "budget": "flops=0.5", "score_steps": 1, "threads": 1}
INDEPENDENT = ["random", "tilt", "uniform"]
LEARNING = ["auto", "ddpg", "nsga2", "cmaes", "tpe", "greedy"]


class Slow:
    """A worker that takes a random time, and dies at the policies that it is told to."""

    def __init__(self, problem: Problem, deadly: set[tuple[int, ...]] = frozenset()) -> None:
        self.problem, self.deadly, self.calls = problem, deadly, 0
        self.ended = threading.Event()

    def start(self) -> None: ...

    def __call__(self, widths, steps=None):
        self.calls += 1
        if self.ended.wait(random.random() / 100):
            raise EvaluationFailed("it was killed")
        if self.problem.widths(widths) in self.deadly:
            raise EvaluationFailed("the process that evaluated it was killed by SIGSEGV")
        return self.problem._evaluate(widths)

    def kill(self) -> None:
        self.ended.set()

    def close(self) -> None: ...


def searched(strategy: str, workers: int, trials: int = 14, storage=None, **more) -> tuple[optuna.Study, SearchResult]:
    problem = concave(4)[0]
    study = open_study(storage, "search", make_sampler(strategy, problem, trials=14, seed=3))
    pool = Pool([Slow(problem, **more) for _ in range(workers)])
    try:
        return study, search(problem, study, trials=trials, executor=pool)
    finally:
        pool.close()


def trials_of(study: optuna.Study) -> list:
    return [(t.number, t.state, t.params, t.value) for t in study.trials]


@pytest.mark.parametrize("strategy", LEARNING)
def test_with_as_many_workers_a_study_is_the_same_whoever_is_quicker(strategy):
    assert trials_of(searched(strategy, 3)[0]) == trials_of(searched(strategy, 3)[0])


@pytest.mark.parametrize("strategy", INDEPENDENT)
def test_a_strategy_that_does_not_learn_proposes_the_same_with_any_number_of_workers(strategy):
    def scored(workers):
        study, _ = searched(strategy, workers)
        return [(t.params, t.value) for t in study.trials if t.state == TrialState.COMPLETE and not repeats(t)]

    assert scored(1) == scored(2) == scored(5)


def repeats(trial) -> bool:
    return "repeat" in trial.user_attrs


@pytest.mark.parametrize("strategy", ["random", "auto", "ddpg"])
def test_one_worker_searches_as_this_process_does(strategy):
    problem = concave(4)[0]
    study = open_study(None, "search", make_sampler(strategy, problem, trials=14, seed=3))
    search(problem, study, trials=14, executor=Here(problem))
    assert trials_of(study) == trials_of(searched(strategy, 1)[0])


def test_workers_score_at_once_and_exactly_as_many_policies_as_were_asked_for():
    problem, least = concave(4)[0], threading.Barrier(3)

    class Meeting(Slow):
        def __call__(self, widths, steps=None):
            least.wait()  # passes when three are here at once
            return super().__call__(widths)

    study = open_study(None, "search", make_sampler("random", problem, trials=9, seed=0))
    pool = Pool([Meeting(problem) for _ in range(3)])
    result = search(problem, study, trials=9, executor=pool)
    pool.close()
    assert result.trials == len(study.trials) == 9


def test_a_policy_that_is_being_scored_is_not_scored_by_another_worker():
    problem = concave(4)[0]

    class Same(type(make_sampler("uniform", problem, trials=1, seed=0))):
        def propose(self, study, trial):
            return (30,) * 4

    workers = [Slow(problem) for _ in range(3)]
    pool = Pool(workers)
    result = search(problem, open_study(None, "search", Same(problem)), trials=9, executor=pool)
    pool.close()
    assert result.trials == sum(worker.calls for worker in workers) == 1


def test_a_worker_that_dies_costs_one_trial_and_no_other():
    healthy, _ = searched("random", 3)
    deadly = {tuple(healthy.trials[5].params.values())}
    study, result = searched("random", 3, deadly=deadly)
    assert (result.trials, result.failed) == (13, 1)
    assert study.trials[5].state == TrialState.FAIL
    assert "SIGSEGV" in study.trials[5].user_attrs["error"]
    assert [t.params for t in study.trials] == [t.params for t in healthy.trials]


@pytest.mark.parametrize("strategy", ["random", "auto", "ddpg"])
@pytest.mark.parametrize("asked", [1, 2, 3])
def test_a_killed_search_of_three_workers_goes_on_as_if_unbroken(tmp_path, strategy, asked):
    class Killed(Pool):
        """Dies when so many trials are under way after the tenth."""

        def submit(self, widths):
            self.count = getattr(self, "count", 0) + 1
            if self.count == 10 + asked:
                raise KeyboardInterrupt
            return super().submit(widths)

    problem = concave(4)[0]
    storage = open_storage(tmp_path / "study.db")
    study = open_study(storage, "search", make_sampler(strategy, problem, trials=14, seed=3))
    pool = Killed([Slow(problem) for _ in range(3)])
    with pytest.raises(KeyboardInterrupt):
        search(problem, study, trials=14, executor=pool)
    pool.close()
    assert len(study.get_trials(states=[TrialState.RUNNING])) == 3
    storage.engine.dispose()
    resumed, result = searched(strategy, 3, storage=open_storage(tmp_path / "study.db"))
    assert result.trials == 14
    assert trials_of(resumed) == trials_of(searched(strategy, 3)[0])


def test_what_is_under_way_when_the_time_is_up_is_told(monkeypatch):
    problem, now = concave(4)[0], [0.0]
    monkeypatch.setattr(study_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    study = open_study(None, "search", make_sampler("random", problem, trials=14, seed=3))
    pool, seen = Pool([Slow(problem) for _ in range(3)]), []

    def pass_time(progress):
        seen.append(progress)
        now[0] += 1

    result = search(problem, study, trials=None, time_limit=3.5, executor=pool, on_trial=pass_time)
    pool.close()
    assert result.trials == len(seen) == len(study.trials) == 6  # four were told by then, two more were under way
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)


def test_closing_ends_what_is_under_way_soon():
    class Stuck(Slow):
        def __call__(self, widths, steps=None):
            assert self.ended.wait(600)
            raise EvaluationFailed("it was killed")

    pool = Pool([Stuck(concave(4)[0]) for _ in range(2)])
    scores = [pool.submit({}) for _ in range(2)]
    pool.close()
    assert all(isinstance(score.exception(), EvaluationFailed) for score in scores)


# ---- child processes


def test_two_processes_find_what_one_does_anchors_included(tmp_path, monkeypatch):
    here, recovered = [], Evaluator.recovered

    def noted(self, widths, steps):
        here.append(widths)
        return recovered(self, widths, steps)

    monkeypatch.setattr(Evaluator, "recovered", noted)
    named = NAMED | {"strategy": "random", "trials": 4, "anchor_share": 0.8, "finetune_epochs": 0}
    runs = [run(**named, workers=workers, out=tmp_path / str(workers)) for workers in (1, 2)]
    assert runs[0].summary["proxy"] == runs[1].summary["proxy"]
    assert len(here) == runs[0].summary["proxy"]["samples"] > 0, "the second run's are the workers'"
    one, two = ((r.path / "policy.json").read_bytes() for r in runs)
    assert one == two
    assert runs[0].summary["best"]["accuracy"] == runs[1].summary["best"]["accuracy"]


def test_a_process_that_is_killed_costs_its_trial(tmp_path, monkeypatch):
    killed, start = [], Isolated.start

    def kill_the_first(self):
        start(self)
        if not killed:
            killed.append(self._child.pid)
            os.kill(self._child.pid, 9)

    monkeypatch.setattr(Isolated, "start", kill_the_first)
    result = run(**NAMED, strategy="random", trials=4, finetune_epochs=0, workers=2, out=tmp_path / "run")
    assert (result.summary["search"]["trials"], result.summary["search"]["failed"]) == (3, 1)


def test_objects_can_not_be_scored_in_other_processes(tmp_path):
    with pytest.raises(UsageError, match=r"--workers.*named, not objects"):
        run(model=net(), data=data(), budget="flops=0.5", workers=2, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_how_many_workers_there_are_may_change_on_resume(tmp_path):
    run(**NAMED, strategy="random", trials=2, finetune_epochs=0, out=tmp_path / "run")
    model = {"model": NAMED["model"], "data": NAMED["data"]}
    assert resumed_settings(tmp_path / "run", {**model, "workers": 2}).workers == 2
    assert resumed_settings(tmp_path / "run", {**model, "address": "10.0.0.1:6379"}).address == "10.0.0.1:6379"
    assert resumed_settings(tmp_path / "run", {**model, "address": "local"}).address is None
    before = json.loads((tmp_path / "run" / "result.json").read_text())
    run(**model, out=tmp_path / "run", resume=True, workers=2)  # finished: nothing to do
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == before
    assert apart_from_workers(Settings(workers=3, engine="ray", address="x")) == Settings()


def test_threads_and_gpus_are_shared_out(tmp_path, monkeypatch):
    setup = compose(Settings(**{**NAMED, "budget": ("flops=0.5",), "threads": None}, workers=3))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)

    def pool():
        return engines.local(setup, tmp_path / "dense.safetensors")

    assert [worker._settings.threads for worker in pool()._all] == [2, 2, 2]
    assert [worker._environment for worker in pool()._all] == [{}, {}, {}]
    monkeypatch.setattr(type(next(setup.loaded.model.parameters())), "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [worker._environment["CUDA_VISIBLE_DEVICES"] for worker in pool()._all] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert [worker._environment["CUDA_VISIBLE_DEVICES"] for worker in pool()._all] == ["5", "5", "5"]
