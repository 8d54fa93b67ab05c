"""Numbers as people read them, the same on the terminal and on the page, and how far an accuracy can be trusted."""

from __future__ import annotations

import math
from typing import Any

from amc.catalog import SOFT

UNITS = {"flops": "MACs", "params": "", "size": "B", "memory": "B", "latency": "ms"}
NAMES = {
    "flops": "FLOPs",
    "params": "parameters",
    "size": "file size",
    "memory": "activations at the peak",
    "latency": "latency",
}
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
Z95 = 1.959963984540054
WEAK = 0.5
"""The rank correlation below which the ranking by a score is called weak."""


def name_of(cost: str) -> str:
    """A cost's name in a sentence."""
    return NAMES.get(cost, cost)


def amount(value: float, cost: str) -> str:
    """A cost in its unit, four digits: `20.28 M MACs`, `1.432 ms`."""
    unit = UNITS.get(cost, "")
    if unit == "ms":
        return f"{value:.4g} ms"
    scale, prefix = next(((s, p) for s, p in PREFIXES if abs(value) >= s), (1.0, ""))
    return f"{value / scale:.4g} {prefix}{' ' if prefix and unit == 'MACs' else ''}{unit}".strip()


def metric_name(metric: Any) -> str:
    """What a metric is called: `accuracy` where there is none of the user's own, else the name of its function."""
    if metric is None:
        return "accuracy"
    name = getattr(getattr(metric, "func", metric), "__name__", type(metric).__name__)
    return "metric" if name == "<lambda>" else str(name)


def maximized(reward: str, metric: str, front: bool = False) -> str:
    """What the search maximizes, in words: what `--reward` names, or `--pareto` (`search.front`).

    A metric of the user's own stands for the accuracy, the soft one, too.
    """
    if front:
        return "gain over uniform"
    if reward == "accuracy" or (reward == SOFT and metric != "accuracy"):
        return metric
    return "soft accuracy" if reward == SOFT else "reward"


def accuracy_text(value: float) -> str:
    """`93.06 %`; a metric beyond [0, 1] as it is."""
    return f"{100 * value:.2f} %" if 0 <= value <= 1 else f"{value:.4g}"


def worth_text(value: float, metric: str) -> str:
    """An accuracy in percent; a metric of the user's own as it is, since only they know what it is a share of."""
    return accuracy_text(value) if metric == "accuracy" else f"{value:.4g}"


def difference_text(value: float, other: float, metric: str = "accuracy") -> str:
    """How much `value` is above `other`: `+0.42 points`, of another metric or beyond [0, 1] the plain difference."""
    shares = metric == "accuracy" and 0 <= value <= 1 and 0 <= other <= 1
    text = f"{100 * (value - other):+.2f} points" if shares else f"{value - other:+.4g}"
    return text.replace("-", "−", 1) if value < other else text


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def wilson(share: float, examples: int) -> tuple[float, float]:
    """The 95 % score interval of a share of so many examples (Wilson, 1927), which holds near 0 and 1 too."""
    spread = Z95 * Z95 / examples
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / examples + spread / (4 * examples))
    return max(centre - half, 0.0), min(centre + half, 1.0)
