"""Bayesian optimization: Optuna's Gaussian process (Matérn 5/2, a length scale a group) in the box of widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import optuna
from optuna.samplers import GPSampler
from optuna.trial import FrozenTrial

from amc.problem import Problem
from amc.seeding import threads
from search.strategies.base import ProjectedSampler


class GPProposals(ProjectedSampler):
    """Optuna's sampler, on one thread: its matrices are small, and its results depend on how many threads there are."""

    def propose(self, study: optuna.Study, trial: FrozenTrial) -> Sequence[float]:
        """What the Optuna sampler suggests."""
        with threads(1):
            return super().propose(cast(optuna.Study, _Others(study, trial)), trial)


class _Others:
    """A study without one trial.

    Optuna's sampler takes every running trial of which it stored a proposal for another worker's, and proposes
    something else: also the very trial that it is asked for, where the process died with half of it stored.
    """

    def __init__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._study, self._number = study, trial.number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(self, *args: Any, **options: Any) -> list[FrozenTrial]:
        return [trial for trial in self._study._get_trials(*args, **options) if trial.number != self._number]


def make(problem: Problem, *, trials: int, seed: int) -> GPProposals:
    """The sampler; its random start-up takes at most a sixth of the trials."""
    startup = min(max(trials // 6, 4), 10)
    return GPProposals(problem, lambda s: GPSampler(n_startup_trials=startup, seed=s), seed)
