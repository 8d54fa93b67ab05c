"""Bayesian optimization: Optuna's Gaussian process (Matérn 5/2, a length scale a group) in the box of widths."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.samplers import GPSampler
from optuna.trial import FrozenTrial

from amc.problem import Problem
from amc.seeding import one_thread
from search.strategies.base import ProjectedSampler


class OneThreadSampler(ProjectedSampler):
    """Its matrices are small: more threads only make it slower, and its results depend on how many there are."""

    def propose(self, study: optuna.Study, trial: FrozenTrial) -> Sequence[float]:
        """What the Optuna sampler suggests."""
        with one_thread():
            return super().propose(study, trial)


def make(problem: Problem, *, trials: int, seed: int) -> OneThreadSampler:
    """The sampler; its random start-up takes at most a sixth of the trials."""
    startup = min(max(trials // 6, 4), 10)
    return OneThreadSampler(problem, lambda s: GPSampler(n_startup_trials=startup, seed=s), seed)
