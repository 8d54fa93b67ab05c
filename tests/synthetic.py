"""Problems without a network whose optimum is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from amc.budget import Budget, Limit
from amc.cost import FunctionCost
from amc.groups import Group, Layer
from amc.problem import Problem


def group(name: str, channels: int, floor: int = 1, **layer: int) -> Group:
    return Group(name, channels, tuple(range(floor, channels + 1)), layer=Layer(name, "conv", outputs=channels, **layer))


def concave(groups: int = 20, *, limit: float = 0.5, seed: int = 0) -> tuple[Problem, float]:
    """Accuracy is a weighted sum of sqrt(keep ratio), cost a weighted sum of keep ratios; and the best accuracy.

    With accuracy sum_i v_i sqrt(x_i) and cost sum_i c_i x_i = b the optimum is x_i ~ (v_i / c_i)^2, cut off at 1
    (Lagrange), so it is known without a search.
    """
    rng = np.random.default_rng(seed)
    value, weight = rng.dirichlet(np.full(groups, 1.0)), rng.dirichlet(np.full(groups, 2.0))
    members = [group(f"layer{i:02d}", 64, inputs=int(rng.integers(8, 64))) for i in range(groups)]
    cost = FunctionCost("flops", "MAC", lambda widths: float(weight @ (np.asarray(widths) / 64)) * 1e6)

    def accuracy(ratios: Sequence[float] | np.ndarray) -> float:
        return float(value @ np.sqrt(ratios))

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        ratios = np.minimum((middle * value / weight) ** 2, 1.0)
        low, high = (middle, high) if weight @ ratios < limit else (low, middle)
    best = accuracy(np.minimum((low * value / weight) ** 2, 1.0))
    budget = Budget(members, [Limit(cost, limit * 1e6, 1e6)])
    return Problem(members, budget, lambda w: accuracy([w[g.name] / 64 for g in members]), costs={"flops": cost}), best
