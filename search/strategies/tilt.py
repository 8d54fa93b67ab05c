"""Tilted policies: the kept cost of a stage grows by a factor from stage to stage, 1 to 4.

The simplest prior that beats uniform: published winners keep little of the early stages and much of the late ones (of
ResNet-50's FLOPs AutoSlim keeps 0.14, 0.27, 0.53 and 0.97; Yu and Huang, arXiv 1903.11728).
"""

from __future__ import annotations

import numpy as np

from amc.problem import Problem
from search.strategies.base import Exhausted
from search.strategies.moves import TILTS, MovingSampler, Scored, Widths


class TiltSampler(MovingSampler):
    """The uniform policy (factor 1) and the tilted ones; nothing after."""

    def follow(self, scored: list[Scored], known: set[Widths], rng: np.random.Generator) -> Widths:
        """Nothing."""
        raise Exhausted(f"there are no tilts but 1, {', '.join(f'{growth:g}' for growth in TILTS)}")


def make(problem: Problem, *, trials: int, seed: int) -> TiltSampler:
    """The sampler."""
    return TiltSampler(problem, trials=trials, seed=seed)
