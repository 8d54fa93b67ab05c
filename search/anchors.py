"""What the search's score is worth: some of its policies are fine-tuned for longer, and the run learns from these.

A quick score is noisy, and on some networks it favours the wrong policies. So a share of the search goes to *anchors*,
policies from all over the ranking that are fine-tuned several times as long: half of them the most different of the
best, the *contenders*, since those of a search that has settled are near copies and teach nothing. They say how far the
ranking can be trusted (Spearman's correlation, in `result.json`), and they calibrate it: accuracy after the long
fine-tune is regressed on the score and on the parameters that a policy keeps. Capacity is worth something after a long
fine-tune on some networks and nothing on others, so its weight starts low and follows the anchors. The policy that the
search ends with is the contender of the best calibrated score; the best raw one is the luckiest, and on those that are
no contenders a few noisy anchors, extrapolated, can make anything look good.

The runs of a sweep share their anchors: what score and capacity are worth is learned from those of all budgets so far,
each compared with the others of its own budget. The correlation is over a run's own: between budgets, size decides.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import optuna
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import spearmanr

from amc.documents import read_document
from amc.errors import AmcError, RunError
from amc.finetune import Diverged
from amc.problem import Outcome, Problem
from search.executor import Score
from search.numbers import WEAK
from search.run_directory import ANCHORS, RunDirectory
from search.strategies.moves import Scored, Widths
from search.strategies.surrogate import Surrogate
from search.study import SearchResult, outcomes

log = logging.getLogger("amc")

FEWEST, ENOUGH, MOST = 5, 10, 12
LENGTHS = (32, 16, 8, 4)
"""Of an anchor's fine-tune, in lengths of the score's: the longest that affords enough anchors, or the shortest."""
PRIOR, SLACK = (1.0, 0.25), (0.5, 0.5)
"""What score and parameters are worth, mean and standard deviation, in spreads of the score.

On the published ResNet-20 policies parameters were worth 0.04 in a regression of accuracy after 30 steps, 0.13 after
120 and 0.37 after 780 (`docs/benchmarks.md`), so anchors, shorter than the final fine-tune, tell too little of it.
"""
OWN = 0.5
"""The part of what the regression leaves of an anchor's accuracy that is its policy's own; the rest is luck."""
NOISES = (0.1, 0.3, 1.0)
"""Of an anchor's accuracy, in the same unit; the evidence chooses."""

Begin = Callable[[dict[str, int], int], Future[Score]]
"""Begins a fine-tune: widths by group name, steps -> the accuracy that is to come."""


@dataclass(frozen=True)
class Plan:
    """How many anchors, and the steps of their fine-tune; none where there are too few trials to spare the time."""

    count: int
    steps: int


def plan(trials: int, score_steps: int, share: float, rest: float = 0.0) -> Plan:
    """The anchors that a share of the search affords, after so many trials with a score of so many steps.

    rest: what else a score takes, batch norm and the scored images, in steps.
    """
    steps = trials * (score_steps + rest) * share / (1 - share)
    for length in LENGTHS if score_steps else ():
        count = int(steps / (length * score_steps + rest) + 1e-9)
        if count >= (FEWEST if length == LENGTHS[-1] else ENOUGH):
            return Plan(min(count, MOST), length * score_steps)
    return Plan(0, 0)


@dataclass(frozen=True)
class Anchor:
    """A policy that was both scored and fine-tuned for longer, on the same images."""

    widths: Widths
    score: float
    accuracy: float


@dataclass(frozen=True)
class Lessons:
    """What another search's anchors were: `(anchors,)` smoothed scores, parameters and accuracies."""

    scores: np.ndarray
    params: np.ndarray
    accuracies: np.ndarray


def trust(anchors: Sequence[Anchor]) -> float | None:
    """Spearman's rank correlation of score and fine-tuned accuracy; None where too few differ."""
    scores, accuracies = [a.score for a in anchors], [a.accuracy for a in anchors]
    if len(anchors) < 4 or len(set(scores)) < 2 or len(set(accuracies)) < 2:
        return None
    return float(spearmanr(scores, accuracies)[0])


# ---- which policies


def policies(problem: Problem, study: optuna.Study) -> list[Outcome]:
    """The different policies of a study that were scored and are within the budget, in the order of their trials."""
    return [one for one in outcomes(problem, study) if problem.budget.met(problem.widths(one.widths))]


def smoothed(problem: Problem, scored: Sequence[Outcome]) -> np.ndarray:
    """`(policies,)` scores without their noise, as far as a Gaussian process over all of them can tell it."""
    seen = [Scored(i, problem.widths(one.widths), one.accuracy) for i, one in enumerate(scored)]
    if len(seen) < FEWEST:
        return np.array([one.reward for one in seen])
    return Surrogate(problem, seen).predict([one.widths for one in seen])[0]


def contenders(rewards: np.ndarray, count: int) -> np.ndarray:
    """Indices of the best quarter, best first, or of the best `count` where these are more."""
    return np.argsort(-rewards, kind="stable")[: max(len(rewards) // 4, count, 1)]


def spread(problem: Problem, scored: Sequence[Outcome], rewards: np.ndarray, count: int) -> list[int]:
    """Indices of up to `count` anchors: half of them contenders, where the choice is made, the rest all over.

    The contenders are the best and whoever is farthest from those taken so far, in logarithms of the keep ratios.
    """
    if not count:
        return []
    channels = [group.channels for group in problem.groups]
    places = np.log(np.array([problem.widths(one.widths) for one in scored]) / channels)
    top = contenders(rewards, count)
    near = np.full(len(top), np.inf)
    chosen = [int(top[0])]
    while len(chosen) < min(count - count // 2, len(top)):
        near = np.minimum(near, np.square(places[top] - places[chosen[-1]]).sum(axis=1))
        chosen.append(int(top[np.argmax(near)]))
    rest = [int(i) for i in np.argsort(-rewards, kind="stable") if i not in chosen]
    wanted = np.linspace(0, len(rest) - 1, count - len(chosen) + 1)[1:] * 0.75  # the worst are no news
    return list(dict.fromkeys([*chosen, *(rest[int(place)] for place in wanted if rest)]))


# ---- what the anchors teach


def calibrated(
    problem: Problem,
    scored: Sequence[Outcome],
    scores: np.ndarray,
    anchors: Sequence[Anchor],
    shared: Sequence[Lessons] = (),
) -> np.ndarray:
    """`(policies,)` expected accuracies after the anchors' fine-tune: Bayesian linear regression on the anchors.

    Its prior is the score itself. Without anchors it stays that. shared: the anchors of other searches for the same
    network; each search has an intercept of its own.
    """
    if not anchors:
        return scores
    params = np.log([one.costs["params"] for one in scored])
    unit, span = (max(float(x.std()), 1e-9) for x in (scores, params))
    features = np.stack([(scores - scores.mean()) / unit, (params - params.mean()) / span], axis=1)
    place = {problem.widths(one.widths): i for i, one in enumerate(scored)}
    seen = features[[place[anchor.widths] for anchor in anchors]]
    accuracies = np.array([anchor.accuracy for anchor in anchors]) / unit
    x, residual = seen - seen.mean(axis=0), accuracies - accuracies.mean()
    others = [_centred(lessons, unit, span) for lessons in shared]
    every_x = np.concatenate([x, *(other_x for other_x, _ in others)])
    every_residual = np.concatenate([residual, *(other for _, other in others)]) - every_x @ PRIOR
    _, weights = max((_posterior(every_x, every_residual, noise) for noise in NOISES), key=lambda found: found[0])
    expected = (features - seen.mean(axis=0)) @ (PRIOR + weights)
    for anchor, left in zip(anchors, residual - x @ (PRIOR + weights), strict=True):
        expected[place[anchor.widths]] += OWN * left
    return np.asarray(unit * (accuracies.mean() + expected))


def _centred(lessons: Lessons, unit: float, span: float) -> tuple[np.ndarray, np.ndarray]:
    """`(anchors, 2)` features and `(anchors,)` accuracies about their means, in the units of the search at hand."""
    x = np.stack([lessons.scores / unit, np.log(lessons.params) / span], axis=1)
    return x - x.mean(axis=0), (lessons.accuracies - lessons.accuracies.mean()) / unit


def _posterior(x: np.ndarray, y: np.ndarray, noise: float) -> tuple[float, np.ndarray]:
    """Log evidence and the mean weights of a linear model whose weights start at 0 with the deviations `SLACK`."""
    variance = np.square(SLACK)
    covariance = (x * variance) @ x.T + noise**2 * np.eye(len(y))
    solved = np.linalg.solve(covariance, y)
    evidence = -0.5 * (y @ solved + np.linalg.slogdet(covariance)[1])
    return float(evidence), variance * (x.T @ solved)


# ---- in a run


class _Kept(BaseModel):
    """One anchor as stored. seconds: that the search waited for it; evaluation_seconds: that it took a worker.

    score: smoothed, once the search has ended.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    widths: dict[str, int]
    steps: Annotated[int, Field(ge=1)]
    accuracy: float
    seconds: Annotated[float, Field(ge=0)]
    evaluation_seconds: Annotated[float, Field(ge=0)] | None = None
    score: float | None = None


def _busy(kept: _Kept) -> float:
    """Of a worker; the first versions had none, and noted one time."""
    return kept.seconds if kept.evaluation_seconds is None else kept.evaluation_seconds


class _File(BaseModel):
    """`anchors.json`. shared: those of the runs before this one in its sweep, a run each."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    anchors: tuple[_Kept, ...] = Field(default=(), strict=False)
    shared: tuple[Annotated[tuple[_Kept, ...], Field(strict=False)], ...] = Field(default=(), strict=False)


def hand_on(source: RunDirectory, target: RunDirectory) -> None:
    """Lets a run that begins learn from the anchors of a finished one, and of those that this one learned from."""
    found = _read(source)
    own = tuple(kept for kept in found.anchors if kept.score is not None)
    shared = tuple(run for run in (*found.shared, own) if run)
    if shared:
        target.write_json(ANCHORS, _File(shared=shared).model_dump())


def _read(directory: RunDirectory) -> _File:
    if not (directory / ANCHORS).exists():
        return _File()
    try:
        return read_document(directory / ANCHORS, _File, "run's file", RunError)
    except RunError as error:
        log.warning("%s; it is made again", error)
        return _File()


def _rewards(problem: Problem, scored: Sequence[Outcome], accuracies: np.ndarray) -> np.ndarray:
    """`(policies,)` rewards, were these their accuracies."""
    pairs = zip(accuracies, scored, strict=True)
    return np.array([problem.reward(float(accuracy), one.costs, problem.budget) for accuracy, one in pairs])


class Chooser:
    """Chooses the policy that a search ends with; what was fine-tuned is kept in the run's directory.

    begin: begins a policy's fine-tune, of `at_once` at most. score_steps, rest: what a score takes, see `plan`.
    """

    def __init__(
        self,
        directory: RunDirectory,
        begin: Begin,
        *,
        score_steps: int,
        share: float,
        rest: float = 0.0,
        at_once: int = 1,
    ) -> None:
        self._directory, self._begin, self._at_once = directory, begin, at_once
        self._score_steps, self._rest = score_steps, rest
        found = _read(directory)
        self._kept, self._shared = list(found.anchors), found.shared
        self.anchors: tuple[Anchor, ...] = ()
        self.steps, self.shared, self.share = 0, 0, share

    def choose(
        self, problem: Problem, study: optuna.Study, found: SearchResult, report: Callable[[int, int], object]
    ) -> SearchResult:
        """The search's result, with the policy of the best calibrated score as its best.

        report: called with (anchors done, anchors in all).
        """
        scored = policies(problem, study)
        if not scored or found.best is None:
            return found
        scores = smoothed(problem, scored)
        planned = plan(len(scored), self._score_steps, self.share, self._rest)
        self.steps = planned.steps
        rewards = _rewards(problem, scored, scores)
        chosen = [scored[i] for i in spread(problem, scored, rewards, planned.count)]
        self.anchors = tuple(self._anchored(problem, chosen, report))
        self._say()
        self._note_scores(problem, scored, scores)
        lessons = self._lessons(problem) if self.anchors else []
        self.shared = sum(len(one.scores) for one in lessons)
        expected = _rewards(problem, scored, calibrated(problem, scored, scores, self.anchors, lessons))
        best = max(contenders(rewards, planned.count), key=lambda i: expected[i])
        return replace(
            found,
            best=scored[best],
            seconds=found.seconds + sum(kept.seconds for kept in self._kept),
            evaluation_seconds=found.evaluation_seconds + sum(map(_busy, self._kept)),
        )

    def proxy(self) -> dict[str, object]:
        """What `result.json` says of the score."""
        return {
            "spearman": trust(self.anchors),
            "samples": len(self.anchors),
            "steps": self.steps,
            "shared": self.shared,
            "anchors": [{"score": anchor.score, "accuracy": anchor.accuracy} for anchor in self.anchors],
        }

    def _anchored(
        self, problem: Problem, chosen: Sequence[Outcome], report: Callable[[int, int], object]
    ) -> list[Anchor]:
        left = deque(one for one in chosen if self._known(one) is None)
        under_way: dict[Future[Score], Outcome] = {}
        since = time.perf_counter()
        while left or under_way:
            report(len(chosen) - len(left) - len(under_way), len(chosen))
            while left and len(under_way) < self._at_once:
                one = left.popleft()
                under_way[self._begin(dict(one.widths), self.steps)] = one
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                try:
                    self._keep(under_way.pop(future), future.result(), since)
                except AmcError:
                    raise
                except Exception as error:  # as a trial: one that fails is left out
                    log.warning("an anchor's fine-tune failed, and is left out: %s: %s", type(error).__name__, error)
                else:
                    since = time.perf_counter()
        return [
            Anchor(problem.widths(one.widths), one.accuracy, accuracy)
            for one in chosen
            if (accuracy := self._known(one)) is not None
        ]

    def _known(self, one: Outcome) -> float | None:
        """What came of a policy's fine-tune, if there was one."""
        for kept in itertools.chain(self._kept, *self._shared):
            if kept.widths == dict(one.widths) and kept.steps == self.steps:
                return kept.accuracy
        return None

    def _keep(self, one: Outcome, score: Score, since: float) -> None:
        """Keeps an anchor at once, with the time since the one before."""
        if not math.isfinite(score.accuracy):
            raise Diverged(f"its accuracy is {score.accuracy}")
        self._kept.append(
            _Kept(
                widths=dict(one.widths),
                steps=self.steps,
                accuracy=score.accuracy,
                seconds=time.perf_counter() - since,
                evaluation_seconds=score.seconds,
            )
        )
        self._write()

    def _note_scores(self, problem: Problem, scored: Sequence[Outcome], scores: np.ndarray) -> None:
        """Keeps what the anchors' policies scored, for the runs after this one in a sweep."""
        chosen = {anchor.widths for anchor in self.anchors}
        known = [
            (one.widths, float(score))
            for one, score in zip(scored, scores, strict=True)
            if problem.widths(one.widths) in chosen
        ]
        for i, kept in enumerate(self._kept):
            score = next((s for widths, s in known if widths == kept.widths and kept.steps == self.steps), None)
            self._kept[i] = kept.model_copy(update={"score": score})
        if self._kept:
            self._write()

    def _lessons(self, problem: Problem) -> list[Lessons]:
        """What the shared anchors teach; fine-tuned otherwise, they would teach something else."""
        found = []
        for run in self._shared:
            alike = [kept for kept in run if kept.steps == self.steps and kept.score is not None]
            if not alike:
                continue
            params = [float(problem.costs["params"](problem.widths(kept.widths))) for kept in alike]
            scores, accuracies = [kept.score for kept in alike], [kept.accuracy for kept in alike]
            found.append(Lessons(np.array(scores), np.array(params), np.array(accuracies)))
        return found

    def _write(self) -> None:
        self._directory.write_json(ANCHORS, _File(anchors=tuple(self._kept), shared=self._shared).model_dump())

    def _say(self) -> None:
        correlation = trust(self.anchors)
        if correlation is None:
            return
        log.info("the score against %d anchors of %d steps: Spearman %.2f", len(self.anchors), self.steps, correlation)
        if correlation < WEAK:
            log.warning(
                "the ranking is weak: the score's rank correlation with the accuracy of %d longer fine-tunes is %.2f. "
                "The policies may be too alike to tell apart; else raise --score-steps or --score-images",
                len(self.anchors),
                correlation,
            )
