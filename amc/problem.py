"""The narrow waist: `Problem: policy -> Outcome`.

Strategies and environments see a model only through this: groups with integer widths, a budget, and one number to
maximize. It costs them nothing to know; scoring a policy costs everything, so a policy is scored once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from amc.budget import Budget
from amc.cost import Cost, spent
from amc.errors import ModelError, PolicyError
from amc.groups import Group
from amc.registry import suggest
from amc.reward import Reward, alone

WidthsByName = Mapping[str, int]


class Worth(NamedTuple):
    """What the evaluation of a policy finds.

    accuracy: in [0, 1] (or the user's metric, higher is better).
    score: what rewards count, higher is better: the accuracy, or what tells policies apart with less noise.
    """

    accuracy: float
    score: float

    @classmethod
    def of(cls, found: float | Worth) -> Worth:
        """What was found, where a single number is both."""
        return cls(*map(float, found if isinstance(found, Worth) else (found, found)))


@dataclass(frozen=True)
class Outcome:
    """One scored policy.

    accuracy, score: see `Worth`.
    costs: every cost of the policy, by name, in its own unit.
    reward: what the search maximizes.
    widths: the policy, group -> kept channels.
    """

    accuracy: float
    score: float
    costs: Mapping[str, float]
    reward: float
    widths: WidthsByName = field(repr=False, default_factory=dict)

    @property
    def worth(self) -> Worth:
        """What its evaluation found."""
        return Worth(self.accuracy, self.score)


class Problem:
    """What is searched: groups, costs, a budget, and what a policy is worth.

    groups: in forward order; a policy gives each a width out of `group.widths`.
    budget: limits that every proposal keeps; `Budget(groups, ())` limits nothing.
    evaluate: widths by group name -> accuracy, higher is better, or a `Worth`. It is called once for each different
        policy. It may raise an `ArithmeticError` for a policy that can't be scored (a diverged fine-tune); NaN and
        infinity count as such.
    costs: reported with every outcome, by name; those of the budget are added.
    reward: (score, costs, budget) -> the number to maximize; the score alone unless given.

    Whatever else the parts need (a dense model, images, a device) they hold themselves; a copy of a problem is the same
    problem (`copy.deepcopy` returns it), since Gymnasium copies the arguments of an environment.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        budget: Budget,
        evaluate: Callable[[WidthsByName], float | Worth],
        *,
        costs: Mapping[str, Cost] | None = None,
        reward: Reward = alone,
    ) -> None:
        if not groups:
            raise ModelError("there is nothing to search: the problem has no groups")
        self.groups = tuple(groups)
        self.budget = budget
        self.costs = {**{limit.cost.name: limit.cost for limit in budget.limits}, **(costs or {})}
        self.reward = reward
        self._evaluate = evaluate
        self._known: dict[tuple[int, ...], Outcome] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Problem:
        return self

    def __repr__(self) -> str:
        return f"Problem({len(self.groups)} groups, {self.budget!r}, {len(self._known)} policies scored)"

    def evaluate(self, policy: Any) -> Outcome:
        """Scores a policy: a mapping group -> width, an object with such `widths`, or widths in the groups' order.

        A policy scored before is answered from memory.

        Raises:
            PolicyError: a group is missing or unknown, or a width is not allowed.
            ArithmeticError: the policy can't be scored.
        """
        widths = self.widths(policy)
        if widths not in self._known:
            self._known[widths] = self.outcome(widths, self._evaluate(self.named(widths)))
        return self._known[widths]

    def outcome(self, policy: Any, found: float | Worth) -> Outcome:
        """The outcome of a policy whose worth was found elsewhere: in another process, say.

        Raises:
            ArithmeticError: what was found, or the reward that it makes, is not a finite number.
        """
        worth = Worth.of(found)
        for number in worth:
            if not math.isfinite(number):
                raise ArithmeticError(f"the evaluation gave {number}, which is not a finite number")
        outcome = self._outcome(self.widths(policy), worth)
        if not math.isfinite(outcome.reward):
            raise ArithmeticError(f"the reward is {outcome.reward}, which is not a finite number")
        return outcome

    def _outcome(self, widths: tuple[int, ...], worth: Worth) -> Outcome:
        costs = spent(self.costs, widths)
        return Outcome(*worth, costs, self.reward(worth.score, costs, self.budget), self.named(widths))

    def admit(self, widths: Sequence[float]) -> tuple[int, ...]:
        """The policy that stands for a proposal of widths in the groups' order, whatever they are.

        It is within the budget, and uses it up where that is what pays.
        """
        return self.budget.fill(widths) if self.spends else self.budget.project(widths)

    @property
    def spends(self) -> bool:
        """Whether policies use the budget up: where the reward is the score alone, what is unspent buys nothing."""
        return self.reward is alone

    @property
    def revised(self) -> bool:
        """Whether rewards change with the latency table, since they count what it says."""
        return not self.spends and any(limit.cost.name == "latency" for limit in self.budget.limits)

    def under(self, budget: Budget, costs: Mapping[str, Cost]) -> Problem:
        """The same problem under another budget and other costs; what policies are worth stays known."""
        other = Problem(self.groups, budget, self._evaluate, costs=costs, reward=self.reward)
        for widths, known in self._known.items():
            other._known[widths] = other._outcome(widths, known.worth)
        return other

    def remember(self, outcome: Outcome) -> None:
        """Takes an outcome from elsewhere (an earlier run, another process) as known."""
        self._known[self.widths(outcome.widths)] = outcome

    def named(self, widths: Sequence[int]) -> dict[str, int]:
        """Widths in the groups' order as a mapping by group name."""
        return {group.name: int(width) for group, width in zip(self.groups, widths, strict=True)}

    def widths(self, policy: Any) -> tuple[int, ...]:
        """The policy as widths in the groups' order, checked."""
        policy = getattr(policy, "widths", policy)
        names = [group.name for group in self.groups]
        if not isinstance(policy, Mapping):
            if not isinstance(policy, Sequence | np.ndarray) or len(policy) != len(names):
                raise PolicyError(f"{policy!r} is not a policy: give a mapping group -> width, or {len(names)} widths")
            policy = dict(zip(names, policy, strict=True))
        for name in policy:
            if name not in names:
                raise PolicyError(f"the policy names a group {name!r} that the model lacks; {suggest(name, names)}")
        for group in self.groups:
            if group.name not in policy:
                raise PolicyError(f"the policy lacks the group {group.name!r}; a policy gives every group a width")
            if policy[group.name] not in group.widths:
                raise PolicyError(
                    f"group {group.name!r} can't keep {policy[group.name]!r} of its {group.channels} channels; "
                    f"it can keep {allowed(group)}"
                )
        return tuple(int(policy[name]) for name in names)


def allowed(group: Group) -> str:
    """The allowed widths of a group in words: `1 to 16`, or `8, 16, 20`."""
    widths = group.widths
    if len(widths) > 2 and widths[-1] - widths[0] == len(widths) - 1:
        return f"{widths[0]} to {widths[-1]}"
    return ", ".join(map(str, widths[:12])) + (", …" if len(widths) > 12 else "")
