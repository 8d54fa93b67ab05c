"""What the search's score is worth: some of its policies are fine-tuned for longer, and the run learns from these.

A quick score is noisy, and on some networks it favours the wrong policies. So a share of the search goes to *anchors*,
policies from all over the ranking that are fine-tuned several times as long. They say how far the ranking can be
trusted (Spearman's correlation, in `result.json`), and they calibrate it: accuracy after the long fine-tune is
regressed on the score and on the parameters that a policy keeps. Capacity is worth something after a long fine-tune on
some networks and nothing on others, so its weight starts low and follows the anchors. The policy that the search ends
with has the best calibrated score; the best raw one is the luckiest.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import optuna
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.stats import spearmanr

from amc.finetune import Diverged
from amc.problem import Outcome, Problem
from search.run_directory import ANCHORS, RunDirectory
from search.strategies.moves import Scored, Widths
from search.strategies.surrogate import Surrogate
from search.study import SearchResult, outcome_of, told

log = logging.getLogger("amc")

FEWEST, ENOUGH, MOST = 5, 10, 12
LENGTHS = (32, 16, 8, 4)
"""Of an anchor's fine-tune, in lengths of the score's: the longest that affords enough anchors, or the shortest."""
WEAK = 0.5
"""The correlation below which a ranking is called weak."""
PRIOR, SLACK = (1.0, 0.25), (0.5, 0.5)
"""What score and parameters are worth, mean and standard deviation, in spreads of the score.

On the published ResNet-20 policies parameters were worth 0.04 in a regression of accuracy after 30 steps, 0.13 after
120 and 0.37 after 780 (`docs/benchmarks.md`), so anchors, shorter than the final fine-tune, tell too little of it.
"""
OWN = 0.5
"""The part of what the regression leaves of an anchor's accuracy that is its policy's own; the rest is luck."""
NOISES = (0.1, 0.3, 1.0)
"""Of an anchor's accuracy, in the same unit; the evidence chooses."""

Train = Callable[[dict[str, int], int], float]
"""Widths by group name, steps -> accuracy after a fine-tune of so many steps."""


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


def trust(anchors: Sequence[Anchor]) -> float | None:
    """Spearman's rank correlation of score and fine-tuned accuracy; None where too few differ."""
    scores, accuracies = [a.score for a in anchors], [a.accuracy for a in anchors]
    if len(anchors) < 4 or len(set(scores)) < 2 or len(set(accuracies)) < 2:
        return None
    return float(spearmanr(scores, accuracies)[0])


# ---- which policies


def policies(problem: Problem, study: optuna.Study) -> list[Outcome]:
    """The different policies of a study that were scored and are within the budget, in the order of their trials."""
    outcomes = (outcome_of(problem, t) for t in told(study) if t.value is not None and "repeat" not in t.user_attrs)
    return [outcome for outcome in outcomes if problem.budget.met(problem.widths(outcome.widths))]


def smoothed(problem: Problem, scored: Sequence[Outcome]) -> np.ndarray:
    """`(policies,)` scores without their noise, as far as a Gaussian process over all of them can tell it."""
    seen = [Scored(i, problem.widths(one.widths), one.accuracy) for i, one in enumerate(scored)]
    if len(seen) < FEWEST:
        return np.array([one.reward for one in seen])
    return Surrogate(problem, seen).predict([one.widths for one in seen])[0]


def spread(scores: np.ndarray, count: int) -> list[int]:
    """Indices of `count` anchors: the better half of them from the top, where the choice is made, the rest all over."""
    ranked = [int(i) for i in np.argsort(-scores, kind="stable")]
    top = ranked[: count - count // 2]
    rest = ranked[len(top) :]
    places = np.linspace(0, len(rest) - 1, count - len(top) + 1)[1:] * 0.75  # the worst are no news
    return top + [rest[int(place)] for place in places]


# ---- what the anchors teach


def calibrated(
    problem: Problem, scored: Sequence[Outcome], scores: np.ndarray, anchors: Sequence[Anchor]
) -> np.ndarray:
    """`(policies,)` expected accuracies after the anchors' fine-tune: Bayesian linear regression on the anchors.

    Its prior is the score itself. Without anchors it stays that.
    """
    if not anchors:
        return scores
    params = np.log([one.costs["params"] for one in scored])
    features = np.stack([(x - x.mean()) / max(float(x.std()), 1e-9) for x in (scores, params)], axis=1)
    place = {problem.widths(one.widths): i for i, one in enumerate(scored)}
    seen = features[[place[anchor.widths] for anchor in anchors]]
    unit, centre = max(float(scores.std()), 1e-9), seen.mean(axis=0)
    accuracies = np.array([anchor.accuracy for anchor in anchors]) / unit
    residual = accuracies - accuracies.mean() - (seen - centre) @ PRIOR
    _, weights = max((_posterior(seen - centre, residual, noise) for noise in NOISES), key=lambda found: found[0])
    expected = (features - centre) @ (PRIOR + weights)
    for anchor, left in zip(anchors, residual - (seen - centre) @ weights, strict=True):
        expected[place[anchor.widths]] += OWN * left
    return np.asarray(unit * (accuracies.mean() + expected))


def _posterior(x: np.ndarray, y: np.ndarray, noise: float) -> tuple[float, np.ndarray]:
    """Log evidence and the mean weights of a linear model whose weights start at 0 with the deviations `SLACK`."""
    variance = np.square(SLACK)
    covariance = (x * variance) @ x.T + noise**2 * np.eye(len(y))
    solved = np.linalg.solve(covariance, y)
    evidence = -0.5 * (y @ solved + np.linalg.slogdet(covariance)[1])
    return float(evidence), variance * (x.T @ solved)


# ---- in a run


class _Kept(BaseModel):
    """One anchor as stored."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    widths: dict[str, int]
    steps: Annotated[int, Field(ge=1)]
    accuracy: float
    seconds: Annotated[float, Field(ge=0)]


class _File(BaseModel):
    """`anchors.json`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    anchors: tuple[_Kept, ...] = Field(default=(), strict=False)


class Chooser:
    """Chooses the policy that a search ends with; what was fine-tuned is kept in the run's directory.

    train: fine-tunes a policy. score_steps, rest: what a score takes, see `plan`.
    """

    def __init__(
        self, directory: RunDirectory, train: Train, *, score_steps: int, share: float, rest: float = 0.0
    ) -> None:
        self._directory, self._train, self._score_steps, self._rest = directory, train, score_steps, rest
        self._kept = self._read()
        self.anchors: tuple[Anchor, ...] = ()
        self.steps, self.share = 0, share

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
        chosen = [scored[i] for i in spread(scores, planned.count)] if planned.count else []
        self.anchors = tuple(self._anchored(problem, chosen, report))
        self._say()
        expected = calibrated(problem, scored, scores, self.anchors)
        rewards = [problem.reward(float(a), one.costs, problem.budget) for a, one in zip(expected, scored, strict=True)]
        spent = sum(kept.seconds for kept in self._kept)
        return replace(
            found,
            best=scored[int(np.argmax(rewards))],
            seconds=found.seconds + spent,
            evaluation_seconds=found.evaluation_seconds + spent,
        )

    def proxy(self) -> dict[str, object]:
        """What `result.json` says of the score."""
        return {
            "spearman": trust(self.anchors),
            "samples": len(self.anchors),
            "steps": self.steps,
            "anchors": [{"score": anchor.score, "accuracy": anchor.accuracy} for anchor in self.anchors],
        }

    def _anchored(
        self, problem: Problem, chosen: Sequence[Outcome], report: Callable[[int, int], object]
    ) -> list[Anchor]:
        anchors = []
        for done, one in enumerate(chosen):
            report(done, len(chosen))
            widths = problem.widths(one.widths)
            try:
                anchors.append(Anchor(widths, one.accuracy, self._accuracy(dict(one.widths))))
            except Diverged as error:
                log.warning("an anchor's fine-tune diverged, and is left out: %s", error)
        return anchors

    def _accuracy(self, widths: dict[str, int]) -> float:
        for kept in self._kept:
            if kept.widths == widths and kept.steps == self.steps:
                return kept.accuracy
        start = time.perf_counter()
        accuracy = float(self._train(widths, self.steps))
        if not math.isfinite(accuracy):
            raise Diverged(f"its accuracy is {accuracy}")
        seconds = time.perf_counter() - start
        self._kept.append(_Kept(widths=widths, steps=self.steps, accuracy=accuracy, seconds=seconds))
        self._directory.write_json(ANCHORS, _File(anchors=tuple(self._kept)).model_dump())
        return accuracy

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

    def _read(self) -> list[_Kept]:
        if not (self._directory / ANCHORS).exists():
            return []
        try:
            return list(_File.model_validate(self._directory.read_json(ANCHORS)).anchors)
        except ValidationError as error:
            log.warning("%s is not what a run writes, and is made again: %s", ANCHORS, error.errors()[0]["msg"])
            return []
