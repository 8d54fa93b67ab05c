"""Rewards: one number to maximize, from a policy's score and costs.

With a hard budget the score alone is enough: the mean probability of the right class (`soft_accuracy`, see
`amc.evaluate.grade`), or the accuracy, as for all other rewards. AMC's `-error * log(FLOPs)` (He et al., ECCV 2018,
section 3.4) and MnasNet's `accuracy * (latency / limit)^w` (Tan et al., CVPR 2019, equation 2) trade accuracy for a
cost as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from amc.budget import Budget
from amc.errors import UsageError

Reward = Callable[[float, Mapping[str, float], Budget], float]

MNASNET_EXPONENT = -0.07

NEEDS_LATENCY = frozenset({"amc_latency", "accuracy_latency"})


def alone(score: float, costs: Mapping[str, float], budget: Budget) -> float:
    """The score alone."""
    return score


def amc_flops(accuracy: float, costs: Mapping[str, float], budget: Budget) -> float:
    """`-(1 - accuracy) * log(FLOPs)`."""
    return -(1 - accuracy) * math.log(costs["flops"])


def amc_params(accuracy: float, costs: Mapping[str, float], budget: Budget) -> float:
    """`-(1 - accuracy) * log(parameters)`."""
    return -(1 - accuracy) * math.log(costs["params"])


def amc_latency(accuracy: float, costs: Mapping[str, float], budget: Budget) -> float:
    """`-(1 - accuracy) * log(latency)`, the latency in microseconds so that the logarithm stays positive."""
    return -(1 - accuracy) * math.log(1e3 * _latency(costs))


def accuracy_latency(accuracy: float, costs: Mapping[str, float], budget: Budget) -> float:
    """`accuracy * (latency / limit)^w`: the limit is the latency budget, or 1 ms (a constant factor) without one."""
    limit = next((limit.value for limit in budget.limits if limit.cost.name == "latency"), 1.0)
    return accuracy * (_latency(costs) / limit) ** MNASNET_EXPONENT


def _latency(costs: Mapping[str, float]) -> float:
    if "latency" not in costs:
        raise UsageError("this reward needs the latency of each policy; the problem has no cost `latency`")
    return costs["latency"]
