"""Criteria that look at the weights alone: norms, batch-norm scales, distance to the geometric median.

They cost nothing and need no data. Members are the layers that produce a group's channels (for `bn_scale`, their
norms): a residual stream sums over every block that writes to it.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

from amc.importance import Evidence, Members, by_unit


def l1(evidence: Evidence) -> Members:
    """L1 norm of a unit's filters (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.1)."""
    return {g.name: [rows.abs().sum(1) for rows in evidence.filters(g)] for g in evidence.groups}


def l2(evidence: Evidence) -> Members:
    """L2 norm of a unit's filters (He et al., Soft Filter Pruning, IJCAI 2018, section 3.2)."""
    return {g.name: [rows.norm(dim=1) for rows in evidence.filters(g)] for g in evidence.groups}


def bn_scale(evidence: Evidence) -> Members:
    """Absolute scale of a unit's normalization (Liu et al., Network Slimming, ICCV 2017, section 3)."""

    def is_scale(tensor: str) -> bool:
        path, _, leaf = tensor.rpartition(".")
        return leaf == "weight" and "Norm" in type(evidence.model.get_submodule(path)).__name__

    return {
        g.name: [
            by_unit(part, evidence.tensors[part.tensor], g.channels).double().abs().sum(1)
            for part in g.slices
            if is_scale(part.tensor)
        ]
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
