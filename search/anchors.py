"""What the search's score is worth: some of its policies are fine-tuned for longer, and the run learns from these.

A quick score is noisy, and it misses what capacity is worth after a long fine-tune: much on some networks, nothing on
others. So a share of the search goes to *anchors*, policies that are fine-tuned several times as long. Half of them are
*contenders*, which few others beat in both score and parameters: whatever capacity is worth, the best policy is one of
these. The others are from all over the ranking. Anchors say how far the ranking can be trusted (Spearman's correlation,
in `result.json`), and they calibrate it (`search/calibration.py`). The policy that the search ends with is the
contender of the best calibrated score; the best raw one is the luckiest. Both ends of what contenders are, the best
score and the most parameters, are among the first anchors, so the choice lies between what was fine-tuned.

A search that affords enough of them has half of them half-way, and goes on by what they taught.

The runs of a sweep share their anchors: what score and capacity are worth is learned from those of all budgets so far,
each compared with the others of its own budget. The correlation is over a run's own: between budgets, size decides.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace

import numpy as np
import optuna
from scipy.stats import spearmanr

from amc.errors import AmcError
from amc.finetune import Diverged
from amc.problem import Outcome, Problem
from search.anchor_file import AnchorFile, Batch, Kept
from search.calibration import Anchor, Lessons, calibrated
from search.contenders import FEWEST, contenders, policies, smoothed, spread
from search.display import Report
from search.executor import Score
from search.numbers import WEAK
from search.run_directory import RunDirectory
from search.strategies.moves import Scored, Widths
from search.study import SearchResult, outcomes

log = logging.getLogger("amc")

ENOUGH, MOST = 10, 12
LENGTHS = (32, 16, 8, 4)
"""Of an anchor's fine-tune, in lengths of the score's: the longest that affords enough anchors, or the shortest."""
Begin = Callable[[dict[str, int], int], Future[Score]]
"""Begins a fine-tune: widths by group name, steps -> the accuracy that is to come."""


@dataclass(frozen=True)
class Plan:
    """How many anchors, and the steps of their fine-tune; none where there are too few trials to spare the time."""

    count: int
    steps: int


def plan(trials: int, score_steps: int, share: float, rest: float = 0.0, least: int = 0) -> Plan:
    """The anchors that a share of the search affords, after so many trials with a score of so many steps.

    rest: what else a score takes, batch norm and the scored images, in steps. least: the steps of those that are there
    already; shorter ones are not planned.
    """
    steps = trials * (score_steps + rest) * share / (1 - share)

    def affordable(length: int) -> int:
        return min(int(steps / (length + rest) + 1e-9), MOST)

    lengths = [length * score_steps for length in LENGTHS if length * score_steps > least]
    for length in lengths:
        if affordable(length) >= (FEWEST if length == LENGTHS[-1] * score_steps else ENOUGH):
            return Plan(affordable(length), length)
    return Plan(affordable(least), least) if least else Plan(0, 0)


def trust(anchors: Sequence[Anchor]) -> float | None:
    """Spearman's rank correlation of score and fine-tuned accuracy; None where too few differ."""
    scores, accuracies = [a.score for a in anchors], [a.accuracy for a in anchors]
    if len(anchors) < 4 or len(set(scores)) < 2 or len(set(accuracies)) < 2:
        return None
    return float(spearmanr(scores, accuracies)[0])


def _rewards(problem: Problem, scored: Sequence[Outcome], scores: np.ndarray) -> np.ndarray:
    """`(policies,)` rewards, were these their scores."""
    pairs = zip(scores, scored, strict=True)
    return np.array([problem.reward(float(score), one.costs, problem.budget) for score, one in pairs])


class Chooser:
    """Chooses the policy that a search ends with, by anchors, which it has fine-tuned and keeps in the run's directory.

    begin: begins a policy's fine-tune, of `at_once` at most. score_steps, rest: what a score takes, see `plan`.
    anchors, steps: those that the choice was made by, and their length.
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
        found = AnchorFile.read(directory)
        self._kept, self._shared, self._batches = list(found.anchors), found.shared, list(found.batches)
        self._failed: list[dict[str, int]] = []
        self.anchors: tuple[Anchor, ...] = ()
        self.steps = max((batch.steps for batch in self._batches), default=0)
        self.shared, self.share = 0, share

    def pauses(self, trials: int | None) -> bool:
        """Whether a search of so many trials, of any number where None, may afford anchors half-way."""
        return self.share > 0 and (trials is None or self._planned(trials).count >= ENOUGH)

    def affords(self, trials: int) -> bool:
        """Whether a search that ended after so many trials has time for anchors."""
        return self._planned(trials).count > 0

    @property
    def begun(self) -> bool:
        """Whether anchors were chosen already, now or before a break."""
        return bool(self._batches)

    def learn(self, problem: Problem, study: optuna.Study, trials: int | None, report: Report) -> None:
        """Half-way through a search: fine-tunes the first half of its anchors, for `worth`, if it affords enough.

        trials: of the whole search, if known. report: called with (anchors done, anchors in all).
        """
        scored = policies(problem, study)
        if scored and not self.begun:
            planned = self._planned(min(trials or 2 * len(scored), 2 * len(scored)))
            planned = Plan(planned.count // 2, planned.steps) if planned.count >= ENOUGH else Plan(0, 0)
            rewards = _rewards(problem, scored, smoothed(problem, scored))
            self._choose_batch(problem, scored, rewards, planned, len(scored), half=True)
        for batch in self._batches:
            if batch.half and batch.policies:
                self._fine_tune(batch, report)
                log.info("half-way: %d anchors of %d steps say how the search goes on", len(batch.policies), self.steps)

    def worth(self, problem: Problem, scored: list[Scored]) -> list[Scored]:
        """Policies that the problem knows, with the rewards that the anchors so far let one expect of them."""
        known = {one.widths: problem.evaluate(one.widths) for one in scored}
        expected = self._expected(problem, known, np.array([one.score for one in known.values()]))
        rewards = dict(zip(known, expected.tolist(), strict=True))
        return [one._replace(reward=rewards[one.widths]) for one in scored]

    def choose(self, problem: Problem, study: optuna.Study, found: SearchResult, report: Report) -> SearchResult:
        """The search's result, with the contender of the best calibrated score as its best.

        What is no longer within the budget, since a cost was corrected, teaches as well as the rest.
        report: called with (anchors done, anchors in all).
        """
        known = {problem.widths(one.widths): one for one in outcomes(problem, study)}
        within = [i for i, widths in enumerate(known) if problem.budget.met(widths)]
        if not within or found.best is None:
            return found
        told = list(known.values())
        scores = smoothed(problem, told)
        rewards = _rewards(problem, told, scores)[within]
        scored = [told[i] for i in within]
        planned = self._planned(len(told))
        self._fine_tune(self._choose_batch(problem, scored, rewards, planned, len(told)), report)
        self.anchors = tuple(self._anchors(problem, known))
        self._say()
        self._note_scores(problem, known, scores)
        self.shared = sum(len(one.scores) for one in self._lessons(problem)) if self.anchors else 0
        expected = self._expected(problem, known, scores)[within]
        among: Sequence[int] = range(len(scored))
        if self.anchors:
            among = contenders(rewards, np.array([one.costs["params"] for one in scored]), planned.count)
        best = max(among, key=lambda i: expected[i])
        return replace(
            found,
            best=scored[best],
            seconds=found.seconds + sum(kept.seconds for kept in self._kept),
            evaluation_seconds=found.evaluation_seconds + sum(kept.busy for kept in self._kept),
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
        return plan(trials, self._score_steps, self.share, self._rest, self.steps)

    def _choose_batch(
        self,
        problem: Problem,
        scored: Sequence[Outcome],
        rewards: np.ndarray,
        planned: Plan,
        trials: int,
        half: bool = False,
    ) -> Batch:
        """As many anchors as planned, less those that are there; after a break, the ones that were chosen before it."""
        self.steps = planned.steps
        for batch in self._batches:
            if (batch.trials, batch.half, batch.steps) == (trials, half, planned.steps):
                return batch
        widths = [dict(one.widths) for one in scored]
        tuned = [kept.widths for kept in self._tuned(planned.steps)]
        there = [i for i, each in enumerate(widths) if each in tuned]
        beyond = sum(kept.steps == planned.steps and kept.widths not in widths for kept in self._kept)
        failed = [i for i, each in enumerate(widths) if each in self._failed]
        chosen = spread(problem, scored, rewards, planned.count - len(there) - beyond, [*there, *failed])
        named = tuple(widths[i] for i in chosen)
        batch = Batch(trials=trials, half=half, steps=planned.steps, policies=named)
        if half or chosen:
            self._batches.append(batch)
            self._write()
        return batch

    def _fine_tune(self, batch: Batch, report: Report) -> None:
        """Fine-tunes what was not."""
        done = [kept.widths for kept in self._tuned(batch.steps)] + self._failed
        left = deque(widths for widths in batch.policies if widths not in done)
        if not left:
            return
        under_way: dict[Future[Score], dict[str, int]] = {}
        since = time.perf_counter()
        while left or under_way:
            report(len(batch.policies) - len(left) - len(under_way), len(batch.policies))
            while left and len(under_way) < self._at_once:
                widths = left.popleft()
                under_way[self._begin(dict(widths), batch.steps)] = widths
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                widths = under_way.pop(future)
                try:
                    self._keep(widths, batch.steps, future.result(), since)
                except AmcError:
                    raise
                except Exception as error:  # as a trial: one that fails is left out
                    self._failed.append(widths)
                    log.warning("an anchor's fine-tune failed, and is left out: %s: %s", type(error).__name__, error)
                else:
                    since = time.perf_counter()
        report(len(batch.policies), len(batch.policies))

    def _tuned(self, steps: int) -> list[Kept]:
        """What was fine-tuned for so many steps, for this run and those before it in a sweep, its own first."""
        return [kept for kept in itertools.chain(self._kept, *self._shared) if kept.steps == steps]

    def _anchors(self, problem: Problem, known: Mapping[Widths, Outcome]) -> list[Anchor]:
        """Those of the known policies that were fine-tuned; of two fine-tunes, the run's own counts."""
        tuned = {problem.widths(kept.widths): kept for kept in reversed(self._tuned(self.steps))}
        return [
            Anchor(widths, known[widths].score, tuned[widths].end, tuned[widths].accuracy)
            for widths in known
            if widths in tuned
        ]

    def _expected(self, problem: Problem, known: Mapping[Widths, Outcome], scores: np.ndarray) -> np.ndarray:
        """`(policies,)` rewards that the anchors let one expect of known policies."""
        told, anchors = list(known.values()), self._anchors(problem, known)
        if anchors:
            params = np.array([one.costs["params"] for one in told])
            scores = calibrated(list(known), scores, params, anchors, self._lessons(problem))
        return _rewards(problem, told, scores)

    def _keep(self, widths: Mapping[str, int], steps: int, score: Score, since: float) -> None:
        """Keeps an anchor at once, with the time since the one before."""
        accuracy, reached = score.worth
        if not math.isfinite(accuracy):
            raise Diverged(f"its accuracy is {accuracy}")
        self._kept.append(
            Kept(
                widths=dict(widths),
                steps=steps,
                accuracy=accuracy,
                reached=reached,
                seconds=time.perf_counter() - since,
                evaluation_seconds=score.seconds,
            )
        )
        self._write()

    def _note_scores(self, problem: Problem, known: Mapping[Widths, Outcome], scores: np.ndarray) -> None:
        """Keeps what the anchors' policies scored, for the runs after this one in a sweep."""
        noted = dict(zip(known, scores.tolist(), strict=True))
        for i, kept in enumerate(self._kept):
            score = noted.get(problem.widths(kept.widths)) if kept.steps == self.steps else None
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
            scores, reached = [kept.score for kept in alike], [kept.end for kept in alike]
            found.append(Lessons(np.array(scores), np.array(params), np.array(reached)))
        return found

    def _write(self) -> None:
        AnchorFile(anchors=tuple(self._kept), batches=tuple(self._batches), shared=self._shared).write(self._directory)

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
