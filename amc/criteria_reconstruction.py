"""Criteria that look at the next layer's output: which units it can best do without.

A unit's contribution to its reader's output on sampled patches is `X_u W_u`, and the output is the sum of all. Both
criteria only need the inner products `M[u, v] = <X_u W_u, X_v W_v>`, `(channels, channels)`, which follow from the
reader's Gram matrix: the sum over the positions of u and v of `(W Wᵀ) * G`. Several readers are summed, each relative
to the energy of what it gets from the group, so that a loud one does not decide alone. A group is one member.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from amc.importance import Evidence, Members
from amc.reconstruct import gather
from amc.roles import readers


def thinet(evidence: Evidence) -> Members:
    """When a unit is removed: at each step, the one whose loss hurts the reader's output least goes.

    Luo et al., ThiNet, ICCV 2017, section 3.2, algorithm 1: the removed set T grows by the unit that keeps
    `||sum of contributions over T||²` smallest.
    """
    return _members(evidence, removal_step)


def lasso(evidence: Evidence) -> Members:
    """The penalty at which a unit leaves the LASSO `min ||Y - sum of b_u X_u W_u||² + penalty |b|`.

    He et al., Channel Pruning, ICCV 2017, section 3.1, equation 2. The set that one penalty selects need not contain
    that of a larger one; ordering units by the largest penalty that they survive makes the widths nested.
    """
    return _members(evidence, last_penalty)


def removal_step(products: np.ndarray) -> np.ndarray:
    """Step at which greedy removal takes each unit, `(channels,)`, from inner products `(channels, channels)`."""
    channels = len(products)
    step = np.full(channels, -1.0)
    cost = np.diag(products).copy()  # of taking the unit next: 2 <T, u> + <u, u>
    for at in range(channels):
        unit = np.flatnonzero(step < 0)[np.argmin(cost[step < 0])]
        step[unit] = at
        cost += 2 * products[unit]
    return step


def last_penalty(products: np.ndarray) -> np.ndarray:
    """The largest penalty at which each unit's coefficient is not zero, `(channels,)`.

    Units that the path never takes in (a copy of another, say) come below all that it does, by their energy.
    """
    from sklearn.linear_model import lars_path_gram  # half a second to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copies it drops one, as it should, and says so
        penalties, _, coefficients = lars_path_gram(
            products.sum(1), products, n_samples=1, method="lasso", max_iter=16 * len(products)
        )
    alive = coefficients != 0  # (channels, knots), penalties falling
    entered = alive.any(1)
    knot = np.maximum(alive.argmax(1) - 1, 0)  # a coefficient grows from the knot before the first that shows it
    survived = np.where(entered, penalties[knot], 0.0)
    energy = np.diag(products) / max(np.diag(products).max(), np.finfo(float).tiny)
    floor = survived[entered].min() if entered.any() else 1.0
    return np.where(entered, survived, floor * energy / 2)


def _members(evidence: Evidence, importance: Callable[[np.ndarray], np.ndarray]) -> Members:
    return {name: [torch.from_numpy(importance(m.numpy()))] for name, m in inner_products(evidence).items()}


def inner_products(evidence: Evidence) -> dict[str, Tensor]:
    """Of every group that a convolution or linear layer reads, inner products of its units' contributions."""
    grams = gather(evidence.model, evidence.structure, evidence.batches, seed=evidence.seed)
    products: dict[str, Tensor] = {}
    for name, parts in readers(evidence.model, evidence.structure).items():
        if name not in grams:
            continue
        gram = grams[name]
        for group, part in parts:
            columns = gram.columns(part.index)
            unit = torch.from_numpy(np.repeat(part.unit, gram.kernel))
            weight = gram.weight[columns]
            terms = (weight @ weight.T) * gram.matrix[columns][:, columns]
            folded = torch.zeros(group.channels, len(unit), dtype=terms.dtype).index_add(0, unit, terms)
            folded = torch.zeros(group.channels, group.channels, dtype=terms.dtype).index_add(1, unit, folded)
            energy = folded.sum()
            if energy > 0:
                products[group.name] = products.get(group.name, 0) + folded / energy
    return products
