"""A front in one run: limits fill the range, rewards compare across it, and every strategy gets beyond uniform."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from amc.errors import UsageError
from amc.policy import load_policy
from search.finished import RunResult, read_document
from search.front import FrontProblem, FrontSampler, begin, front_problem, with_front
from search.job import run
from search.settings import Settings
from search.storage import open_storage
from search.strategies import STRATEGIES
from search.strategies.base import Exhausted
from search.study import open_study, search
from tests.synthetic import concave

TINY = Path(__file__).parent.parent / "benchmarks" / "faults" / "tiny.py"


def searched(strategy: str, trials: int, storage=None, stop: int | None = None):
    problem = FrontProblem(concave(6)[0])
    study = open_study(storage, "search", FrontSampler(problem, strategy, trials=trials, seed=0))
    begin(study, problem)
    found = search(problem, study, trials=stop or trials)
    return problem, study, with_front(found, study, problem, concave(6)[0])


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "gp"])
def test_each_trial_keeps_its_own_limit_and_limits_fill_the_range(strategy):
    problem, study, _ = searched(strategy, 16)
    limits = [trial.user_attrs["limit"] for trial in study.trials if trial.params]
    assert limits[:6] == pytest.approx(np.geomspace(0.5, 1, 6))
    assert all(0.5 <= limit <= 1 for limit in limits)
    for trial, limit in zip([t for t in study.trials if t.params], limits, strict=True):
        assert 0.9 * limit <= trial.user_attrs["flops"] / problem.given.dense <= limit + 1e-9
    if len(limits) == 16:
        assert np.diff(sorted(limits)).max() < 0.15


@pytest.mark.parametrize(("strategy", "trials"), [("auto", 60), ("ddpg", 80), ("nsga2", 60), ("evolution", 60)])
def test_a_front_dominates_the_uniform_policies(strategy, trials):
    problem, study, found = searched(strategy, trials)
    costs = [outcome.costs["flops"] for outcome in found.front]
    accuracies = [outcome.accuracy for outcome in found.front]
    assert costs == sorted(costs)
    assert accuracies == sorted(accuracies)
    gains = [
        max(a for a, c in zip(accuracies, costs, strict=True) if c <= trial.user_attrs["flops"])
        - trial.user_attrs["accuracy"]
        for trial in study.trials[1:5]  # uniform ones, the dense model aside
    ]
    assert min(gains) > 0
    assert concave(6)[0].budget.met(problem.widths(found.best.widths))


def test_a_reward_is_accuracy_above_the_uniform_policy_of_that_cost():
    _, study, _ = searched("random", 12)
    uniform = [trial.user_attrs for trial in study.trials[:6]]
    assert [trial["reward"] for trial in uniform] == [0.0] * 6
    for trial in study.trials[6:]:
        logs = np.log([one["flops"] for one in uniform])
        expected = np.interp(np.log(trial.user_attrs["flops"]), logs, [one["accuracy"] for one in uniform])
        assert trial.value == pytest.approx(trial.user_attrs["accuracy"] - expected)


@pytest.mark.parametrize(
    ("strategy", "stop", "most"),
    [("auto", 3, 14), ("auto", 9, 14), ("ddpg", 3, 14), ("ddpg", 9, 14), ("greedy", 20, 30)],
)
def test_a_front_that_was_interrupted_goes_on_as_if_unbroken(tmp_path, strategy, stop, most):
    def trials(study):
        return [(t.number, t.state, t.params, t.value, t.user_attrs.get("limit")) for t in study.trials]

    storage = open_storage(tmp_path / "study.db")
    _, study, _ = searched(strategy, most, storage, stop=stop)
    study.ask()
    storage.engine.dispose()
    _, resumed, _ = searched(strategy, most, open_storage(tmp_path / "study.db"))
    assert trials(resumed) == trials(searched(strategy, most)[1])


def test_where_a_strategy_knows_nothing_more_under_one_limit_another_is_tried():
    problem = FrontProblem(concave(6)[0])
    sampler = FrontSampler(problem, "random", trials=20, seed=0)
    propose = sampler._base.sample_relative

    def only_wide(*args):
        if problem.budget.limits[0].fraction < 0.8:
            raise Exhausted("nothing more")
        return propose(*args)

    sampler._base.sample_relative = only_wide
    study = open_study(None, "search", sampler)
    begin(study, problem)
    assert search(problem, study, trials=20).trials == 20
    assert all(trial.user_attrs["limit"] >= 0.8 for trial in study.trials[6:])


def test_what_does_not_go_with_a_front_is_refused():
    two = concave(4)[0]
    two.budget.limits = two.budget.limits * 2
    with pytest.raises(UsageError, match="--pareto takes one --budget"):
        FrontProblem(two)
    with pytest.raises(UsageError, match="leave out --storage and --reward"):
        front_problem(Settings(pareto=True, reward="amc_flops"), concave(4)[0])
    assert front_problem(Settings(), concave(4)[0]) is None


def test_a_run_writes_its_front(tmp_path):
    named = {"model": f"{TINY}:net", "data": f"{TINY}:data", "score_steps": 1, "threads": 1, "finetune_epochs": 0}
    result = run(**named, budget="flops=0.5", strategy="random", trials=9, pareto=True, out=tmp_path / "run")
    lines = read_document(tmp_path / "run" / "result.json", RunResult).front
    assert len(lines) == len(list((tmp_path / "run").glob("front-*.json"))) >= 1
    for line in lines:
        policy = load_policy(tmp_path / "run" / line.policy)
        assert policy.widths == line.widths
        assert policy.result["score"] == line.score
    dense = json.loads((tmp_path / "run" / "result.json").read_text())["dense"]["flops"]
    assert result.summary["best"]["flops"] <= 0.5 * dense
