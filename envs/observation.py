"""What the agent sees of a layer: AMC's eleven features (He et al., ECCV 2018, section 3.1), from what was executed.

Published implementations compute some of these from the actions asked for, or from layers already decided. Here every
feature follows from the widths executed so far and from the problem's cost function, so coupled layers are counted
right, and each is scaled to [0, 1] by its largest value in the network (channels, positions and kernels on a log scale,
since they double from stage to stage).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from amc.budget import Limit
from amc.problem import Problem

FEATURES = (
    "index",
    "kind",
    "outputs",
    "inputs",
    "positions",
    "stride",
    "kernel",
    "cost",
    "reduced",
    "rest",
    "last_action",
)
LATENCY_FEATURES = ("latency", "latency_left")
"""What a latency budget adds (AOWS and MnasNet let the agent see the device; AMC doesn't)."""
KINDS = ("other", "conv", "depthwise", "linear")


class Observer:
    """Computes observations of one problem; it holds what does not change from step to step."""

    def __init__(self, problem: Problem) -> None:
        self._groups = problem.groups
        self._floor, self._full = problem.budget.floor, problem.budget.dense
        self._cost = problem.costs.get("flops") or next(iter(problem.costs.values()), None)
        self._dense = self._spent(self._full)
        self._fixed = np.stack([self._static(i) for i in range(len(self._groups))])
        self._fixed[:, 2:7] = _log_scaled(self._fixed[:, 2:7])
        self._latency = next((limit for limit in problem.budget.limits if limit.cost.name == "latency"), None)
        self.features = FEATURES + (LATENCY_FEATURES if self._latency else ())

    def observe(self, executed: Sequence[int]) -> np.ndarray:
        """`(features,)` float32 in [0, 1]: the state before group `len(executed)` is decided (at the end, the last)."""
        now = min(len(executed), len(self._groups) - 1)
        decided = tuple(executed)
        undecided = self._spent(decided + self._full[len(decided) :])
        later_dense = decided + self._full[len(decided) : now + 1] + self._full[now + 1 :]
        later_least = decided + self._full[len(decided) : now + 1] + self._floor[now + 1 :]
        last = decided[-1] / self._groups[len(decided) - 1].channels if decided else 1.0
        state = self._fixed[now].copy()
        state[8] = 1 - undecided / self._dense
        state[9] = (self._spent(later_dense) - self._spent(later_least)) / self._dense
        state[10] = last
        if self._latency:
            state = np.append(state, self._latency_state(self._latency, decided, now))
        return np.clip(state, 0.0, 1.0).astype(np.float32)

    def _latency_state(self, limit: Limit, decided: tuple[int, ...], now: int) -> tuple[float, float]:
        alone = (*self._full[:now], self._floor[now], *self._full[now + 1 :])
        least = limit.cost(decided + self._floor[len(decided) :])
        return 1 - limit.cost(alone) / limit.dense, 1 - least / limit.bound

    def _static(self, index: int) -> np.ndarray:
        layer = self._groups[index].layer
        alone = (*self._full[:index], self._floor[index], *self._full[index + 1 :])
        kind = KINDS.index(layer.kind) if layer.kind in KINDS else 0
        sizes = (layer.outputs, layer.inputs, layer.positions, layer.stride, layer.kernel)
        share = 1 - self._spent(alone) / self._dense
        count = max(len(self._groups) - 1, 1)
        return np.array([index / count, kind / (len(KINDS) - 1), *sizes, share, 0.0, 0.0, 0.0])

    def _spent(self, widths: Sequence[int]) -> float:
        return float(self._cost(widths)) if self._cost else 1.0


def _log_scaled(values: np.ndarray) -> np.ndarray:
    """Columns as log2 over the log2 of their largest value (0 where all are 1)."""
    logs = np.log2(np.maximum(values, 1.0))
    return logs / np.maximum(logs.max(axis=0), 1e-9)
