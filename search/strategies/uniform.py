"""The uniform policy: every group keeps the same share, as much as the budget allows. The baseline of every search."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial

from amc.problem import Problem
from search.strategies.base import Exhausted, WidthSampler


def uniform_policy(problem: Problem) -> tuple[int, ...]:
    """Widths in the groups' order: the dense ones scaled down to the budget by one factor, then filled up."""
    return problem.budget.project(problem.budget.dense)


class UniformSampler(WidthSampler):
    """Proposes the uniform policy, once."""

    def propose(self, study: optuna.Study, trial: FrozenTrial) -> Sequence[float]:
        """The uniform policy."""
        uniform = uniform_policy(self.problem)
        if any(other.params == self.problem.named(uniform) for other in study.get_trials(deepcopy=False)):
            raise Exhausted("the uniform policy is one policy")
        return uniform


def make(problem: Problem, *, trials: int, seed: int) -> UniformSampler:
    """The sampler."""
    return UniformSampler(problem)
