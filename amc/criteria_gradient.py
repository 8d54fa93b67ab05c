"""Criteria that look at the loss: what it would do, to first or second order, if a unit were gone.

All three put a gate of 1 on each unit where its readers take it in, one gate for all readers, and differentiate the
mean loss of the calibration batches with respect to it: removing the unit is moving its gate to 0. The model is in
evaluation mode, so that batch norm is the affine map it will be, and its parameters and their gradients are never
touched. A group is one member: what its readers lose is summed before it is squared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from amc.forward import call
from amc.importance import Evidence, Members
from amc.roles import channel_axis, readers, watching
from amc.seeding import derive

Gates = dict[tuple[str, int], Tensor]  # (group, rows) -> ones (rows, channels)
Key = TypeVar("Key", bound=Hashable)

PROBES = 4  # random sign vectors a batch


def taylor(evidence: Evidence) -> Members:
    """Squared gradient of the gate, mean over batches.

    Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, section 3.1, `(gradient * weight)^2`
    of a gate. For an inner channel this equals the sum over its batch norm's scale and shift, which did best in the
    paper; summing over the filters as well counts the unit twice.
    """
    means = _Means()
    for loss, gates in _gated(evidence):
        for (name, _), gradient in _gradients(loss, gates).items():
            means.add(name, gradient.double() ** 2)
    return means.members()


def fisher(evidence: Evidence) -> Members:
    """Squared gradient of the gate, mean over samples.

    Theis et al., Faster Gaze Prediction, arXiv 1801.05787, equation 10; for coupled channels as Liu et al., Group
    Fisher Pruning, ICML 2021, equation 6.
    """
    means = _Means()
    for loss, gates in _gated(evidence, per_sample=True):
        for (name, rows), gradient in _gradients(loss, gates).items():
            # The loss is a mean: times the rows, a row's gradient is its own.
            means.add(name, (gradient.double() * rows) ** 2)
    return means.members()


def hessian(evidence: Evidence) -> Members:
    """`h / 2`, h the gate's entry on the diagonal of the loss's Hessian, mean over batches.

    LeCun et al., Optimal Brain Damage, NeurIPS 1989, equation 3, for gates in place of single weights; the diagonal by
    Hutchinson's method (Bekas et al. 2007): the mean of `z * Hz` over random signs z.
    """
    means = _Means()
    generator = torch.Generator().manual_seed(derive(evidence.seed, "hessian"))
    # Fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for loss, gates in _gated(evidence):
            gradients = _gradients(loss, gates, again=True)
            for _ in range(PROBES):
                signs = {key: _signs(gate, generator) for key, gate in gates.items()}
                slope = torch.stack([(gradients[key] * signs[key]).sum() for key in gates]).sum()
                for key, curved in _gradients(slope, gates).items():
                    means.add(key[0], (signs[key] * curved).double() / 2)
    return means.members()


class _Means:
    """Running means by group, `(channels,)` float64."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()

    def add(self, name: str, values: Tensor) -> None:
        """Takes values `(samples, channels)` into the mean."""
        total = values.sum(0)
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] += len(values)

    def members(self) -> Members:
        return {name: [total / self._counts[name]] for name, total in self._sums.items()}


def _gated(evidence: Evidence, *, per_sample: bool = False) -> Iterator[tuple[Tensor, Gates]]:
    """The loss of each batch, and the gates that it was computed with: one row, or one a sample."""
    found = readers(evidence.model, evidence.structure)
    gates: Gates = {}

    def gate(tensor: str, layer: nn.Module, inputs: Tensor) -> Tensor:
        axis = channel_axis(layer, inputs)
        rows = inputs.shape[0] if per_sample else 1  # windowed attention has more rows than samples
        factor = inputs.new_ones(rows, inputs.shape[axis])
        for group, part in found[tensor]:
            if (group.name, rows) not in gates:
                gates[group.name, rows] = inputs.new_ones(rows, group.channels).requires_grad_()
            index = torch.from_numpy(part.index).to(inputs.device)
            factor = factor.index_copy(1, index, gates[group.name, rows][:, part.unit])
        shape = [1] * inputs.dim()
        shape[0], shape[axis] = factor.shape
        return inputs * factor.view(shape)

    for inputs, labels in evidence.batches:
        gates.clear()
        with watching(evidence.model, found, gate):
            loss = evidence.loss(call(evidence.model, inputs), labels)
        if gates:
            yield loss, gates


def _gradients(value: Tensor, leaves: Mapping[Key, Tensor], *, again: bool = False) -> dict[Key, Tensor]:
    """The gradient of each leaf; `again` makes it differentiable once more."""
    if not value.requires_grad:  # a loss that is linear in the gates has no curvature
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        value, list(leaves.values()), retain_graph=True, create_graph=again, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)
