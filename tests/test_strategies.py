"""Every strategy keeps the budget, learns from what was evaluated, and repeats itself for the same seed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch

from amc.budget import Budget
from amc.problem import Problem
from search.strategies import STRATEGIES, make_sampler
from search.strategies.ddpg import AgentSettings, BaselineBuffer, DDPGSampler, InvertedGradients, truncated_normal
from search.strategies.uniform import uniform_policy
from search.study import SearchResult, open_study, search
from tests.synthetic import concave

FIXED = ("uniform", "tilt")  # propose a list, whatever the seed
ALL = [pytest.param(name, marks=pytest.mark.slow) if name == "gp" else name for name in STRATEGIES]


def run(name: str, problem: Problem, *, trials: int, seed: int = 0) -> tuple[SearchResult, optuna.Study]:
    study = open_study(None, "test", make_sampler(name, problem, trials=trials, seed=seed))
    return search(problem, study, trials=trials, seed=seed), study


@pytest.mark.parametrize("name", ALL)
def test_what_is_stored_is_what_was_evaluated_and_within_the_budget(name):
    problem, _ = concave(6, limit=0.4)
    result, study = run(name, problem, trials=12)
    assert result.trials == {"uniform": 1, "tilt": 5}.get(name, 12)
    for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        assert trial.params == trial.user_attrs["widths"]
        assert problem.budget.met(problem.widths(trial.params))
        assert trial.value == trial.user_attrs["reward"] == problem.evaluate(trial.params).reward


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_gives_the_same_trials_and_another_seed_others(name):
    def params(seed: int) -> list[dict[str, int]]:
        torch.rand(3)  # whatever the caller's random state is
        np.random.rand(3)
        study = run(name, concave(5)[0], trials=14, seed=seed)[1]
        return [trial.params for trial in study.trials]

    assert params(1) == params(1)
    if name not in FIXED:
        assert params(1) != params(2)


def test_the_same_seed_gives_the_same_trials_in_another_process():
    code = (
        "import json; from tests.test_strategies import run, concave;"
        "print(json.dumps([t.params for t in run('ddpg', concave(5)[0], trials=10, seed=3)[1].trials]))"
    )
    here = [trial.params for trial in run("ddpg", concave(5)[0], trials=10, seed=3)[1].trials]
    root = Path(__file__).parent.parent
    there = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(there.stdout) == here


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_study_proposes_what_an_unbroken_one_would(name):
    unbroken = run(name, concave(5)[0], trials=13)[1]
    storage = optuna.storages.InMemoryStorage()
    for trials in (5, 13):
        problem, _ = concave(5)  # nothing is left of the first part but the storage
        study = open_study(storage, "test", make_sampler(name, problem, trials=13, seed=0))
        search(problem, study, trials=trials)
    assert [trial.params for trial in study.trials if trial.params] == [t.params for t in unbroken.trials if t.params]


def test_ddpg_and_evolution_beat_random_search_at_equal_trials():
    loss = {name: [] for name in ("random", "ddpg", "nsga2")}
    for seed in range(3):
        for name in loss:
            problem, best = concave(10, seed=seed)
            loss[name].append(best - run(name, problem, trials=60, seed=seed)[0].best.accuracy)
    means = {name: np.mean(values) for name, values in loss.items()}
    assert means["ddpg"] < means["random"], means
    assert means["nsga2"] < means["random"], means


def test_uniform_keeps_the_same_share_everywhere_as_far_as_whole_channels_allow():
    problem, _ = concave(8, limit=0.3)
    ratios = np.array(uniform_policy(problem)) / 64
    assert np.ptp(ratios) <= 2 / 64 + 1e-9  # rounded down by less than one channel, filled up by at most two
    assert problem.budget.met(uniform_policy(problem))


def test_ddpg_works_in_a_study_of_ones_own():
    problem, _ = concave(4)
    study = optuna.create_study(direction="maximize", sampler=DDPGSampler(problem, trials=8, seed=0))

    def objective(trial: optuna.Trial) -> float:
        widths = {group.name: trial.suggest_int(group.name, group.floor, group.channels) for group in problem.groups}
        return problem.evaluate(widths).reward

    study.optimize(objective, n_trials=8)
    assert all(problem.budget.met(problem.widths(trial.params)) for trial in study.trials)


def test_ddpg_learns_from_trials_it_did_not_propose_once_each_and_leaves_failed_ones_out():
    problem, _ = concave(4)
    _, study = run("random", problem, trials=6)
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    sampler = DDPGSampler(problem, trials=20, seed=0)
    for _ in range(2):
        sampler.propose(study, study.trials[0])
    assert sampler._agent.replay_buffer.size() == 6 * 4
    assert sampler._agent._n_updates == 6 * sampler.updates


def test_the_replay_buffer_holds_executed_actions_and_takes_the_baseline_off_when_sampled():
    problem, _ = concave(3)
    sampler = DDPGSampler(problem, seed=0)
    sampler._store([1, 64, 32], 0.25)
    buffer = sampler._agent.replay_buffer
    assert isinstance(buffer, BaselineBuffer)
    assert buffer.actions[:3].ravel() == pytest.approx([-1.0, 1.0, 2 * 31 / 63 - 1])
    assert buffer.rewards[:3].ravel() == pytest.approx([0.25] * 3)  # the final reward, every step
    assert buffer.dones[:3].ravel().tolist() == [0, 0, 1]
    buffer.baseline, buffer.spread = 0.2, 0.1
    assert buffer.sample(4).rewards.numpy() == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("frugal", [False, True])
def test_every_other_episode_of_ddpg_uses_the_budget_up_by_itself(frugal, monkeypatch):
    """An actor that asks for the floor everywhere gets it in the first groups then, and the last are kept."""
    problem, _ = concave(4)
    if frugal:
        problem = Problem(problem.groups, problem.budget, problem._evaluate, reward=lambda accuracy, *_: accuracy)
    sampler = DDPGSampler(problem, trials=40, seed=0)
    _, study = run("random", problem, trials=12)
    monkeypatch.setattr(sampler, "_learn", lambda trial: None)
    monkeypatch.setattr(sampler, "_act", lambda *given: -1.0)
    floor = tuple(group.floor for group in problem.groups)

    proposal = sampler.propose(study, study.trials[0])
    assert proposal[0] == floor[0]
    assert proposal == (floor if frugal else problem.budget.fill(proposal))
    study.add_trial(study.trials[0])
    assert sampler.propose(study, study.trials[0]) == problem.admit(floor)


def test_where_many_walks_end_in_the_same_policy_ddpg_walks_on():
    """Few widths may be worth what they cost: here four of each group, which makes 72 policies."""
    problem, _ = concave(6)
    problem.groups = tuple(replace(group, widths=(16, 32, 48, 64)) for group in problem.groups)
    problem = Problem(problem.groups, Budget(problem.groups, problem.budget.limits), problem._evaluate)
    result, study = run("ddpg", problem, trials=30)
    assert result.trials == len(study.trials) == 30


def test_truncated_normal_stays_inside_and_has_the_right_mean():
    rng = np.random.default_rng(0)
    draws = [truncated_normal(0.0, 0.5, rng) for _ in range(4000)]
    assert min(draws) >= -1
    assert max(draws) <= 1
    assert np.mean(draws) == pytest.approx(0, abs=0.03)
    assert np.std(draws) == pytest.approx(0.44, abs=0.03)  # of a normal cut off at two sigma
    assert truncated_normal(5.0, 0.01, rng) == 1.0


@pytest.mark.parametrize(
    ("at", "gradient", "expected"),
    [(0.5, -1.0, -0.25), (0.5, 1.0, 0.75), (1.0, -1.0, 0.0), (-1.0, 1.0, 0.0), (1.5, -1.0, 0.25), (-1.5, 1.0, -0.25)],
)
def test_gradients_shrink_towards_the_bound_they_push_to_and_turn_beyond_it(at, gradient, expected):
    """A descent raises the action where the gradient is below zero."""
    action = torch.tensor([at], requires_grad=True)
    (gradient * InvertedGradients()(action)).backward()
    assert action.grad.item() == pytest.approx(expected)


def test_the_noise_decays_from_the_end_of_the_warm_up_to_the_last_trial():
    sampler = DDPGSampler(concave(3)[0], trials=41)
    assert [sampler._sigma(episode) for episode in (10, 25, 40, 99)] == pytest.approx([0.5, 0.1, 0.02, 0.02])


def test_actor_and_critic_learn_at_rates_of_their_own():
    sampler = DDPGSampler(concave(3)[0], settings=AgentSettings(actor_rate=1e-4, critic_rate=2e-3))
    sampler._store([1, 64, 32], 0.25)
    sampler._agent.train(1, 3)
    agent = sampler._agent
    assert [part.optimizer.param_groups[0]["lr"] for part in (agent.actor, agent.critic)] == [1e-4, 2e-3]


def test_the_agent_leaves_nothing_in_the_folder_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run("ddpg", concave(4)[0], trials=3)
    assert not list(tmp_path.iterdir())
