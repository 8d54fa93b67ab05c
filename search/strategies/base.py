"""What all strategies share: one static search space of widths, and proposals that are admitted before they are stored.

An Optuna sampler proposes in a box of integers. The wrapper turns each proposal into the policy that is evaluated
*inside* `sample_relative`, so the stored parameters are the evaluated widths, and samplers learn from those. A sampler
is made anew for each proposal from the run's seed and the trial's number: all it knows is in the storage, so a resumed
study proposes what an unbroken one would, and two processes on one study don't propose the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from amc.problem import Problem
from amc.seeding import derive

TOLD = (TrialState.COMPLETE, TrialState.FAIL)
STUCK = 10
"""So many known policies in a row, and a strategy gives way to random ones until one is new."""
MOST_TRIES = 30


class Exhausted(Exception):
    """The strategy has nothing more to propose."""


def search_space(problem: Problem) -> dict[str, IntDistribution]:
    """One integer a group, its width. Widths that a group doesn't allow are never proposed."""
    return {group.name: IntDistribution(group.floor, group.channels) for group in problem.groups}


def told(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that ended, in the order of their numbers."""
    return study.get_trials(deepcopy=False, states=TOLD)


class WidthSampler(BaseSampler):
    """A sampler that proposes whole policies; a subclass says which, in `propose`."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def propose(self, study: optuna.Study, trial: FrozenTrial) -> Sequence[float]:
        """Widths in the groups' order, not necessarily allowed ones."""
        raise NotImplementedError

    def policy(self, trial: FrozenTrial) -> tuple[int, ...] | None:
        """A trial's widths in the groups' order; None where it has none, or not all of them."""
        params = trial.params
        try:
            return tuple([params[group.name] for group in self.problem.groups])
        except KeyError:
            return None

    def anywhere(self, study: optuna.Study, rng: np.random.Generator) -> tuple[int, ...]:
        """A random policy, admitted: for a strategy that is stuck among known ones."""
        known = {widths for other in study.get_trials(deepcopy=False) if (widths := self.policy(other))}
        groups = self.problem.groups
        return fresh(known, lambda: self.problem.admit([int(rng.choice(group.widths)) for group in groups]))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The static space: Optuna's own samplers would take the intersection of past trials'."""
        return dict(search_space(self.problem))

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The proposed policy, admitted: within the budget."""
        return self.problem.named(self.problem.admit(self.propose(study, trial)))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Parameters that are not groups have no meaning here."""
        raise ValueError(f"{param_name!r} with {param_distribution} is not a group of the problem")


def stuck(study: optuna.Study) -> bool:
    """Whether the last trials were all of policies that were known."""
    last = told(study)[-STUCK:]
    return len(last) == STUCK and all("repeat" in trial.user_attrs for trial in last)


def fresh(known: set[tuple[int, ...]], draw: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """The first draw that nobody has proposed; the last one where that takes too long."""
    for _ in range(MOST_TRIES):
        widths = draw()
        if widths not in known:
            break
    return widths


class ProjectedSampler(WidthSampler):
    """Any Optuna sampler, over the static space, with its proposals admitted.

    Optuna's samplers don't look whether a policy is known: where few are left, they would propose no other.
    make: seed -> the sampler.
    """

    def __init__(self, problem: Problem, make: Callable[[int], BaseSampler], seed: int) -> None:
        super().__init__(problem)
        self._make, self._seed = make, seed
        self._base = make(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Makes the sampler of this proposal."""
        self._base = self._make(derive(self._seed, trial.number))
        self._base.before_trial(study, trial)

    def propose(self, study: optuna.Study, trial: FrozenTrial) -> Sequence[float]:
        """What the Optuna sampler suggests; parameters it leaves open (mutated, or none yet) it draws one by one."""
        if stuck(study):
            return self.anywhere(study, np.random.default_rng(derive(self._seed, trial.number)))
        space: dict[str, BaseDistribution] = dict(search_space(self.problem))
        params = self._base.sample_relative(study, trial, space)
        for name, distribution in space.items():
            if name not in params:
                params[name] = self._base.sample_independent(study, trial, name, distribution)
        return [params[group.name] for group in self.problem.groups]

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Passes on what the Optuna sampler wants to store."""
        self._base.after_trial(study, trial, state, values)
