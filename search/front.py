"""`--pareto`: a front of accuracy over cost in one run, each trial under a limit of its own.

Limits lie between the given budget and the dense model, evenly in the logarithm: a trial's follows from its number.
Within it the strategy proposes as ever. What it learns from must mean the same under every limit, so a policy's reward
is by how much it beats the *uniform* policy of its cost. The first trials are the uniform policies at a few limits, and
between these the accuracy is interpolated; so a strategy learns from all trials which shape is good, whatever the size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from amc.budget import Budget
from amc.catalog import ALONE
from amc.errors import UsageError
from amc.problem import Outcome, Problem, Worth
from search.settings import Settings
from search.strategies import make_sampler
from search.strategies.base import Exhausted
from search.strategies.moves import MovingSampler
from search.strategies.uniform import uniform_policy
from search.study import SearchResult, outcomes

REFERENCES = 6
"""Uniform policies that all others are compared with."""
GOLDEN = 0.6180339887498949
TURNS = 6
"""Limits under which a strategy is asked for a trial before it counts as having no more to propose."""


class FrontProblem(Problem):
    """A problem under one limit at a time, of a range; a reward is accuracy above the uniform policy's of that cost.

    problem: under the lowest limit of the range; it has one, and no other.

    Raises:
        UsageError: it has several limits, or one on a cost that is measured.
    """

    def __init__(self, problem: Problem) -> None:
        limits = problem.budget.limits
        if len(limits) != 1 or limits[0].cost.name == "latency":
            raise UsageError(
                "--pareto takes one --budget, on flops, params or size: the lower end of the range; for latency, "
                "search several budgets, each with --warm-start"
            )
        super().__init__(problem.groups, problem.budget, problem._evaluate, costs=problem.costs)
        self.given = replace(limits[0], share=None)  # each trial has a limit, and so a share, of its own
        self.lowest = self.given.fraction
        dense = Budget(self.groups, [replace(self.given, value=self.given.dense)])
        shares = np.linspace(0, 1, REFERENCES)
        self.references: dict[tuple[int, ...], float] = {}
        for fraction in (self.fraction(float(share)) for share in shares):
            with self.limited(fraction):
                self.references.setdefault(uniform_policy(self), fraction)
        self._curve: dict[float, float] = {}
        self.budget = dense

    def fraction(self, share: float) -> float:
        """The limit, as a fraction of dense, at a share of the range: 0 the given budget, 1 the dense model."""
        return float(self.lowest ** (1 - share))

    @contextmanager
    def limited(self, fraction: float) -> Iterator[None]:
        """Puts the problem under a limit for the body."""
        before, value = self.budget, max(fraction * self.given.dense, self.given.value)
        value = math.floor(value * (1 + 1e-12)) if isinstance(self.given.value, int) else value
        self.budget = Budget(self.groups, [replace(self.given, value=min(value, self.given.dense))])
        try:
            yield
        finally:
            self.budget = before

    def admit(self, widths: Sequence[float]) -> tuple[int, ...]:
        """The policy in the proportions of `widths` that uses the current limit up."""
        return self.budget.fill(widths)

    def remember(self, outcome: Outcome) -> None:
        """Takes an outcome as known; of a uniform policy, it is what others are compared with."""
        super().remember(outcome)
        if self.widths(outcome.widths) in self.references:
            self._curve[math.log(outcome.costs[self.given.cost.name])] = outcome.accuracy

    def _outcome(self, widths: tuple[int, ...], worth: Worth) -> Outcome:
        plain = super()._outcome(widths, worth)
        return replace(plain, reward=0.0 if widths in self.references else worth.accuracy - self._uniform(plain.costs))

    def _uniform(self, costs: Mapping[str, float]) -> float:
        """The accuracy that is to be expected of a uniform policy that costs as much."""
        if not self._curve:
            raise ArithmeticError("no uniform policy could be scored, and there is nothing to compare with")
        at = sorted(self._curve)
        return float(np.interp(math.log(costs[self.given.cost.name]), at, [self._curve[cost] for cost in at]))


def front_problem(settings: Settings, problem: Problem) -> FrontProblem | None:
    """The problem of a run that searches a front; None of one that doesn't.

    Raises:
        UsageError: another setting doesn't go with `--pareto`.
    """
    if not settings.pareto:
        return None
    if settings.storage is not None or settings.reward not in ALONE:
        raise UsageError("--pareto has a study and a reward of its own; leave out --storage and --reward")
    return FrontProblem(problem)


class FrontSampler(BaseSampler):
    """Any strategy, each of its trials under the limit that the trial's number gives."""

    def __init__(self, problem: FrontProblem, strategy: str, *, trials: int, seed: int) -> None:
        self._problem = problem
        with problem.limited(problem.lowest):
            self._base = make_sampler(strategy, problem, trials=trials, seed=seed)
        # Starts are many policies under one limit; here each is tried once, under its trial's.
        self._starts = self._base.take_starts() if isinstance(self._base, MovingSampler) else []

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The static space."""
        return self._base.infer_relative_search_space(study, trial)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Passed on."""
        self._base.before_trial(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The strategy's proposal under the trial's limit, which is stored with it."""
        earlier = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        own = sum("fixed_params" not in other.system_attrs for other in earlier)
        nothing = Exhausted()
        for turn in range(TURNS):  # where the strategy knows nothing more under one limit, it may under another
            fraction = self._problem.fraction((trial.number * GOLDEN + turn / TURNS) % 1)
            study._storage.set_trial_user_attr(trial._trial_id, "limit", fraction)
            try:
                with self._problem.limited(fraction):
                    if own < len(self._starts):
                        return self._problem.named(self._problem.admit(self._starts[own]))
                    return self._base.sample_relative(study, trial, search_space)
            except Exhausted as reason:
                nothing = reason
        raise nothing

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Passed on."""
        return self._base.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Passed on."""
        self._base.after_trial(study, trial, state, values)


def begin(study: optuna.Study, problem: FrontProblem) -> None:
    """Lets the uniform policies wait in the study, to be scored before all others."""
    for widths, fraction in problem.references.items():
        study.enqueue_trial(problem.named(widths), user_attrs={"limit": fraction}, skip_if_exists=True)


def front(study: optuna.Study, problem: FrontProblem) -> list[Outcome]:
    """The policies that none beats at their cost or less, cheapest first."""
    cost, found = problem.given.cost.name, list[Outcome]()
    for outcome in sorted(outcomes(problem, study), key=lambda outcome: (outcome.costs[cost], -outcome.accuracy)):
        if not found or outcome.accuracy > found[-1].accuracy:
            found.append(outcome)
    return found


def with_front(found: SearchResult, study: optuna.Study, problem: FrontProblem, given: Problem) -> SearchResult:
    """What was found, with the front, and the best policy of those within the given budget."""
    whole = front(study, problem)
    allowed = [outcome for outcome in whole if given.budget.met(given.widths(outcome.widths))]
    return replace(found, best=allowed[-1] if allowed else None, front=tuple(whole))
