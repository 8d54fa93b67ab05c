"""What anchors teach: what a longer fine-tune reaches, regressed on the score and on the parameters that are kept.

Capacity is worth much after a long fine-tune on some networks and nothing on others, so its weight follows the anchors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.strategies.moves import Widths

PRIOR, SLACK = (1.0, 0.3), (0.5, 0.5)
"""What score and parameters are worth, mean and standard deviation, in spreads of the score.

On the published ResNet-20 policies, in a regression of the accuracy after 780 steps on a score of 30, parameters are
worth 0.29. In one on those of ResNet-56 they are worth 0.12 (`docs/benchmarks.md`).
"""
OWN = 0.5
"""The part of what the regression leaves of what an anchor reached that is its policy's own; the rest is luck."""
NOISES = (0.1, 0.3, 1.0)
"""Of what an anchor reached, in the same unit; the evidence chooses."""


@dataclass(frozen=True)
class Anchor:
    """A policy that was both scored and fine-tuned for longer, on the same images.

    score, reached: as the search scores, after the steps of a score and of a longer fine-tune. accuracy: after the
    latter.
    """

    widths: Widths
    score: float
    reached: float
    accuracy: float


@dataclass(frozen=True)
class Lessons:
    """What another search's anchors were: `(anchors,)` smoothed scores, parameters and what they reached."""

    scores: np.ndarray
    params: np.ndarray
    reached: np.ndarray


def calibrated(
    policies: Sequence[Widths],
    scores: np.ndarray,
    params: np.ndarray,
    anchors: Sequence[Anchor],
    shared: Sequence[Lessons] = (),
) -> np.ndarray:
    """`(policies,)` scores that one may expect after the anchors' fine-tune: Bayesian linear regression on the anchors.

    scores, params: `(policies,)`, smoothed or not. anchors: some of the policies, at least one. shared: the anchors of
    other searches for the same network; each search has an intercept of its own.
    """
    params = np.log(params)
    unit, span = (max(float(x.std()), 1e-9) for x in (scores, params))
    features = np.stack([(scores - scores.mean()) / unit, (params - params.mean()) / span], axis=1)
    place = {widths: i for i, widths in enumerate(policies)}
    seen = features[[place[anchor.widths] for anchor in anchors]]
    reached = np.array([anchor.reached for anchor in anchors]) / unit
    x, residual = seen - seen.mean(axis=0), reached - reached.mean()
    others = [_centred(lessons, unit, span) for lessons in shared]
    every_x = np.concatenate([x, *(other_x for other_x, _ in others)])
    every_residual = np.concatenate([residual, *(other for _, other in others)]) - every_x @ PRIOR
    _, weights = max((_posterior(every_x, every_residual, noise) for noise in NOISES), key=lambda found: found[0])
    weights = PRIOR + weights
    weights[0] = max(weights[0], 0.0)  # where anchors contradict the score, it says nothing, never the opposite
    expected = (features - seen.mean(axis=0)) @ weights
    for anchor, left in zip(anchors, residual - x @ weights, strict=True):
        expected[place[anchor.widths]] += OWN * left
    return np.asarray(unit * (reached.mean() + expected))


def _centred(lessons: Lessons, unit: float, span: float) -> tuple[np.ndarray, np.ndarray]:
    """`(anchors, 2)` features and `(anchors,)` scores reached, about their means, in this search's units."""
    x = np.stack([lessons.scores / unit, np.log(lessons.params) / span], axis=1)
    return x - x.mean(axis=0), (lessons.reached - lessons.reached.mean()) / unit


def _posterior(x: np.ndarray, y: np.ndarray, noise: float) -> tuple[float, np.ndarray]:
    """Log evidence and the mean weights of a linear model whose weights start at 0 with the deviations `SLACK`."""
    variance = np.square(SLACK)
    covariance = (x * variance) @ x.T + noise**2 * np.eye(len(y))
    solved = np.linalg.solve(covariance, y)
    evidence = -0.5 * (y @ solved + np.linalg.slogdet(covariance)[1])
    return float(evidence), variance * (x.T @ solved)
