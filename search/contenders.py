"""Which policies of a search are worth a longer fine-tune, and from which of them it may choose in the end.

The best score of many is the luckiest, so scores are smoothed; and what capacity is worth after a long fine-tune is not
known beforehand, so the contenders are those that few others beat in both score and parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna

from amc.problem import Outcome, Problem
from search.strategies.moves import Scored
from search.strategies.surrogate import Surrogate
from search.study import outcomes

FEWEST = 5
"""Policies from which something can be learned."""
AT_ONCE = 64
"""Policies that the process predicts at once: of memory they take their number times groups times 2,400 bytes."""


def policies(problem: Problem, study: optuna.Study) -> list[Outcome]:
    """The different policies of a study that were scored and are within the budget, in the order of their trials."""
    return [one for one in outcomes(problem, study) if problem.budget.met(problem.widths(one.widths))]


def smoothed(problem: Problem, scored: Sequence[Outcome]) -> np.ndarray:
    """`(policies,)` scores without their noise, as far as a Gaussian process over all of them can tell it."""
    seen = [Scored(i, problem.widths(one.widths), one.score) for i, one in enumerate(scored)]
    if len(seen) < FEWEST:
        return np.array([one.reward for one in seen])
    surrogate, asked = Surrogate(problem, seen), [one.widths for one in seen]
    return np.concatenate([surrogate.predict(asked[i : i + AT_ONCE])[0] for i in range(0, len(asked), AT_ONCE)])


def contenders(rewards: np.ndarray, params: np.ndarray, count: int) -> list[int]:
    """Indices of about a quarter of the policies, or `count`, that fewest others beat in both reward and parameters.

    Pareto fronts are taken off one after the other, each as a whole and from its highest reward to its most parameters,
    until there are enough policies.
    """
    left = np.lexsort((-params, -rewards))
    found: list[int] = []
    while len(left) and len(found) < max(len(rewards) // 4, count, 1):
        most = np.maximum.accumulate(params[left])
        front = np.concatenate([[True], params[left][1:] > most[:-1]])
        found += left[front].tolist()
        left = left[~front]
    return found


def spread(
    problem: Problem, scored: Sequence[Outcome], rewards: np.ndarray, count: int, taken: Sequence[int] = ()
) -> list[int]:
    """Indices of up to `count` further anchors: half of them contenders, where the choice is made, the rest all over.

    The contenders are the best, the one that keeps most parameters, and whoever is farthest from those taken so far, in
    logarithms of the keep ratios.
    """
    if count <= 0:
        return []
    channels = [group.channels for group in problem.groups]
    places = np.log(np.array([problem.widths(one.widths) for one in scored]) / channels)
    params = np.array([one.costs["params"] for one in scored])
    near = np.full(len(scored), np.inf)
    for i in taken:
        near = np.minimum(near, np.square(places - places[i]).sum(axis=1))
    top = contenders(rewards, params, count)
    ends = [i for i in (max(top, key=lambda i: rewards[i]), max(top, key=lambda i: params[i])) if i not in taken]
    top = [i for i in top if i not in taken]
    chosen: list[int] = []
    while len(chosen) < min(count - count // 2, len(top)):
        chosen.append(ends.pop(0) if ends else max(top, key=lambda i: near[i]))
        near = np.minimum(near, np.square(places - places[chosen[-1]]).sum(axis=1))
        ends = [i for i in ends if i not in chosen]
    rest = [int(i) for i in np.argsort(-rewards, kind="stable") if i not in chosen and i not in taken]
    wanted = np.linspace(0, len(rest) - 1, count - len(chosen) + 1)[1:] * 0.75  # the worst are no news
    return list(dict.fromkeys([*chosen, *(rest[int(place)] for place in wanted if rest)]))
