"""Simulated annealing (Kirkpatrick et al., Science 1983) over moves of channels between groups at constant cost.

Whether a policy is accepted depends on the run's seed and the trial's number alone (trial n has the n-th draw of one
stream), so the walk is read off the finished trials, whoever proposed them. The temperature is in units of the rewards'
spread over the first trials, since rewards have no unit of their own.
"""

from __future__ import annotations

import numpy as np

from amc.problem import Problem
from search.strategies.base import fresh
from search.strategies.moves import MovingSampler, Scored, Widths, move

HOT, COLD = 0.5, 0.01
WIDE, NARROW = 0.6, 0.15


class AnnealSampler(MovingSampler):
    """Temperature and step size fall geometrically until the last planned trial."""

    def follow(self, scored: list[Scored], known: set[Widths], rng: np.random.Generator) -> Widths:
        """A neighbour of the policy at which the walk stands."""
        spread = max(float(np.std([one.reward for one in scored[:20]])), 1e-9)
        grace = np.random.default_rng([self.seed, 1]).exponential(size=scored[-1].number + 1)
        here = scored[0]
        for one in scored[1:]:
            heat = spread * self._between(HOT, COLD, one.number)
            if one.reward >= here.reward - heat * grace[one.number]:
                here = one
        size = self._between(WIDE, NARROW, scored[-1].number)
        return fresh(known, lambda: move(self.problem, here.widths, size, rng))

    def _between(self, start: float, end: float, number: int) -> float:
        return start * (end / start) ** min(number / max(self.trials, 1), 1.0)


def make(problem: Problem, *, trials: int, seed: int) -> AnnealSampler:
    """The sampler."""
    return AnnealSampler(problem, trials=trials, seed=seed)
