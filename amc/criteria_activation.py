"""Criteria that look at activations: how large, how varied, how often above zero.

One pass over the calibration batches gathers the moments of what every reader of a group is given, so the
activation is the one after batch norm and non-linearity, whatever lies between. Members are the readers; of a unit
with several positions (a head, a channel flattened into a linear layer), the mean over its positions counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from amc.forward import call
from amc.groups import Group, Slice
from amc.importance import Evidence, Members
from amc.roles import by_unit_order, channel_axis, readers, rows_of, watching


@dataclass
class Moments:
    """Of each channel that a layer reads, over samples and positions, `(inputs,)` float64 sums of `count` values."""

    count: int
    absolute: Tensor
    total: Tensor
    square: Tensor
    positive: Tensor


def activation_mean(evidence: Evidence) -> Members:
    """Mean absolute activation (Molchanov et al., ICLR 2017, section 2.2; there after a ReLU, where |a| = a)."""
    return _members(evidence, lambda m: m.absolute / m.count)


def activation_variance(evidence: Evidence) -> Members:
    """Variance of the activation (Polyak and Wolf, Channel-Level Acceleration, IEEE Access 2015, section III)."""
    return _members(evidence, lambda m: (m.square / m.count - (m.total / m.count) ** 2).clamp_min(0))


def apoz(evidence: Evidence) -> Members:
    """One less the average percentage of zeros (Hu et al., Network Trimming, arXiv 1607.03250, section 2.1).

    Counted is what is above zero: the same after a ReLU, and it still tells channels apart after GELU or SiLU.
    """
    return _members(evidence, lambda m: m.positive / m.count)


def wanda(evidence: Evidence) -> Members:
    """`|weight| * ||input||`, summed over a unit's weights in its reader (Sun et al., ICLR 2024, section 3)."""
    members: dict[str, list[Tensor]] = {}
    for group, part, moments in _watched(evidence):
        weight = rows_of(part, evidence.tensor(part)).double().abs().sum(1)  # (m,), by unit
        norm = moments.square.sqrt()[part.index[by_unit_order(part)]]
        members.setdefault(group.name, []).append((weight * norm).reshape(group.channels, -1).sum(1))
    return members


def _members(evidence: Evidence, statistic: Callable[[Moments], Tensor]) -> Members:
    members: dict[str, list[Tensor]] = {}
    for group, part, moments in _watched(evidence):
        values = statistic(moments)[part.index[by_unit_order(part)]]
        members.setdefault(group.name, []).append(values.reshape(group.channels, -1).mean(1))
    return members


def _watched(evidence: Evidence) -> list[tuple[Group, Slice, Moments]]:
    found = readers(evidence.model, evidence.structure)
    seen: dict[str, Moments] = {}

    def see(tensor: str, layer: torch.nn.Module, inputs: Tensor) -> None:
        x = inputs.movedim(channel_axis(layer, inputs), 0).flatten(1).double()
        sums = (x.abs().sum(1), x.sum(1), (x * x).sum(1), (x > 0).double().sum(1))
        if tensor not in seen:
            seen[tensor] = Moments(x.shape[1], *sums)
            return
        moments = seen[tensor]
        moments.count += x.shape[1]
        for total, more in zip((moments.absolute, moments.total, moments.square, moments.positive), sums, strict=True):
            total += more

    with torch.inference_mode(), watching(evidence.model, found, see):
        for inputs, _ in evidence.batches:
            call(evidence.model, inputs)
    return [(g, part, seen[tensor]) for tensor, parts in found.items() if tensor in seen for g, part in parts]
