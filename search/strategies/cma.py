"""CMA-ES (Hansen, arXiv 1604.00772) over the widths, on the `cmaes` package, its state rebuilt from the study's trials.

Optuna's own sampler keeps the optimizer in the study as a pickle, and whoever can write a study could then run code in
our process. The optimizer's state follows from what it was told, so nothing needs to be kept: each generation of
finished trials is told in their order, and a proposal is drawn with the seed of its trial.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna
from cmaes import CMA
from optuna.trial import FrozenTrial, TrialState

from amc.problem import Problem
from amc.seeding import derive
from search.strategies.base import WidthSampler, stuck, told


class CmaSampler(WidthSampler):
    """CMA-ES in the unit box of the groups that can change, starting from its middle with a sixth of its side."""

    def __init__(self, problem: Problem, *, seed: int = 0) -> None:
        super().__init__(problem)
        self._seed = seed
        self._free = [group for group in problem.groups if group.floor < group.channels]
        self._low = np.array([group.floor - 0.5 for group in self._free])
        self._span = np.array([group.channels + 0.5 for group in self._free]) - self._low
        self._learned: set[int] = set()
        self._generation: list[tuple[np.ndarray, float]] = []
        if self._free:
            dimensions = len(self._free)
            bounds = np.tile([0.0, 1.0], (dimensions, 1))
            self._optimizer = CMA(np.full(dimensions, 0.5), 1 / 6, bounds=bounds, seed=derive(seed))

    def propose(self, study: optuna.Study, trial: FrozenTrial) -> Sequence[float]:
        """Learns from every finished trial that it has not seen, then draws from the current distribution."""
        if stuck(study):
            return self.anywhere(study, np.random.default_rng(derive(self._seed, trial.number)))
        widths = {group.name: float(group.channels) for group in self.problem.groups}
        if self._free:
            for other in told(study):
                if other.number not in self._learned:
                    self._learn(other)
            self._optimizer.reseed_rng(derive(self._seed, trial.number))
            drawn = self._low + self._span * self._optimizer.ask()
            widths |= {group.name: float(width) for group, width in zip(self._free, drawn, strict=True)}
        return list(widths.values())

    def _learn(self, trial: FrozenTrial) -> None:
        self._learned.add(trial.number)
        if trial.state != TrialState.COMPLETE or not set(trial.params) >= {group.name for group in self._free}:
            return
        assert trial.value is not None
        widths = np.array([trial.params[group.name] for group in self._free])
        self._generation.append(((widths - self._low) / self._span, -trial.value))
        if len(self._generation) == self._optimizer.population_size:
            self._optimizer.tell(self._generation)
            self._generation = []


def make(problem: Problem, *, trials: int, seed: int) -> CmaSampler:
    """The sampler."""
    return CmaSampler(problem, seed=seed)
