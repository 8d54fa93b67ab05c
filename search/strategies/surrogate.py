"""What a policy would score, guessed from those that were scored: a Gaussian process on logarithms of keep ratios.

Its kernel says what is known beforehand of pruned networks: stages matter as a whole, each group adds a smooth curve of
its own, and what remains is smooth in all of them (Duvenaud et al., Additive Gaussian Processes, NeurIPS 2011). How
much of each, and how noisy scores are, is chosen by the marginal likelihood (Rasmussen and Williams 2006, section
5.4.1) from a few mixtures. It knows nothing of which stages or groups matter: that is learned, problem by problem.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_solve, solve_triangular

from amc.problem import Problem
from search.strategies.moves import Scored, Widths, stages

MIXTURES = tuple(
    (stage, single, joint, noise)
    for stage, single, joint in ((0.6, 0.3, 0.1), (0.3, 0.6, 0.1), (0.1, 0.3, 0.6), (0.1, 0.8, 0.1))
    for noise in (1e-4, 1e-3, 1e-2, 1e-1)
)
LENGTHS = (0.7, 1.5, 4.0)
MOST = 300


class Surrogate:
    """The posterior after some scored policies; in units of the rewards' spread, higher is better.

    kept: those of them that it rests on.
    """

    def __init__(self, problem: Problem, scored: Sequence[Scored]) -> None:
        self._channels = np.array(problem.budget.dense, dtype=float)
        parts = stages(problem)
        self._stage = np.zeros((len(self._channels), len(parts)))
        for s, part in enumerate(parts):
            self._stage[part, s] = 1 / len(part)
        self.kept = _worth_keeping(scored)
        self._seen = self.features([one.widths for one in self.kept])
        rewards = np.array([one.reward for one in self.kept])
        # A policy that collapsed tells no more than one that is merely bad, and would flatten all others.
        middle, top = np.median(rewards), rewards.max()
        if top > middle:  # else most are as good as the best, and how bad the others are is all there is to know
            rewards = np.maximum(rewards, middle - 2 * (top - middle))
        self.mean, self.spread = float(rewards.mean()), max(float(rewards.std()), 1e-9)
        targets = (rewards - self.mean) / self.spread
        best = -np.inf
        for self._length in LENGTHS:
            kernels = self._kernels(self._seen, self._seen)
            for mixture in MIXTURES:
                covariance = np.tensordot(mixture[:3], kernels, 1) + mixture[3] * np.eye(len(targets))
                factor = np.linalg.cholesky(covariance)
                alpha = cho_solve((factor, True), targets)
                scale = max(targets @ alpha / len(targets), 1e-9)  # the likelihood's maximum over the amplitude
                likelihood = -0.5 * len(targets) * np.log(scale) - np.log(np.diag(factor)).sum()
                if likelihood > best:
                    best, chosen = likelihood, (self._length, mixture, scale**0.5, factor, alpha)
        self._length, self.mixture, self.scale, self._factor, self._alpha = chosen

    def features(self, policies: Sequence[Widths]) -> np.ndarray:
        """`(policies, groups)` logarithms of keep ratios."""
        return np.log(np.asarray(policies, dtype=float) / self._channels)

    def predict(self, policies: Sequence[Widths]) -> tuple[np.ndarray, np.ndarray]:
        """`(policies,)` means and standard deviations of their rewards, without the noise of a score."""
        across = np.tensordot(self.mixture[:3], self._kernels(self.features(policies), self._seen), 1)
        reduced = solve_triangular(self._factor, across.T, lower=True)
        variance = np.maximum(sum(self.mixture[:3]) - (reduced**2).sum(axis=0), 1e-12)
        return across @ self._alpha * self.spread + self.mean, np.sqrt(variance) * self.spread * self.scale

    def _kernels(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """`(3, len(a), len(b))`: of stages, of single groups, and of all groups jointly; 1 between equals."""
        stage = _rbf(((a @ self._stage)[:, None] - (b @ self._stage)[None]) ** 2, self._length).mean(axis=2)
        squared = (a[:, None] - b[None]) ** 2
        return np.stack([stage, _rbf(squared, self._length).mean(axis=2), _rbf(squared.mean(axis=2), self._length)])


def _rbf(squared: np.ndarray, length: float) -> np.ndarray:
    return np.exp(-squared / (2 * length**2))


def _worth_keeping(scored: Sequence[Scored]) -> list[Scored]:
    """All, or the best and the latest ones: the work grows with the third power of their number."""
    if len(scored) <= MOST:
        return list(scored)
    latest = scored[-MOST // 2 :]
    older = sorted(scored[: -MOST // 2], key=lambda one: -one.reward)[: MOST // 2]
    return sorted([*older, *latest])
