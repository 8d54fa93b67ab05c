"""Greedy exchange: give one group more or less at constant cost, and stay where that helps.

NetAdapt (Yang et al., ECCV 2018) and AutoSlim (Yu and Huang, arXiv 1903.11728) take cost from a dense network where it
hurts least, and are over when the budget is met. Here every trial is within the budget, so the question is asked on its
surface: one group changes by a factor, all others pay or gain, and the first better policy is the next one's start.
When no group's change helps, the factor shrinks; when the smallest doesn't either, the search is over.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from amc.budget import Budget
from amc.problem import Problem
from search.strategies.base import Exhausted
from search.strategies.moves import MovingSampler, Scored, Widths, best, stages, step

FACTORS = (1.6, 1.25, 1.1)


class GreedySampler(MovingSampler):
    """Coordinate search from the best policy so far, stages before groups, in an order drawn for each such policy."""

    def __init__(self, problem: Problem, *, trials: int = 100, seed: int = 0) -> None:
        super().__init__(problem, trials=trials, seed=seed)
        self._from: tuple[Widths, Budget] | None = None
        self._untried: Iterator[Widths] = iter(())

    def follow(self, scored: list[Scored], known: set[Widths], rng: np.random.Generator) -> Widths:
        """The next exchange from the best policy that nobody has proposed."""
        start = best(scored)
        place = start.widths, self.problem.budget  # a front's trials have budgets of their own
        if place != self._from:
            self._from, self._untried = place, self._exchanges(start)
        for widths in self._untried:
            if widths not in known:
                return widths
        raise Exhausted("no exchange of channels between one group and the others helps")

    def _exchanges(self, start: Scored) -> Iterator[Widths]:
        rng = np.random.default_rng([self.seed, start.number])
        singles = [[i] for i in range(len(start.widths))]
        for factor in FACTORS:
            for members in (stages(self.problem), singles):
                turns = [(part, turn) for part in members for turn in (factor, 1 / factor)]
                for at in rng.permutation(len(turns)):
                    part, turn = turns[at]
                    moved = list(start.widths)
                    for i in part:
                        moved[i] = step(self.problem, moved, i, turn)
                    yield self.problem.admit(moved)


def make(problem: Problem, *, trials: int, seed: int) -> GreedySampler:
    """The sampler."""
    return GreedySampler(problem, trials=trials, seed=seed)
