"""Regularized evolution (Real et al., AAAI 2019, algorithm 1): of a few recent policies the best has a child.

A policy dies of age, not of its reward, so that one lucky score does not stay a parent for ever. Mutations move
channels between groups at constant cost.
"""

from __future__ import annotations

import numpy as np

from amc.problem import Problem
from search.strategies.base import fresh
from search.strategies.moves import MovingSampler, Scored, Widths, best, move

SIZE = 0.4


class EvolutionSampler(MovingSampler):
    """A sixth of the trials are alive (8 to 50), and a third of these compete for each child."""

    def follow(self, scored: list[Scored], known: set[Widths], rng: np.random.Generator) -> Widths:
        """A child of the best of a random third of the living."""
        alive = scored[-min(max(self.trials // 6, 8), 50) :]
        contest = rng.choice(len(alive), size=max(len(alive) // 3, 1), replace=False)
        parent = best([alive[i] for i in contest])
        return fresh(known, lambda: move(self.problem, parent.widths, SIZE, rng))


def make(problem: Problem, *, trials: int, seed: int) -> EvolutionSampler:
    """The sampler."""
    return EvolutionSampler(problem, trials=trials, seed=seed)
