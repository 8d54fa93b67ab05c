"""The environment is a real one: any checker and any agent takes it as it is."""

from __future__ import annotations

import copy

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3 import DDPG
from stable_baselines3.common.env_checker import check_env as sb3_check

import envs
from amc.budget import Budget, Limit, parse_budget
from amc.cost import FunctionCost, analytic
from amc.problem import Problem
from envs.observation import FEATURES
from envs.pruning import PruningEnv, action_of, width_of
from tests.synthetic import chain, concave


def small_problem(budget: str = "flops=0.5") -> Problem:
    structure = chain([3, 8, 16, 12, 10], [3, 3, 1, 1], [64, 64, 16, 1])
    costs = analytic(structure)
    limits = Budget.of(structure.groups, costs, parse_budget(budget))
    return Problem(structure.groups, limits, lambda widths: sum(widths.values()) / 36, costs=costs)


def test_both_checkers_pass():
    env = gymnasium.make(envs.ENV_ID, problem=small_problem())
    gymnasium_check(env.unwrapped, skip_render_check=True)
    sb3_check(env.unwrapped)


def test_stable_baselines3_learns_on_it_as_it_is():
    env = gymnasium.make("amc/Pruning-v0", problem=small_problem())
    model = DDPG("MlpPolicy", env, learning_starts=10, batch_size=8, device="cpu", seed=0)
    model.learn(total_timesteps=30)
    assert model.num_timesteps >= 30


def test_a_thousand_random_rollouts_stay_within_the_budget():
    problem = small_problem("flops=0.4,params=0.5")
    env = envs.PruningEnv(problem)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        env.reset()
        for _ in problem.groups:
            env.decide(float(rng.uniform(-1, 1)))
        assert problem.budget.met(env.executed)


def test_observations_by_hand():
    problem = small_problem()
    cost = problem.costs["flops"]
    dense = cost([8, 16, 12])
    env = envs.PruningEnv(problem)
    state, _ = env.reset()
    named = dict(zip(FEATURES, state, strict=True))
    assert named["index"] == 0
    assert named["reduced"] == 0
    assert named["last_action"] == 1
    assert named["rest"] == pytest.approx((dense - cost([8, 1, 1])) / dense)
    assert named["cost"] == pytest.approx(1 - cost([1, 16, 12]) / dense)
    assert named["outputs"] == pytest.approx(np.log2(8) / np.log2(16))
    assert named["positions"] == 1
    state, _, _, _, info = env.step(np.array([-1.0]))
    named = dict(zip(FEATURES, state, strict=True))
    assert info["width"] == 1
    assert named["last_action"] == pytest.approx(1 / 8)
    assert named["reduced"] == pytest.approx(1 - cost([1, 16, 12]) / dense)
    assert named["rest"] == pytest.approx((cost([1, 16, 12]) - cost([1, 16, 1])) / dense)


def test_a_latency_budget_adds_what_it_leaves_to_the_observation():
    structure = chain([3, 8, 16, 10], [3, 3, 1], [64, 16, 1])
    cost = FunctionCost("latency", "ms", lambda widths: 1.0 + widths[0] / 8 + 2 * widths[1] / 16)
    budget = Budget(structure.groups, [Limit(cost, 3.0, 4.0)])
    env = envs.PruningEnv(Problem(structure.groups, budget, lambda widths: 0.5))
    sb3_check(env)
    state, _ = env.reset()
    assert state.shape == (13,)
    assert state[11] == pytest.approx(1 - cost([1, 16]) / 4)
    assert state[12] == pytest.approx(1 - cost([1, 1]) / 3)
    state, *_ = env.step(np.array([1.0]))
    assert state[12] == pytest.approx(1 - cost([8, 1]) / 3)


def test_what_is_observed_and_reported_is_what_was_executed_not_what_was_asked():
    problem = small_problem("flops=0.2")
    env = envs.PruningEnv(problem)
    env.reset()
    state, _, _, _, info = env.step(np.array([1.0]))
    assert info["width"] == problem.budget.max_width((), 0) < 8
    assert info["keep_ratio"] == info["width"] / 8 == pytest.approx(float(state[10]))
    assert env.reset()[0].shape == (11,)
    assert env.step(np.array([info["action"]]))[4]["width"] == info["width"]


def test_the_reward_comes_once_at_the_end_and_is_the_outcomes():
    problem = small_problem()
    env = envs.PruningEnv(problem)
    env.reset(seed=1)
    rewards, infos = [], []
    for _ in problem.groups:
        _, reward, terminated, truncated, info = env.step(np.array([0.0]))
        rewards.append(reward)
        infos.append(info)
        assert not truncated
    assert terminated
    assert rewards[:-1] == [0.0, 0.0]
    outcome = problem.evaluate(infos[-1]["widths"])
    assert rewards[-1] == outcome.reward == infos[-1]["reward"]
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.array([0.0]))


def test_a_policy_that_cannot_be_scored_ends_the_episode_with_its_reason():
    problem = concave(3)[0]
    broken = Problem(problem.groups, problem.budget, lambda widths: float("nan"))
    env = envs.PruningEnv(broken)
    env.reset()
    for _ in problem.groups:
        _, reward, _, _, info = env.step(np.array([0.0]))
    assert "finite" in info["failed"]
    assert np.isfinite(reward)


def test_a_policy_that_cannot_be_scored_is_worth_no_more_than_any_that_can():
    scores = iter([float("nan"), 0.7, float("nan"), 0.9, float("nan")])
    base = small_problem()
    problem = Problem(base.groups, base.budget, lambda _: next(scores), reward=lambda a, costs, budget: a - 1)
    env, rewards = PruningEnv(problem), []
    for action in (-1.0, -0.85, -0.7, -0.55, -0.4):
        env.reset()
        for _ in problem.groups:
            _, reward, _, _, _ = env.step(np.array([action]))
        rewards.append(reward)
    assert rewards == pytest.approx([-1, -0.3, -0.3, -0.1, -0.3])


def test_actions_and_widths_are_inverse():
    for width in range(1, 17):
        assert width_of(action_of(width, 1, 16), 1, 16) == pytest.approx(width)
    assert action_of(4, 4, 4) == 1.0


def test_a_copied_problem_is_the_same_problem():
    problem = small_problem()
    assert copy.deepcopy(problem) is problem
    assert copy.deepcopy({"problem": problem})["problem"] is problem
