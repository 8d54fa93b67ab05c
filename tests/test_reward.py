"""Rewards by hand: the formulas of AMC and MnasNet."""

from __future__ import annotations

import math

import pytest

from amc.budget import Budget, Limit
from amc.catalog import REWARDS
from amc.cost import FunctionCost
from amc.errors import UsageError
from amc.registry import resolve
from amc.reward import NEEDS_LATENCY
from tests.synthetic import group

COSTS = {"flops": math.e**12, "params": math.e**10, "latency": math.e**5 / 1e3}
"""Logarithms of 12, 10, and 5 in microseconds."""


def budget(name: str, limit: float) -> Budget:
    return Budget([group("a", 4)], [Limit(FunctionCost(name, "", lambda widths: 0.1), limit, 1.0)])


def rewarded(name: str, accuracy: float, costs: dict[str, float], limits: Budget) -> float:
    return resolve(REWARDS, name, "--reward")(accuracy, costs, limits)


@pytest.mark.parametrize(
    ("name", "reward"), [("accuracy", 0.75), ("amc_flops", -3.0), ("amc_params", -2.5), ("amc_latency", -1.25)]
)
def test_amcs_is_the_error_times_the_logarithm_of_a_cost(name, reward):
    assert rewarded(name, 0.75, COSTS, budget("flops", 0.5)) == pytest.approx(reward)


def test_mnasnets_trades_accuracy_for_latency_about_the_limit():
    at, twice = ({"latency": ms} for ms in (8.0, 16.0))
    assert rewarded("accuracy_latency", 0.75, at, budget("latency", 8.0)) == pytest.approx(0.75)
    assert rewarded("accuracy_latency", 0.75, twice, budget("latency", 8.0)) == pytest.approx(0.75 * 2**-0.07)
    assert rewarded("accuracy_latency", 0.75, twice, budget("flops", 0.5)) == pytest.approx(0.75 * 16**-0.07)


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_that_needs_a_latency_says_so_and_no_other_does(name):
    costs = {"flops": 9.0, "params": 9.0}
    if name in NEEDS_LATENCY:
        with pytest.raises(UsageError, match="no cost `latency`"):
            rewarded(name, 0.5, costs, budget("flops", 0.5))
    else:
        assert math.isfinite(rewarded(name, 0.5, costs, budget("flops", 0.5)))
