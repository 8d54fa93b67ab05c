"""Tilts, moves, curves and guesses: what each strategy of ours promises beside what all promise."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import optuna
import pytest

from amc.budget import Budget, Limit
from amc.cost import FunctionCost
from amc.problem import Problem
from amc.reward import amc_flops
from search.strategies import STRATEGIES, make_sampler
from search.strategies.anneal import AnnealSampler
from search.strategies.auto import improvement
from search.strategies.moves import Scored, best, exchange, move, spending, stages, starts, step, tilted
from search.strategies.sensitivity import knapsack
from search.strategies.surrogate import Surrogate
from search.study import SearchResult, open_study, search
from tests.synthetic import concave, group, staged

MOVING = ("auto", "evolution", "anneal", "greedy", "sensitivity")


def run(name: str, problem: Problem, *, trials: int, seed: int = 0) -> tuple[SearchResult, optuna.Study]:
    study = open_study(None, "test", make_sampler(name, problem, trials=trials, seed=seed))
    return search(problem, study, trials=trials, seed=seed), study


# ---- problems


def test_the_planted_optimum_is_on_the_limit_and_nothing_feasible_near_it_is_better():
    for seed in range(3):
        problem, top = staged(2, seed=seed)
        rng = np.random.default_rng(seed)
        found = run("sensitivity", problem, trials=60, seed=seed)[0].best
        assert top - 0.02 < found.accuracy <= top
        assert problem.budget.limits[0].value * 0.98 <= found.costs["flops"] <= problem.budget.limits[0].value
        for _ in range(300):
            policy = move(problem, problem.widths(found.widths), 0.5, rng)
            assert problem.evaluate(policy).accuracy <= top


def test_noise_is_the_same_whenever_a_policy_is_scored():
    (clean, _), (noisy, _), (again, _) = (staged(2, noise=n) for n in (0.0, 0.01, 0.01))
    policy = starts(clean)[0]
    assert noisy.evaluate(policy).accuracy == again.evaluate(policy).accuracy != clean.evaluate(policy).accuracy


# ---- small spaces


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["random", "tpe", "nsga2", "gp", "cmaes", "evolution", "anneal"])
def test_where_there_are_few_policies_all_of_them_are_proposed(name, seed):
    members = [replace(group(f"layer{i}", 16), widths=(4, 8, 12, 16)) for i in range(3)]
    cost = FunctionCost("flops", "MAC", lambda widths: float(sum(widths)))
    budget = Budget(members, [Limit(cost, 28, 48)])
    problem = Problem(members, budget, lambda w: w["layer1"] / 16, costs={"flops": cost})
    policies = {problem.admit(widths) for widths in itertools.product((4, 8, 12, 16), repeat=3)}
    assert run(name, problem, trials=len(policies), seed=seed)[0].trials == len(policies) == 12


# ---- starts and moves


def test_stages_go_by_output_positions_and_thirds_stand_in_where_all_are_equal():
    assert stages(staged(2)[0]) == [[0, 1], [2, 3], [4, 5]]
    assert stages(concave(7)[0]) == [[0, 1, 2], [3, 4], [5, 6]]
    assert stages(concave(1)[0]) == [[0]]


@pytest.mark.parametrize("growth", [1.5, 3.0])
def test_tilted_stages_keep_shares_of_cost_that_grow_by_the_factor(growth):
    problem, _ = staged(4, limit=0.3)
    spent, policy, dense = spending(problem), tilted(problem, growth), problem.budget.dense

    def share(part: list[int]) -> float:
        def alone(widths: tuple[int, ...]) -> float:
            return spent([widths[i] if i in part else dense[i] for i in range(len(dense))])

        bottom = alone(problem.budget.floor)
        return (alone(policy) - bottom) / (spent(dense) - bottom)

    shares = [share(part) for part in stages(problem)]
    assert shares[1] / shares[0] == pytest.approx(growth, rel=0.2)  # whole channels of sixteen
    assert shares[2] == pytest.approx(min(shares[1] * growth, 1.0), rel=0.2)


def test_starts_are_within_the_budget_uniform_first_and_each_once():
    problem, _ = staged(3)
    policies = starts(problem)
    assert policies[0] == problem.budget.project(problem.budget.dense)
    assert len(set(policies)) == len(policies) == 5
    assert all(problem.budget.met(policy) for policy in policies)


def test_what_a_policy_spends_is_of_what_the_margin_leaves():
    groups = [group("a", 8), group("b", 8)]
    first, both = (FunctionCost(name, "", cost) for name, cost in (("first", lambda w: w[0]), ("both", sum)))
    budget = Budget(groups, [Limit(first, 8, 8, margin=0.5), Limit(both, 12, 16)])
    spent = spending(Problem(groups, budget, lambda _: 0.0))
    assert [spent(widths) for widths in ((4, 2), (4, 8), (6, 3))] == [1.0, 1.0, 1.5]


def test_moves_change_the_policy_keep_the_budget_and_use_it_up():
    problem, _ = staged(4)
    policy, spent, rng = starts(problem)[2], spending(problem), np.random.default_rng(0)
    moved = [move(problem, policy, 0.4, rng) for _ in range(200)]
    assert len(set(moved)) > 150
    assert sum(widths == policy for widths in moved) < 10
    assert all(0.97 < spent(widths) <= 1 for widths in moved)
    grown = np.mean([np.asarray(widths) > policy for widths in moved], axis=0)
    shrunk = np.mean([np.asarray(widths) < policy for widths in moved], axis=0)
    assert (grown > 0.05).all()
    assert (shrunk > 0.05).all()


def test_an_exchange_can_leave_cost_unspent_for_rewards_that_want_it():
    problem, _ = staged(4)
    rng, policy, spent_by = np.random.default_rng(0), starts(problem)[0], spending(problem)
    spent = [spent_by(exchange(problem, policy, 0.6, rng)) for _ in range(100)]
    assert min(spent) < 0.9


def test_a_step_goes_at_least_to_the_next_allowed_width_and_stays_in_range():
    problem = Problem([group("a", 8), group("b", 8)], Budget([group("a", 8), group("b", 8)], ()), lambda _: 0.0)
    assert [step(problem, (4, 1), 0, f) for f in (1.05, 0.95, 2.0, 100.0)] == [5, 3, 8, 8]
    assert [step(problem, (4, 1), 1, f) for f in (0.5, 1.1)] == [1, 2]


# ---- strategies


@pytest.mark.parametrize("name", MOVING)
def test_starts_come_first_and_a_known_policy_is_not_proposed_again(name):
    problem, _ = staged(2)
    _, study = run(name, problem, trials=25)
    proposed = [problem.widths(trial.params) for trial in study.trials if trial.params]
    assert proposed[:5] == starts(problem)
    assert len(set(proposed)) == len(proposed)


@pytest.mark.parametrize("seed", range(3))
def test_auto_does_not_repeat_itself_where_few_widths_are_allowed(seed):
    members = [replace(group(f"g{i}", 64, positions=4**i), widths=tuple(range(8, 65, 8))) for i in range(3)]
    cost = FunctionCost("flops", "MAC", lambda widths: int(sum(widths)))
    worth = np.random.default_rng(seed).dirichlet(np.ones(3))
    problem = Problem(
        members,
        Budget(members, [Limit(cost, 96, 192)]),
        lambda widths: float(worth @ np.sqrt([widths[member.name] / 64 for member in members])),
        costs={"flops": cost},
        reward=amc_flops,
    )
    result, study = run("auto", problem, trials=40, seed=seed)
    assert result.trials == 40
    assert len(study.trials) < 45


@pytest.mark.parametrize("name", MOVING)
def test_a_trial_that_is_evaluated_elsewhere_is_not_proposed_again(name):
    problem, _ = staged(2)
    study = open_study(None, "test", make_sampler(name, problem, trials=40, seed=0))
    search(problem, study, trials=12)
    asked = []
    for _ in range(4):
        trial = study.ask()
        asked.append(tuple(trial.suggest_int(g.name, g.floor, g.channels) for g in problem.groups))
    assert len(set(asked)) == 4


@pytest.mark.parametrize("name", MOVING)
def test_failed_trials_are_lived_with_even_where_all_starts_fail(name):
    problem, _ = staged(2)
    bad, evaluate = set(starts(problem)), problem._evaluate

    def sometimes(policy: dict[str, int]) -> float:
        if problem.widths(policy) in bad:
            raise ArithmeticError("diverged")
        return evaluate(policy)

    other = Problem(problem.groups, problem.budget, sometimes)
    result, _ = run(name, other, trials=20)
    assert (result.trials, result.failed) == (15, 5)
    assert result.best is not None


def test_auto_turns_away_from_where_policies_fail():
    """They do where the reward would grow, so that nothing but the failures speaks against going there."""
    members = [group(f"layer{i}", 16) for i in range(4)]
    cost = FunctionCost("flops", "MAC", lambda widths: float(sum(widths)))

    def evaluate(policy: dict[str, int]) -> float:
        if policy["layer0"] > 8:
            raise ArithmeticError("diverged")
        return float(np.sqrt(policy["layer1"] / 16) + 0.3 * np.sqrt(policy["layer0"] / 16))

    problem = Problem(members, Budget(members, [Limit(cost, 32, 64)]), evaluate, costs={"flops": cost})
    result, _ = run("auto", problem, trials=30)
    assert result.trials > result.failed


@pytest.mark.parametrize("name", ["tilt", *MOVING])
def test_a_single_group_and_a_dense_budget_end_the_search(name):
    single, _ = concave(1)
    assert run(name, single, trials=100)[0].trials >= 1
    free = Problem(single.groups, Budget(single.groups, ()), lambda widths: 0.5)
    assert run(name, free, trials=100)[0].best.widths == {"layer00": 64}


@pytest.mark.parametrize("name", MOVING)
def test_channels_move_to_where_they_are_worth_more_than_uniform_and_tilts_can_say(name):
    gains = []
    for seed in range(3):
        problem, _ = staged(3, seed=seed)
        start = max(problem.evaluate(policy).accuracy for policy in starts(problem))
        gains.append(run(name, problem, trials=50, seed=seed)[0].best.accuracy - start)
    assert min(gains) > 0.002, gains


def test_auto_beats_random_on_every_problem():
    for kind in (concave, staged):
        lost: dict[str, list[float]] = {"random": [], "auto": []}
        for seed in range(2):
            for name, losses in lost.items():
                problem, top = kind(6, seed=seed)
                losses.append(top - run(name, problem, trials=30, seed=seed)[0].best.accuracy)
        assert np.mean(lost["auto"]) < np.mean(lost["random"]), (kind, lost)


def test_annealing_stands_where_it_accepted_whoever_proposed():
    problem, _ = staged(2)
    policies = starts(problem)
    sampler = AnnealSampler(problem, trials=10, seed=0)
    rewards = (0.5, 0.9, 0.1, 0.1)
    scored = [Scored(n, w, r) for (n, w), r in zip(enumerate(policies), rewards, strict=False)]
    cold = [one._replace(number=one.number + 1000) for one in scored]
    with pytest.MonkeyPatch.context() as patch:
        stood: list[tuple[int, ...]] = []
        patch.setattr("search.strategies.anneal.move", lambda p, widths, size, rng: stood.append(widths) or widths)
        sampler.follow(cold, set(), np.random.default_rng(0))
    assert stood == [policies[1]]  # cold: nothing worse is accepted


# ---- curves and guesses


def test_the_knapsack_is_exact():
    rng = np.random.default_rng(0)
    for _ in range(30):
        values = [rng.normal(size=4) for _ in range(5)]
        costs = [np.array([0, *rng.integers(0, 12, 3)]) for _ in range(5)]
        capacity = int(rng.integers(0, 40))
        picked = knapsack(values, costs, capacity)
        assert sum(cost[at] for cost, at in zip(costs, picked, strict=True)) <= capacity
        most = max(
            sum(value[at] for value, at in zip(values, picks, strict=True))
            for picks in itertools.product(range(4), repeat=5)
            if sum(cost[at] for cost, at in zip(costs, picks, strict=True)) <= capacity
        )
        assert sum(value[at] for value, at in zip(values, picked, strict=True)) == pytest.approx(most)


def test_the_surrogate_ranks_policies_that_it_has_not_seen_and_is_surest_where_it_has():
    problem, _ = staged(3)
    rng = np.random.default_rng(0)
    policies = [move(problem, start, 0.8, rng) for start in starts(problem) for _ in range(24)]
    policies = list(dict.fromkeys(policies))
    rng.shuffle(policies)
    scored = [Scored(n, tuple(w), problem.evaluate(tuple(w)).reward) for n, w in enumerate(policies)]
    seen, unseen = scored[:60], scored[60:]
    surrogate = Surrogate(problem, seen)
    mean, deviation = surrogate.predict([one.widths for one in unseen])
    assert np.corrcoef(mean, [one.reward for one in unseen])[0, 1] > 0.9
    fitted, known = surrogate.predict([one.widths for one in seen])
    assert np.mean(known) < np.mean(deviation)
    assert fitted[seen.index(best(seen))] == pytest.approx(best(seen).reward, abs=0.02)


def test_a_policy_that_collapsed_does_not_flatten_all_others():
    problem, _ = staged(2)
    rewards = [0.5, 0.52, 0.51, 0.53, -1e9]
    scored = [Scored(n, w, r) for n, (w, r) in enumerate(zip(starts(problem), rewards, strict=True))]
    assert Surrogate(problem, scored).spread < 0.1


def test_where_most_policies_are_as_good_as_the_best_the_others_are_still_known_to_be_bad():
    """As on data that most policies classify without a mistake."""
    problem, _ = staged(2)
    rewards = [1.0, 1.0, 1.0, 0.8, 0.6]
    scored = [Scored(n, w, r) for n, (w, r) in enumerate(zip(starts(problem), rewards, strict=True))]
    assert Surrogate(problem, scored).predict([one.widths for one in scored])[0] == pytest.approx(rewards, abs=0.05)


def test_expected_improvement_by_hand():
    mean, deviation = np.array([0.7, 0.5, 1.5]), np.array([1.0, 1e-9, 1e-9])
    assert improvement(mean, deviation, 0.7) == pytest.approx([1 / np.sqrt(2 * np.pi), 0.0, 0.8])


def test_greedy_goes_on_from_a_better_policy():
    problem, _ = staged(2)
    first, second, *_ = starts(problem)
    sampler, rng = make_sampler("greedy", problem, trials=40, seed=0), np.random.default_rng(0)
    for scored, at in (([Scored(0, first, 0.5)], first), ([Scored(0, first, 0.5), Scored(1, second, 0.6)], second)):
        proposal = sampler.follow(scored, set(), rng)
        assert proposal in set(sampler._exchanges(scored[-1]))
        assert sampler._from[0] == at


def test_the_registry_holds_every_strategy_of_ours():
    assert {*MOVING, "tilt", "gp"} <= STRATEGIES.keys()
