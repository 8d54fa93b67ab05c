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

CONTEXTS = tuple((level, block) for block in (8, 16) for level in (0.25, 0.5, 0.75, 1.0))
"""Keep ratios of all other groups at which a group's own staircase is looked at, and what their widths are multiples
of: 8 of 16 channels can cost next to what 16 do where the next layer has 16, and half of it where that has 8."""
DEAR = 0.2
"""Nor may free channels cost more than this share of what all of the group's do, whatever the others' widths."""
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
    def of(
        cls,
        table: LatencyTable,
        structure: Structure,
        *,
        seed: int = 0,
        wider: tuple[np.ndarray, ...] | None = None,
    ) -> LatencyCost:
        """The cost of a table that was checked against the structure (`LatencyTable.check`).

        wider: of each group, `(channels + 1,)` the wider width that stands for each; found here unless given.
        """
        raw = table.predictor(structure)
        wider = wider or tuple(_wider(structure, raw, g) for g in range(len(structure.groups)))
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

    def corrected(self, table: LatencyTable) -> LatencyCost:
        """The cost of the same table with more corrections; widths that were free stay so: finalists rest on them."""
        return self.of(table, self.structure, wider=self._wider)

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
    for level, block in CONTEXTS:
        others = [other.snap(max(block, block * round(level * other.channels / block))) for other in structure.groups]
        rows += [[*others[:group], width, *others[group + 1 :]] for width in allowed]
    cost = raw(np.array(rows)).reshape(len(CONTEXTS), len(allowed))
    span = np.maximum(cost[:, -1] - cost.min(axis=1), 0.0)
    mean = cost.mean(axis=0) - FREE * span.mean() * np.asarray(allowed) / allowed[-1]  # ties are never exact
    best = np.arange(len(allowed))
    for at in range(len(allowed) - 2, -1, -1):
        wide = best[at + 1]
        pays = mean[at] < mean[wide] or (cost[:, wide] - cost[:, at] > DEAR * span).any()
        best[at] = at if pays else wide
    widths = np.zeros(structure.groups[group].channels + 1, dtype=int)
    for width in range(len(widths)):
        at = min(int(np.searchsorted(allowed, width)), len(allowed) - 1)
        widths[width] = allowed[best[at]]
    return widths


def _power(cost: LatencyCost, table: LatencyTable) -> float:
    """The exponent that carries predictions to the finalists' measurements: it keeps order, and dense at 1.

    Only those count whose cost is their own, not that of a wider policy.
    """
    found = []
    for sample in [one for one in table.corrections if cost.widen(one.widths) == tuple(one.widths)][-5:]:
        predicted = cost.ratio(sample.widths)
        if predicted < 0.98 and sample.ratio < 1:
            found.append(np.log(sample.ratio) / np.log(predicted))
    return float(np.clip(np.median(found), 0.5, 2.0)) if found else 1.0
