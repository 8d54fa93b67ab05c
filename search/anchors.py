"""What the search's score is worth: some of its policies are fine-tuned for longer, and the run learns from these.

A quick score is noisy, and it misses what capacity is worth after a long fine-tune: much on some networks, nothing on
others. So a share of the search goes to *anchors*, policies that are fine-tuned several times as long. Half of them are
*contenders*, which few others beat in both score and parameters: whatever capacity is worth, the best policy is one of
these. The others are from all over the ranking. Anchors say how far the ranking can be trusted (Spearman's correlation,
in `result.json`), and they calibrate it (`search/calibration.py`). The policy that the search ends with is the
contender of the best calibrated score; the best raw one is the luckiest. Both ends of what contenders are, the best
score and the most parameters, are anchors themselves, so the choice lies between what was measured.

A search that affords enough of them has its first half of the anchors half-way, and goes on by what they taught.

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
from search.calibration import Anchor, Lessons, calibrated
from search.executor import Score
from search.numbers import WEAK
from search.run_directory import ANCHORS, RunDirectory
from search.strategies.moves import Scored
from search.strategies.surrogate import Surrogate
from search.study import SearchResult, outcomes

log = logging.getLogger("amc")

FEWEST, ENOUGH, MOST = 5, 10, 12
LENGTHS = (32, 16, 8, 4)
"""Of an anchor's fine-tune, in lengths of the score's: the longest that affords enough anchors, or the shortest."""
Begin = Callable[[dict[str, int], int], Future[Score]]
"""Begins a fine-tune: widths by group name, steps -> the accuracy that is to come."""
Report = Callable[[int, int], object]


@dataclass(frozen=True)
class Plan:
    """How many anchors, and the steps of their fine-tune; none where there are too few trials to spare the time."""

    count: int
    steps: int


def plan(trials: int, score_steps: int, share: float, rest: float = 0.0, begun: int | None = None) -> Plan:
    """The anchors that a share of the search affords, after so many trials with a score of so many steps.

    rest: what else a score takes, batch norm and the scored images, in steps. begun: the steps of those that are there.
    """
    steps = trials * (score_steps + rest) * share / (1 - share)
    lengths = [length * score_steps for length in LENGTHS] if score_steps else []
    for length in [begun] if begun else lengths:
        count = int(steps / (length + rest) + 1e-9)
        if begun or count >= (FEWEST if length == lengths[-1] else ENOUGH):
            return Plan(min(count, MOST), length)
    return Plan(0, 0)


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


def contenders(rewards: np.ndarray, params: np.ndarray, count: int) -> list[int]:
    """Indices of about a quarter of the policies, or `count`, that fewest others beat in both reward and parameters.

    Fronts of policies, each one those that none of the rest beats in both, from the highest reward to the most
    parameters; as many whole ones as it takes.
    """
    left = np.lexsort((-params, -rewards))
    found: list[int] = []
    while len(left) and len(found) < max(len(rewards) // 4, count, 1):
        most = np.maximum.accumulate(params[left])
        front = np.concatenate([[True], params[left][1:] > most[:-1]])
        found += left[front].tolist()
        left = left[~front]
    return found


def spread(
    problem: Problem, scored: Sequence[Outcome], rewards: np.ndarray, count: int, taken: Sequence[int] = ()
) -> list[int]:
    """Indices of up to `count` further anchors: half of them contenders, where the choice is made, the rest all over.

    The contenders are the best, the one that keeps most parameters, and whoever is farthest from those taken so far, in
    logarithms of the keep ratios.
    """
    if count <= 0:
        return []
    channels = [group.channels for group in problem.groups]
    places = np.log(np.array([problem.widths(one.widths) for one in scored]) / channels)
    params = np.array([one.costs["params"] for one in scored])
    top = [i for i in contenders(rewards, params, count) if i not in taken]
    near = np.full(len(scored), np.inf)
    for i in taken:
        near = np.minimum(near, np.square(places - places[i]).sum(axis=1))
    ends = [max(top, key=lambda i: rewards[i]), max(top, key=lambda i: params[i])] if top else []
    chosen: list[int] = []
    while len(chosen) < min(count - count // 2, len(top)):
        chosen.append(ends.pop(0) if ends else max(top, key=lambda i: near[i]))
        near = np.minimum(near, np.square(places - places[chosen[-1]]).sum(axis=1))
        ends = [i for i in ends if i not in chosen]
    rest = [int(i) for i in np.argsort(-rewards, kind="stable") if i not in chosen and i not in taken]
    wanted = np.linspace(0, len(rest) - 1, count - len(chosen) + 1)[1:] * 0.75  # the worst are no news
    return list(dict.fromkeys([*chosen, *(rest[int(place)] for place in wanted if rest)]))


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


class _First(BaseModel):
    """The policies that were chosen half-way, and the steps of their fine-tune."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    policies: Annotated[tuple[dict[str, int], ...], Field(strict=False)]
    steps: Annotated[int, Field(ge=1)]


class _File(BaseModel):
    """`anchors.json`. shared: those of the runs before this one in its sweep, a run each."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    anchors: tuple[_Kept, ...] = Field(default=(), strict=False)
    first: _First | None = None
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
        self._kept, self._shared, self._first = list(found.anchors), found.shared, found.first
        self.anchors: tuple[Anchor, ...] = ()
        self.steps, self.shared, self.share = 0, 0, share

    def pauses(self, trials: int | None) -> bool:
        """Whether a search of so many trials, of any number where None, affords anchors half-way."""
        return self.share > 0 and (trials is None or self._planned(trials).count >= ENOUGH)

    def learn(self, problem: Problem, study: optuna.Study, trials: int | None, report: Report) -> None:
        """Half-way through a search: fine-tunes the first half of its anchors, from which the rest of it learns.

        trials: of the whole search, if known. report: called with (anchors done, anchors in all).
        """
        scored = policies(problem, study)
        if self._first is None:
            planned = self._planned(trials or 2 * len(scored))
            if planned.count < ENOUGH or not scored:
                return
            rewards = _rewards(problem, scored, smoothed(problem, scored))
            chosen = spread(problem, scored, rewards, planned.count // 2)
            self._first = _First(policies=tuple(dict(scored[i].widths) for i in chosen), steps=planned.steps)
        self.steps = self._first.steps
        self._fine_tune([one for one in scored if dict(one.widths) in self._first.policies], report)
        self.anchors = tuple(self._anchors(problem, scored))
        log.info("half-way, %d anchors of %d steps; the search goes on by what they say", len(self.anchors), self.steps)

    def worth(self, problem: Problem, study: optuna.Study, scored: list[Scored]) -> list[Scored]:
        """Policies of the study with the rewards that the anchors so far let one expect of them."""
        if not self.anchors:
            return scored
        known = outcomes(problem, study)
        scores = np.array([one.accuracy for one in known])
        expected = _rewards(problem, known, calibrated(problem, known, scores, self.anchors, self._lessons(problem)))
        rewards = {problem.widths(one.widths): float(reward) for one, reward in zip(known, expected, strict=True)}
        return [one._replace(reward=rewards[one.widths]) for one in scored]

    def choose(self, problem: Problem, study: optuna.Study, found: SearchResult, report: Report) -> SearchResult:
        """The search's result, with the policy of the best calibrated score as its best.

        report: called with (anchors done, anchors in all).
        """
        scored = policies(problem, study)
        if not scored or found.best is None:
            return found
        scores = smoothed(problem, scored)
        rewards = _rewards(problem, scored, scores)
        planned = self._planned(len(scored))
        self.steps = planned.steps
        first = [i for i, one in enumerate(scored) if self._first and dict(one.widths) in self._first.policies]
        chosen = [*first, *spread(problem, scored, rewards, planned.count - len(first), first)]
        self._fine_tune([scored[i] for i in chosen], report)
        self.anchors = tuple(self._anchors(problem, [scored[i] for i in chosen]))
        self._say()
        self._note_scores(problem, scored, scores)
        lessons = self._lessons(problem) if self.anchors else []
        self.shared = sum(len(one.scores) for one in lessons)
        expected = _rewards(problem, scored, calibrated(problem, scored, scores, self.anchors, lessons))
        among: Sequence[int] = range(len(scored))
        if self.anchors:
            among = contenders(rewards, np.array([one.costs["params"] for one in scored]), planned.count)
        best = max(among, key=lambda i: expected[i])
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

    def _planned(self, trials: int) -> Plan:
        begun = self._first.steps if self._first else None
        return plan(trials, self._score_steps, self.share, self._rest, begun)

    def _fine_tune(self, chosen: Sequence[Outcome], report: Report) -> None:
        """Fine-tunes what was not."""
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

    def _anchors(self, problem: Problem, policies: Sequence[Outcome]) -> list[Anchor]:
        """Those of the policies that were fine-tuned."""
        return [
            Anchor(problem.widths(one.widths), one.accuracy, accuracy)
            for one in policies
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
        kept = _File(anchors=tuple(self._kept), first=self._first, shared=self._shared)
        self._directory.write_json(ANCHORS, kept.model_dump())

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
