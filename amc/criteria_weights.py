"""Criteria that look at the weights alone: norms, batch-norm scales, distance to the geometric median.

They cost nothing and need no data. Members are the layers that produce a group's channels (for `bn_scale`, their
norms): a residual stream sums over every block that writes to it.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

from amc.importance import Evidence, Members
from amc.roles import by_unit, owner


def l1(evidence: Evidence) -> Members:
    """L1 norm of a unit's filters (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.1)."""
    return {g.name: [rows.abs().sum(1) for rows in evidence.filters(g)] for g in evidence.groups}


def l2(evidence: Evidence) -> Members:
    """L2 norm of a unit's filters (He et al., Soft Filter Pruning, IJCAI 2018, section 3.2)."""
    return {g.name: [rows.norm(dim=1) for rows in evidence.filters(g)] for g in evidence.groups}


def bn_scale(evidence: Evidence) -> Members:
    """Absolute scale of a unit's normalization (Liu et al., Network Slimming, ICCV 2017, section 3)."""

    def is_scale(tensor: str) -> bool:
        return tensor.endswith("weight") and "Norm" in type(owner(evidence.model, tensor)).__name__

    return {
        g.name: [
            by_unit(part, evidence.tensors[part.tensor], g.channels).double().abs().sum(1)
            for part in g.slices
            if is_scale(part.tensor)
        ]
        for g in evidence.groups
    }


def fpgm(evidence: Evidence) -> Members:
    """Sum of a filter's distances to its layer's other filters: near the geometric median, others can stand in for it.

    He et al., Filter Pruning via Geometric Median, CVPR 2019, section 3.2, equation 8.
    """
    # Distances by matrix products lose the digits that tell near-duplicates apart.
    exact = "donot_use_mm_for_euclid_dist"
    return {
        g.name: [torch.cdist(rows, rows, compute_mode=exact).sum(1) for rows in evidence.filters(g)]
        for g in evidence.groups
    }


def random(evidence: Evidence) -> Members:
    """A random order, the control; of the seed and the group's name, so that other groups don't shift it."""
    return {
        g.name: [
            torch.from_numpy(np.random.default_rng([evidence.seed, zlib.crc32(g.name.encode())]).random(g.channels))
        ]
        for g in evidence.groups
    }
