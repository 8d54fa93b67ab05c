"""Latency as a cost that a budget can rest on: monotone in every width, and true.

The measured staircase is neither: 31 channels can be slower than 32. So each group's width stands for the wider one
that is cheapest (its channels are free, or nearly), the widths that remain rise in cost, and on these a predictor of
rising features is fitted to the table's own predictions. The cost of a policy is that of its widened policy, which
`widen` returns and which the search should evaluate: it is at least as wide, and its cost is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from amc.groups import Structure
from latency.predict import Predictor, fit_rising
from latency.table import LatencyTable

CONTEXTS = (0.25, 0.5, 0.75, 1.0)
"""Levels of all other groups at which a group's own staircase is looked at."""
POLICIES = 800
FREE = 0.1
"""A channel is free when it costs less than this share of the group's average channel. Groups are many: what each gives
away adds up to this share of all that could be saved."""


@dataclass(frozen=True, eq=False)
class LatencyCost:
    """The cost `latency`, ms, of a model on the table's device.

    dense: the dense model's latency, ms.
    raw: the table's predictor, for any policy, widened or not.
    error: relative error of the rising predictor against the raw one, on widened policies (mean, absolute).
    """

    structure: Structure
    dense: float
    raw: Predictor
    error: float
    _rising: Predictor = field(repr=False)
    _wider: tuple[np.ndarray, ...] = field(repr=False)
    _power: float = 1.0
    name: str = "latency"
    unit: str = "ms"

    @classmethod
    def of(cls, table: LatencyTable, structure: Structure, *, seed: int = 0) -> LatencyCost:
        """The cost of a table that was checked against the structure (`LatencyTable.check`)."""
        raw = table.predictor(structure)
        wider = tuple(_wider(structure, raw, g) for g in range(len(structure.groups)))
        rng = np.random.default_rng(seed)
        levels = rng.uniform(0, 1, (POLICIES, 1)) + rng.uniform(-0.5, 0.5, (POLICIES, len(wider)))
        columns = []
        for g, group in enumerate(structure.groups):
            allowed = np.asarray(group.widths)
            drawn = np.clip(levels[:, g] * len(allowed), 0, len(allowed) - 1).astype(int)
            columns.append(wider[g][allowed[drawn]])
        policies = np.stack(columns, axis=1)
        known = raw(policies)
        usable = known > 0.01
        rising = fit_rising(raw.shapes, policies[usable], known[usable])
        error = float(np.abs(rising(policies[usable]) / known[usable] - 1).mean())
        plain = cls(structure, table.dense_ms, raw, error, rising, wider)
        return cls(structure, table.dense_ms, raw, error, rising, wider, _power(plain, table))

    def __call__(self, widths: Sequence[int] | np.ndarray) -> float:
        """Milliseconds of the widened policy; never falls as a width grows."""
        return self.dense * self.ratio(widths)

    def ratio(self, widths: Sequence[int] | np.ndarray) -> float:
        """The same over the dense model's latency."""
        return self._relative(widths) ** self._power

    def widen(self, widths: Sequence[int] | np.ndarray) -> tuple[int, ...]:
        """The policy with every channel that costs nothing: no width is less, and the cost is the same."""
        return tuple(int(wider[width]) for wider, width in zip(self._wider, widths, strict=True))

    def shares(self) -> np.ndarray:
        """`(groups,)` what is saved when a group alone goes to its floor, as a share of the dense latency."""
        dense = [group.channels for group in self.structure.groups]
        policies = np.array([dense] * len(dense))
        for g, group in enumerate(self.structure.groups):
            policies[g, g] = group.floor
        return np.array([1 - self.ratio(policy) for policy in policies])

    def _relative(self, widths: Sequence[int] | np.ndarray) -> float:
        rows = np.array([self.widen(widths), [group.channels for group in self.structure.groups]])
        policy, dense = self._rising(rows)
        return max(float(policy / dense), 1e-6)


def _wider(structure: Structure, raw: Predictor, group: int) -> np.ndarray:
    """`(channels + 1,)` for each width the wider allowed one that is cheapest, the widest of equals."""
    allowed = structure.groups[group].widths
    rows = []
    for level in CONTEXTS:
        others = [other.snap(max(16, 16 * round(level * other.channels / 16))) for other in structure.groups]
        rows += [[*others[:group], width, *others[group + 1 :]] for width in allowed]
    cost = raw(np.array(rows)).reshape(len(CONTEXTS), len(allowed)).mean(axis=0)
    # Ties are never exact among measured values.
    cost -= FREE * max(cost[-1] - cost.min(), 0.0) * np.asarray(allowed) / allowed[-1]
    best = np.arange(len(allowed))
    for at in range(len(allowed) - 2, -1, -1):
        best[at] = at if cost[at] < cost[best[at + 1]] else best[at + 1]
    widths = np.zeros(structure.groups[group].channels + 1, dtype=int)
    for width in range(len(widths)):
        at = min(int(np.searchsorted(allowed, width)), len(allowed) - 1)
        widths[width] = allowed[best[at]]
    return widths


def _power(cost: LatencyCost, table: LatencyTable) -> float:
    """The exponent that carries predictions to the finalists' measurements: it keeps order, and dense at 1."""
    found = []
    for sample in table.corrections[-5:]:
        predicted = cost.ratio(sample.widths)
        if predicted < 0.98 and sample.ratio < 1:
            found.append(np.log(sample.ratio) / np.log(predicted))
    return float(np.clip(np.median(found), 0.5, 2.0)) if found else 1.0
