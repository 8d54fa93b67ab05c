"""Policies of earlier runs are scored first, within the new budget, and every strategy goes on from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from amc.errors import RunError, UsageError
from search.job import run
from search.start import resumed_settings
from search.storage import open_storage
from search.strategies import STRATEGIES, make_sampler
from search.study import open_study, search
from search.warm import adapted, read, warm_start
from tests.synthetic import concave

TINY = Path(__file__).parent.parent / "benchmarks" / "faults" / "tiny.py"
GROUPS = concave(6)[0].groups
NAMED = {"model": f"{TINY}:net", "data": f"{TINY}:data", "score_steps": 1, "threads": 1, "finetune_epochs": 0}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("earlier") / "run"
    run(**NAMED, budget="flops=0.7", strategy="random", trials=4, out=out)
    return out


def trials_of(folder: Path):
    storage = open_storage(folder / "study.db")
    trials = open_study(storage, "search", None).trials
    storage.engine.dispose()
    return trials


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "gp"])
def test_every_strategy_scores_an_earlier_policy_first_and_goes_on(strategy, monkeypatch):
    problem = concave(6)[0]
    study = open_study(None, "x", make_sampler(strategy, problem, trials=4, seed=0))
    monkeypatch.setattr("search.warm.read", lambda source: [{group.name: 64 - 9 * i for i, group in enumerate(GROUPS)}])
    warm_start(study, problem, ["earlier"])
    search(problem, study, trials=4)
    first, *others = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert first.user_attrs["from"] == "earlier"
    assert first.params == problem.named(problem.admit([64 - 9 * i for i in range(6)]))
    assert others
    assert all("from" not in trial.user_attrs for trial in others)


def test_a_run_starts_from_a_run(tmp_path, earlier):
    run(**NAMED, budget="flops=0.5", strategy="random", trials=6, warm_start=str(earlier), out=tmp_path / "run")
    trials, dense = trials_of(tmp_path / "run"), json.loads((tmp_path / "run/result.json").read_text())["dense"]
    assert {trial.user_attrs["from"] for trial in trials[:4]} == {str(earlier)}
    assert "from" not in trials[-1].user_attrs
    assert all(trial.user_attrs["flops"] <= 0.5 * dense["flops"] for trial in trials)


def test_of_a_run_its_final_policy_comes_first_then_its_best_trials(earlier):
    final, *rest = read(earlier)
    assert final == {g["name"]: g["width"] for g in json.loads((earlier / "policy.json").read_text())["groups"]}
    rewards = {tuple(sorted(t.params.items())): t.value for t in trials_of(earlier)}
    values = [rewards[tuple(sorted(widths.items()))] for widths in rest]
    assert values == sorted(values, reverse=True)
    assert len(rest) >= 3


def test_an_agent_learns_from_them():
    problem = concave(6)[0]
    sampler = make_sampler("ddpg", problem, trials=8, seed=0)
    study = open_study(None, "x", sampler)
    for width in (20, 40):
        study.enqueue_trial(problem.named(problem.admit([width] * 3 + [64] * 3)))
    search(problem, study, trials=3)
    assert sampler._learned >= {0, 1}
    assert sampler._agent.replay_buffer.size() == 2 * len(problem.groups)


def test_a_population_takes_them_in():
    problem = concave(6)[0]
    study = open_study(None, "x", make_sampler("nsga2", problem, trials=24, seed=0))
    for width in (20, 30, 40, 50):  # a whole population
        study.enqueue_trial(problem.named(problem.admit([width] * 3 + [64] * 3)))
    search(problem, study, trials=5)
    assert [t.system_attrs["NSGAIISampler:generation"] for t in study.trials] == [0, 0, 0, 0, 1]


def test_they_wait_once_whatever_happens(tmp_path, earlier):
    problem = concave(4)[0]
    policy = {group.name: 30 for group in problem.groups}
    study = open_study(None, "x", make_sampler("random", problem, trials=3, seed=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.warm.read", lambda source: [policy, policy])
        warm_start(study, problem, ["a", "b"])
        assert len(study.trials) == 1
        study.ask()
        warm_start(study, problem, ["a", "b"])
        assert len(study.trials) == 1
    given = {"model": NAMED["model"], "data": NAMED["data"], "warm_start": str(earlier)}
    with pytest.raises(UsageError, match=r"--warm-start was .* can't become"):
        resumed_settings(earlier, given)


def test_what_is_no_policy_or_of_another_model_is_refused(tmp_path):
    problem = concave(4)[0]
    with pytest.raises(UsageError, match="no policy file, and no run directory"):
        read(tmp_path)
    with pytest.raises(UsageError, match="of another model: it has no group 'layer00'"):
        adapted(problem, {"conv1": 3}, "x")
    some = adapted(problem, {"layer00": 10}, "x")
    assert problem.budget.met(some)
    with pytest.raises(UsageError, match="no policy file, and no run directory"):
        run(**NAMED, budget="flops=0.5", warm_start=str(tmp_path / "nowhere"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing is left of a run that could not begin"


def test_a_study_whose_parameters_are_no_widths_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    storage = open_storage(tmp_path / "study.db")
    named = CategoricalDistribution(["abc"])
    study = open_study(storage, "search", None)
    study.add_trial(create_trial(params={"conv1": "abc"}, distributions={"conv1": named}, value=1.0))
    storage.engine.dispose()
    with pytest.raises(RunError, match="a parameter in it is no width"):
        run(**NAMED, budget="flops=0.5", warm_start=str(tmp_path), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("search.storage.STUDY_LIMIT", 2**12)
    with pytest.raises(RunError, match="larger than"):
        read(tmp_path)
