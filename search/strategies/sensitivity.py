"""Sensitivity curves, then the best policy on them: a multiple-choice knapsack, solved by dynamic programming.

SPDY (Frantar and Alistarh, ICML 2022, section 3.1) and HALP (Shen et al., NeurIPS 2022) give every layer a curve of
what each of its sizes is worth, and pick the sizes of the largest sum that the budget allows. Here the curves are
measured at the budget, where they count: every group is once grown and once shrunk from the uniform policy while the
others pay, and a surrogate tells the group's part from theirs. The policy picked is scored, the surrogate learns from
it, and curves and costs are taken anew round the best policy so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from amc.problem import Problem
from search.strategies.base import Exhausted
from search.strategies.moves import MovingSampler, Scored, Widths, best, spending, step
from search.strategies.surrogate import Surrogate

PROBE = 2.0
REACH = (2.0, 1.5, 1.25, 1.1)
MOST_OPTIONS = 17
RESOLUTION = 10_000


class SensitivitySampler(MovingSampler):
    """Two probes a group, then one knapsack a trial."""

    def __init__(self, problem: Problem, *, trials: int = 100, seed: int = 0) -> None:
        super().__init__(problem, trials=trials, seed=seed)
        uniform = self._starts[0]
        order = np.random.default_rng(seed).permutation(2 * len(uniform)).tolist()
        turns = [(at // 2, PROBE if at % 2 else 1 / PROBE) for at in order]
        moved = [(*uniform[:i], step(problem, uniform, i, turn), *uniform[i + 1 :]) for i, turn in turns]
        self._starts = list(dict.fromkeys([*self._starts, *map(problem.admit, moved)]))

    def follow(self, scored: list[Scored], known: set[Widths], rng: np.random.Generator) -> Widths:
        """The policy of the largest sum, within reach of the best one so far."""
        surrogate, here = Surrogate(self.problem, scored), best(scored).widths
        for reach in REACH:
            widths = self.problem.admit(self._picked(surrogate, here, reach))
            if widths not in known:
                return widths
        raise Exhausted("the best policy of the sensitivity curves has been scored, and so have those nearer by")

    def _picked(self, surrogate: Surrogate, here: Widths, reach: float) -> Widths:
        """The best policy for curves and costs linearised at `here`, each width within a factor of it."""
        spent, options, values, costs = spending(self.problem), [], [], []
        for i, group in enumerate(self.problem.groups):
            near = [w for w in group.widths if here[i] / reach <= w <= here[i] * reach]
            near = [near[at] for at in np.unique(np.linspace(0, len(near) - 1, MOST_OPTIONS).round().astype(int))]
            alone = [(*here[:i], width, *here[i + 1 :]) for width in sorted({*near, here[i]})]
            options.append([widths[i] for widths in alone])
            values.append(surrogate.predict(alone)[0])
            costs.append(np.array([spent(widths) for widths in alone]))
        left = 1 - spent(here) + sum(spent(here) - cost[0] for cost in costs)  # with every group at its narrowest
        whole = [np.ceil((cost - cost[0]) / max(left, 1e-12) * RESOLUTION - 1e-6).astype(int) for cost in costs]
        picked = knapsack(values, whole, RESOLUTION)
        return tuple(option[at] for option, at in zip(options, picked, strict=True))


def knapsack(values: Sequence[np.ndarray], costs: Sequence[np.ndarray], capacity: int) -> list[int]:
    """One option of each item so that the sum of values is largest and that of costs at most `capacity`.

    values, costs: of each item, `(options,)`; costs are integers and the first of each is 0. Exact.
    """
    best = np.zeros(capacity + 1)  # the largest sum so far that costs at most so much
    picks = []
    for value, cost in zip(values, costs, strict=True):
        sums = np.full((len(value), capacity + 1), -np.inf)
        for option, (worth, price) in enumerate(zip(value, cost, strict=True)):
            if price <= capacity:
                sums[option, price:] = best[: capacity + 1 - price] + worth
        picks.append(sums.argmax(axis=0))
        best = sums.max(axis=0)
    chosen, left = [], capacity
    for pick, cost in zip(reversed(picks), reversed(costs), strict=True):
        chosen.append(int(pick[left]))
        left -= int(cost[chosen[-1]])
    return chosen[::-1]


def make(problem: Problem, *, trials: int, seed: int) -> SensitivitySampler:
    """The sampler."""
    return SensitivitySampler(problem, trials=trials, seed=seed)
