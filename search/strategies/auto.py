"""Evolution with a guess: of many children the one is scored that a surrogate expects to improve most.

Starts from the uniform and the tilted policies. Children are moves of channels from the best policies so far, as in
`evolution`, but most of them are never scored: a Gaussian process fitted to all trials ranks them by expected
improvement (Jones et al., Journal of Global Optimization 1998). A local Bayesian optimization, in other words (Eriksson
et al., TuRBO, NeurIPS 2019), whose trust region is what a few moves can reach.
"""

from __future__ import annotations

from itertools import islice
from statistics import NormalDist

import numpy as np

from amc.problem import Problem
from search.strategies.base import fresh
from search.strategies.moves import FAR, MovingSampler, Scored, Widths, exchange, move
from search.strategies.surrogate import Surrogate

PARENTS, MOVES, CHILDREN, ADMITTED = 4, 3, 64, 6
SIZES = (0.15, 0.4, FAR)


class AutoSampler(MovingSampler):
    """Each proposal is the most promising of `CHILDREN` policies, most of them a few moves away from a good one."""

    def follow(self, scored: list[Scored], known: set[Widths], rng: np.random.Generator) -> Widths:
        """The child with the highest expected improvement."""
        # What failed counts as bad as the worst: unknown, it would promise most, and all proposals would go there.
        worst = min(one.reward for one in scored)
        surrogate = Surrogate(self.problem, [*(Scored(-1, widths, worst) for widths in self.failed), *scored])
        parents = [one.widths for one in surrogate.kept if one.number >= 0]
        means, _ = surrogate.predict(parents)
        ranked = [parents[i] for i in np.argsort(-means)]

        def child() -> Widths:
            widths = ranked[min(int(rng.geometric(1 / PARENTS)) - 1, len(ranked) - 1)]
            for _ in range(int(rng.integers(1, MOVES + 1))):
                widths = exchange(self.problem, widths, float(rng.choice(SIZES)), rng)
            return widths

        def promising(policies: list[Widths], most: int) -> list[Widths]:
            gains = improvement(*surrogate.predict(policies), float(means.max()))
            return [policies[i] for i in np.argsort(-gains, kind="stable")[:most]]

        # Admitting costs more than guessing, so only the most promising children are admitted, until enough are new.
        children = promising(list(dict.fromkeys(child() for _ in range(CHILDREN))), CHILDREN)
        admitted = (self.problem.admit(widths) for widths in children)
        new = list(islice((widths for widths in admitted if widths not in known), ADMITTED))
        if not new:
            return fresh(known, lambda: move(self.problem, ranked[0], FAR, rng))
        return promising(new, 1)[0]


def improvement(mean: np.ndarray, deviation: np.ndarray, over: float) -> np.ndarray:
    """Expected improvement over a reward."""
    normal = NormalDist()
    z = (mean - over) / deviation
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    return (mean - over) * np.array([normal.cdf(x) for x in z]) + deviation * density


def make(problem: Problem, *, trials: int, seed: int) -> AutoSampler:
    """The sampler."""
    return AutoSampler(problem, trials=trials, seed=seed)
