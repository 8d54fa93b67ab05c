"""Budgets: hard limits on monotone costs, kept by every proposal without a rejection loop.

`max_width` is AMC's action clipping (He et al., ECCV 2018, algorithm 1): the most that the next group may keep when all
later groups go to their floor. `project` makes any policy feasible: scaled down by bisection, then filled up. Both work
on integer widths, so nothing is rounded after it was clipped, and a policy that is said to be within the budget is.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from amc.cost import Cost
from amc.errors import BudgetError
from amc.groups import Group
from amc.registry import suggest

_COUNT = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
_TIME = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_BYTES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
UNITS: dict[str, dict[str, float]] = {
    "flops": _COUNT,
    "params": _COUNT,
    "latency": _TIME,
    "size": _BYTES,
}


@dataclass(frozen=True)
class LimitSpec:
    """A budget as the user wrote it: `flops=0.5` (a fraction of the dense model) or `flops=60M` (absolute)."""

    cost: str
    value: float
    fraction: bool
    text: str


def parse_budget(texts: str | Iterable[str], known: Iterable[str] = UNITS) -> tuple[LimitSpec, ...]:
    """Reads `flops=0.5`, `flops=50%`, `params=300k,latency=8ms`, or several of them.

    Raises:
        BudgetError: what is wrong with which part, and how to write it.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    parts = [part.strip() for text in texts for part in text.split(",")]
    limits = tuple(_parse_limit(part, list(known)) for part in parts)
    names = [limit.cost for limit in limits]
    for name in names:
        if names.count(name) > 1:
            raise BudgetError(f"--budget limits `{name}` {names.count(name)} times; give each cost one limit")
    return limits


def _parse_limit(text: str, known: Sequence[str]) -> LimitSpec:
    name, equals, value = text.partition("=")
    if not equals:
        raise BudgetError(f"--budget {text!r} must be written COST=LIMIT, as in flops=0.5 or params=300k")
    name = name.strip()
    if name not in known:
        raise BudgetError(f"--budget {text}: the cost {name!r} is unknown; {suggest(name, known)}")
    match = re.fullmatch(r"(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*([A-Za-z%]*)", value.strip())
    units = UNITS.get(name, {})
    if not match or (match[2] and match[2] != "%" and match[2] not in units):
        raise BudgetError(
            f"--budget {text}: {value!r} is not a limit; write a fraction of the dense model ({name}=0.5 or {name}=50%)"
            f" or an absolute one with a unit of {', '.join(units) or 'its own'}"
        )
    number = float(match[1])
    if match[2] in ("", "%"):
        fraction = number / 100 if match[2] else number
        if not 0 < fraction <= 1:
            count = f"{match[1]}M" if number < 100 else f"{number / 1000:g}k"
            absolute = {"latency": f"{match[1]}ms", "size": f"{match[1]}MB"}.get(name, count)
            other = f"; for an absolute limit write {name}={absolute}, say, and {name}=50% for a percentage"
            raise BudgetError(f"--budget {text} must be in (0, 1]{other if number else ''}")
        return LimitSpec(name, fraction, True, text)
    if not 0 < number * units[match[2]] < math.inf:
        raise BudgetError(f"--budget {text}: an absolute limit must be above 0")
    return LimitSpec(name, number * units[match[2]], False, text)


@dataclass(frozen=True)
class Limit:
    """The most that a policy may spend of one cost, in the cost's own unit.

    margin: the share of it that policies stay below, where the cost is a prediction that must hold when measured.
    text, share: as the user wrote it, and the fraction of the dense model that it names; None where it is absolute.
    """

    cost: Cost
    value: float
    dense: float
    margin: float = 0.0
    text: str = ""
    share: float | None = None

    @property
    def bound(self) -> float:
        """What policies may spend: the limit less its margin."""
        return self.value * (1 - self.margin)

    def met(self, widths: Sequence[int]) -> bool:
        """Whether a policy is within the limit, its margin left aside."""
        return self.cost(widths) <= self.bound

    @property
    def fraction(self) -> float:
        """The limit as a fraction of the dense model's cost: as it was written, which `value` is rounded down from."""
        if self.share is not None:
            return self.share
        return self.value / self.dense if self.dense else 1.0


class Budget:
    """Limits that hold at once, over the groups of one model.

    A policy is here a sequence of widths in the order of `groups`, every one of them allowed by its group.

    Raises:
        BudgetError: a limit is below what the smallest widths cost; the message names the lowest reachable fraction.
    """

    def __init__(self, groups: Sequence[Group], limits: Sequence[Limit]) -> None:
        self.groups = tuple(groups)
        self.limits = tuple(limits)
        self.floor = tuple(group.floor for group in groups)
        self.dense = tuple(group.channels for group in groups)
        for limit in self.limits:
            self._check_reachable(limit)

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        costs: Mapping[str, Cost],
        specs: Iterable[LimitSpec],
        margins: Mapping[str, float] | None = None,
    ) -> Budget:
        """The budget that `specs` (of `parse_budget`) mean for a model with these groups and costs.

        margins: of predicted costs, by name.
        """
        limits = []
        for spec in specs:
            if spec.cost not in costs:
                raise BudgetError(
                    f"--budget {spec.text}: there is no cost {spec.cost!r} here; {suggest(spec.cost, costs)}"
                )
            cost = costs[spec.cost]
            dense = cost([group.channels for group in groups])
            value = spec.value * dense if spec.fraction else spec.value
            if isinstance(dense, int):
                value = math.floor(value * (1 + 1e-12))  # 0.57 of 100 is 57, not 56.99…
            share = spec.value if spec.fraction else None
            limits.append(Limit(cost, value, dense, (margins or {}).get(spec.cost, 0.0), spec.text, share))
        return cls(groups, limits)

    def __str__(self) -> str:
        values = (f"{x.value:,}" if isinstance(x.value, int) else f"{x.value:,.6g}" for x in self.limits)
        parts = (f"{x.cost.name} at most {v} {x.cost.unit}".rstrip() for v, x in zip(values, self.limits, strict=True))
        return ", ".join(f"{part} ({x.fraction:.3f} of dense)" for part, x in zip(parts, self.limits, strict=True))

    def __repr__(self) -> str:
        return f"Budget({self})"

    def met(self, widths: Sequence[int]) -> bool:
        """Whether the policy is within every limit."""
        return all(limit.met(widths) for limit in self.limits)

    def max_width(self, prefix: Sequence[int], group: int, rest: Sequence[int] | None = None) -> int:
        """The largest width of `groups[group]` that still allows a feasible policy; its floor where none does.

        prefix: the widths of the groups before it. rest: widths of all groups, those of the later ones are taken from
        it (default: the floor). With `rest=dense`, whatever is above uses the budget up without them.
        """
        allowed, later = self.groups[group].widths, (self.floor if rest is None else rest)[group + 1 :]
        low, high = 0, len(allowed) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.met((*prefix, allowed[middle], *later)):
                low = middle
            else:
                high = middle - 1
        return allowed[low]

    def project(self, widths: Sequence[float]) -> tuple[int, ...]:
        """The policy itself where it is feasible; else scaled down, then filled up.

        Scaling multiplies all widths by the largest factor that is feasible. Filling goes round the groups in their
        order, a step each, first towards the proposed widths and then beyond them, until any further step of any group
        would break a limit.
        """
        proposed = tuple(group.snap(width) for group, width in zip(self.groups, widths, strict=True))
        if self.met(proposed):
            return proposed
        return self._grow(self._grow(self._scale(proposed, 1.0), proposed), self.dense)

    def fill(self, widths: Sequence[float]) -> tuple[int, ...]:
        """The policy in the proportions of `widths` that uses the budget up: scaled down or up, then filled."""
        proposed = tuple(group.snap(width) for group, width in zip(self.groups, widths, strict=True))
        if self.met(self.dense):
            return self.dense
        upper = max(dense / width for dense, width in zip(self.dense, proposed, strict=True))
        return self._grow(self._scale(proposed, upper), self.dense)

    def _scale(self, widths: Sequence[int], high: float) -> tuple[int, ...]:
        low, best = 0.0, self.floor
        for _ in range(24):
            factor = (low + high) / 2
            scaled = tuple(g.snap_down(factor * w) for g, w in zip(self.groups, widths, strict=True))
            if self.met(scaled):
                low, best = factor, scaled
            else:
                high = factor
        return best

    def _grow(self, widths: Sequence[int], ceiling: Sequence[int]) -> tuple[int, ...]:
        """Steps up, round and round, until no group below its ceiling can take another."""
        current = list(widths)
        growing = [i for i in range(len(current)) if current[i] < ceiling[i]]
        while growing:
            growing = [i for i in growing if self._step(current, i) and current[i] < ceiling[i]]
        return tuple(current)

    def _step(self, widths: list[int], index: int) -> bool:
        """Takes one step up in place if the budget allows it. Costs are monotone: once refused, always refused."""
        before, allowed = widths[index], self.groups[index].widths
        widths[index] = allowed[bisect_right(allowed, before)]
        if self.met(widths):
            return True
        widths[index] = before
        return False

    def _check_reachable(self, limit: Limit) -> None:
        if limit.met(self.floor):
            return
        lowest = limit.cost(self.floor) / (1 - limit.margin)
        name, fraction = limit.cost.name, math.ceil(lowest / limit.dense * 1000) / 1000
        raise BudgetError(
            f"--budget {limit.text or f'{name}={limit.fraction:.6g}'} can't be reached with what can be pruned here; "
            f"lowest reachable: {name}={fraction:.3f} (that is {lowest:g} {limit.cost.unit} of {limit.dense:g}). "
            "`amc groups` shows what is frozen, and why"
        )
