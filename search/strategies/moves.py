"""What the strategies of this package share: where they start, how they move, and what they know.

A start tilts the network: cost moves from early stages to late ones. A move takes channels from some groups and gives
them to others at constant cost, so that it asks where a channel is worth most, not how many there are. Both end in
`Problem.admit`, so what is proposed is what is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from amc.problem import Problem
from search.strategies.base import WidthSampler, fresh, stuck
from search.strategies.uniform import uniform_policy

Widths = tuple[int, ...]
TILTS = (1.5, 2.0, 3.0, 4.0)
FAR = 0.8
_GRID = np.linspace(0.0, 1.0, 65)


class Scored(NamedTuple):
    """A trial that ended with a reward."""

    number: int
    widths: Widths
    reward: float


class MovingSampler(WidthSampler):
    """A sampler that starts from the uniform and the tilted policies and goes on from what was scored.

    A subclass says how, in `follow`. Nothing is kept but what the study's trials imply.
    worth: gives what was scored the rewards that later knowledge expects of it; as scored, unless set.
    failed: policies that could not be scored, by the time of a proposal.
    """

    failed: Sequence[Widths] = ()
    worth: Callable[[list[Scored]], list[Scored]] = staticmethod(lambda scored: scored)

    def __init__(self, problem: Problem, *, trials: int = 100, seed: int = 0) -> None:
        super().__init__(problem)
        self.trials, self.seed = trials, seed
        self._starts = starts(problem)

    def propose(self, study: optuna.Study, trial: FrozenTrial) -> Sequence[float]:
        """The next start that nobody has proposed, then what `follow` says."""
        past = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        known = {widths for other in past if (widths := self.policy(other))}
        for start in self._starts:
            if start not in known:
                return start
        rng = np.random.default_rng([self.seed, trial.number])
        scored = self._scored(past)
        self.failed = [widths for t in past if t.state == TrialState.FAIL and (widths := self.policy(t))]
        if not scored:  # every start failed
            return fresh(known, lambda: move(self.problem, self._starts[0], FAR, rng))
        if stuck(study):  # what is near was proposed
            return self.anywhere(study, rng)
        return self.follow(self.worth(scored), known, rng)

    def start_from(self, policies: Iterable[Widths]) -> None:
        """Starts from these, as far as the budget lets them, instead of from the uniform and the tilted policies."""
        self._starts = list(dict.fromkeys(self.problem.admit(policy) for policy in policies))

    def take_starts(self) -> list[Widths]:
        """Hands the starts over to whoever proposes them in place of this sampler; the first one stays."""
        first, *others = self._starts
        self._starts = [first]
        return others

    def follow(self, scored: list[Scored], known: set[Widths], rng: np.random.Generator) -> Widths:
        """The next policy after the starts.

        scored: at least one, in the order of their numbers, repeats left out. known: what was proposed, scored or not.
        """
        raise NotImplementedError

    def _scored(self, past: Sequence[FrozenTrial]) -> list[Scored]:
        found: dict[Widths, Scored] = {}
        for trial in past:
            widths = self.policy(trial)
            if trial.state == TrialState.COMPLETE and widths and trial.value is not None:
                found.setdefault(widths, Scored(trial.number, widths, trial.value))
        return list(found.values())


def best(scored: Sequence[Scored]) -> Scored:
    """The one with the highest reward, the first of equals."""
    return max(scored, key=lambda one: one.reward)


# ---- where to start


def stages(problem: Problem) -> list[list[int]]:
    """Indices of the groups by their layers' output positions, in forward order; thirds of them where all are equal."""
    found: dict[int, list[int]] = {}
    for i, group in enumerate(problem.groups):
        found.setdefault(group.layer.positions, []).append(i)
    if len(found) > 1:
        return list(found.values())
    return [part.tolist() for part in np.array_split(np.arange(len(problem.groups)), 3) if part.size]


def spending(problem: Problem) -> Callable[[Sequence[int]], float]:
    """The share of the tightest limit that a policy uses; of all channels where nothing is limited."""
    limits, channels = problem.budget.limits, sum(problem.budget.dense)
    if not limits:
        return lambda widths: sum(widths) / channels
    return lambda widths: max(limit.cost(widths) / limit.bound for limit in limits)


def tilted(problem: Problem, growth: float) -> Widths:
    """The policy whose stages keep shares of their cost that grow by a factor from stage to stage, as far as 1.

    A stage's share is of the cost that goes when it alone is at its floor.
    """
    parts, spent, dense = stages(problem), spending(problem), problem.budget.dense

    def keep(ratios: Sequence[float]) -> Widths:
        ratio = {i: share for part, share in zip(parts, ratios, strict=True) for i in part}
        return tuple(group.snap_down(ratio[i] * group.channels) for i, group in enumerate(problem.groups))

    curves = []  # of each stage: cost at the ratios of the grid, the others dense, as a share from 0 to 1
    for s in range(len(parts)):
        costs = np.array([spent(keep([ratio if t == s else 1.0 for t in range(len(parts))])) for ratio in _GRID])
        curves.append((costs - costs[0]) / max(costs[-1] - costs[0], 1e-12))
    shares = growth ** np.arange(len(parts), dtype=float)
    low, high, policy = 0.0, 1.0, keep([0.0] * len(parts))
    for _ in range(24):
        middle = (low + high) / 2
        asked = np.minimum(middle * shares, 1.0)
        wider = keep([float(np.interp(share, curve, _GRID)) for share, curve in zip(asked, curves, strict=True)])
        if problem.budget.met(wider):
            low, policy = middle, wider
        else:
            high = middle
    return problem.admit(policy if len(parts) > 1 else dense)


def starts(problem: Problem) -> list[Widths]:
    """The uniform policy, then the tilted ones, each once."""
    policies = [uniform_policy(problem), *(tilted(problem, growth) for growth in TILTS)]
    return list(dict.fromkeys(problem.admit(policy) for policy in policies))


# ---- how to move


def move(problem: Problem, widths: Widths, size: float, rng: np.random.Generator) -> Widths:
    """A neighbour of a policy, admitted; see `exchange`."""
    return problem.admit(exchange(problem, widths, size, rng))


def exchange(problem: Problem, widths: Sequence[int], size: float, rng: np.random.Generator) -> Widths:
    """Some groups grow and others pay for it, or some shrink and others, perhaps, gain; not yet admitted.

    size: standard deviation of the factor's logarithm. What moves is one group, two or three, or all of a stage; the
    others follow in random order, by no more than the same factor each, until the budget is just met.
    """
    parts, count = stages(problem), len(widths)
    if rng.random() < 0.25:
        chosen = parts[rng.integers(len(parts))]
    else:
        chosen = rng.choice(count, size=min(int(rng.integers(1, 4)), count), replace=False).tolist()
    factor, moved = float(np.exp(abs(rng.normal(0, size)))), list(widths)
    grow = rng.random() < 0.5
    for i in chosen:
        moved[i] = step(problem, moved, i, factor if grow else 1 / factor)
    others = rng.permutation([i for i in range(count) if i not in chosen]).tolist()
    # A reward may want what was saved to stay unspent.
    for i in others if grow else others[: rng.integers(len(others) + 1)]:
        if grow and problem.budget.met(moved):
            break
        moved[i] = _affordable(problem, moved, i, 1 / factor if grow else factor)
    return tuple(moved)


def step(problem: Problem, widths: Sequence[int], i: int, factor: float) -> int:
    """The width of group `i` times a factor, at least one allowed width away where there is one."""
    group, width = problem.groups[i], widths[i]
    to = group.snap(width * factor)
    if to == width:
        at = group.widths.index(width) + (1 if factor > 1 else -1)
        to = group.widths[min(max(at, 0), len(group.widths) - 1)]
    return to


def _affordable(problem: Problem, widths: list[int], i: int, factor: float) -> int:
    """The largest width of group `i` that meets the budget, between what it has and `factor` times that."""
    allowed = problem.groups[i].widths
    low, high = sorted(allowed.index(width) for width in (widths[i], step(problem, widths, i, factor)))
    while low < high:
        middle = (low + high + 1) // 2
        if problem.budget.met([*widths[:i], allowed[middle], *widths[i + 1 :]]):
            low = middle
        else:
            high = middle - 1
    return allowed[low]
