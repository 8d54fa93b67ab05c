"""Criteria that look at the loss: what it would do, to first or second order, if a unit were gone.

All three differentiate the mean loss of the calibration batches with the model in evaluation mode, so that batch norm
is the affine map it will be. Weights are replaced functionally and gates hooked in for the time of a pass: the model's
own gradients and flags are never touched. A group is one member: its contributions are summed before they are squared.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from amc.forward import device_of
from amc.groups import Group
from amc.importance import Evidence, Members
from amc.roles import by_unit, channel_axis, readers, watching
from amc.seeding import derive

Key = TypeVar("Key", bound=Hashable)

PROBES = 4  # Hutchinson vectors a batch


def taylor(evidence: Evidence) -> Members:
    """`(sum of gradient * weight over a unit's parameters)^2`, mean over batches.

    Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, equations 7 and 8.
    """
    weights = _weights(evidence)
    totals = _zeros(evidence)
    for loss in _losses(evidence, weights):
        gradients = _gradients(loss, weights)
        for group in evidence.groups:
            totals[group.name] += _over_unit(group, {n: weights[n] * g for n, g in gradients.items()}) ** 2
    return {name: [total] for name, total in totals.items()}


def hessian(evidence: Evidence) -> Members:
    """`sum of weight^2 * h / 2` over a unit's parameters, h the diagonal of the loss's Hessian.

    LeCun et al., Optimal Brain Damage, NeurIPS 1989, equation 3, the diagonal estimated by Hutchinson's method
    (Bekas et al. 2007): the mean of `z * Hz` over random signs z.
    """
    weights = _weights(evidence)
    totals = _zeros(evidence)
    generator = torch.Generator().manual_seed(derive(evidence.seed, "hessian"))
    # Fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for loss in _losses(evidence, weights):
            gradients = _gradients(loss, weights, again=True)
            for _ in range(PROBES):
                signs = {n: _signs(w, generator) for n, w in weights.items()}
                slope = sum((gradients[n] * signs[n]).sum() for n in weights)
                curved = _gradients(slope, weights)
                terms = {n: weights[n] ** 2 * signs[n] * curved[n] / 2 for n in weights}
                for group in evidence.groups:
                    totals[group.name] += _over_unit(group, terms)
    return {name: [total] for name, total in totals.items()}


def fisher(evidence: Evidence) -> Members:
    """Mean over samples of the squared gradient of a gate on the unit, summed over all its readers first.

    Theis et al., Faster Gaze Prediction, arXiv 1801.05787, equation 10; for coupled channels as Liu et al., Group
    Fisher Pruning, ICML 2021, equation 6.
    """
    found = readers(evidence.model, evidence.structure)
    totals = _zeros(evidence)
    gates: dict[tuple[str, int], Tensor] = {}  # a row a sample; windowed attention has more rows than samples

    def gate(tensor: str, layer: nn.Module, inputs: Tensor) -> Tensor:
        axis, rows = channel_axis(layer, inputs), inputs.shape[0]
        factor = inputs.new_ones(rows, inputs.shape[axis])
        for group, part in found[tensor]:
            key = (group.name, rows)
            if key not in gates:
                gates[key] = inputs.new_ones(rows, group.channels).requires_grad_()
            factor = factor.index_copy(1, torch.from_numpy(part.index).to(factor.device), gates[key][:, part.unit])
        shape = [1] * inputs.dim()
        shape[0], shape[axis] = factor.shape
        return inputs * factor.view(shape)

    with torch.enable_grad(), watching(evidence.model, found, gate):
        for inputs, labels in evidence.batches:
            gates.clear()
            loss = evidence.loss(functional_call(evidence.model, {}, *_arguments(inputs)), labels)
            for (name, rows), gradient in _gradients(loss, gates).items():
                # The loss is a mean: times the rows, a row's gradient is its own.
                totals[name] += ((gradient.double() * rows) ** 2).mean(0)
    watched = {group.name for parts in found.values() for group, _ in parts}
    return {name: [total] for name, total in totals.items() if name in watched}


def _weights(evidence: Evidence) -> dict[str, Tensor]:
    """The sliced parameters as leaves of their own."""
    names = {part.tensor for group in evidence.groups for part in group.slices}
    return {n: p.detach().requires_grad_() for n, p in evidence.model.named_parameters() if n in names}


def _zeros(evidence: Evidence) -> dict[str, Tensor]:
    device = device_of(evidence.model)
    return {g.name: torch.zeros(g.channels, dtype=torch.float64, device=device) for g in evidence.groups}


def _losses(evidence: Evidence, weights: dict[str, Tensor]) -> Iterator[Tensor]:
    for inputs, labels in evidence.batches:
        with torch.enable_grad():
            yield evidence.loss(functional_call(evidence.model, weights, *_arguments(inputs)), labels)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _gradients(value: Any, leaves: Mapping[Key, Tensor], *, again: bool = False) -> dict[Key, Tensor]:
    """The gradient of each leaf; `again` makes it differentiable once more."""
    if not value.requires_grad:  # a loss that is linear in the weights has no curvature
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        value, list(leaves.values()), retain_graph=True, create_graph=again, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def _over_unit(group: Group, terms: dict[str, Tensor]) -> Tensor:
    parts = [part for part in group.slices if part.tensor in terms]
    return torch.stack([by_unit(p, terms[p.tensor].detach(), group.channels).double().sum(1) for p in parts]).sum(0)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator)
    return (bits * 2 - 1).to(like)
