"""Roles: which weights write a group's channels, which read them, and what the readers are given.

Criteria judge a unit by the filters that produce it (slices on the output axis of a weight), or by what its readers
get to see (the input of the layers that have a slice on their input axis, after batch norm and activation). Reading
there rather than where channels are made serves every topology the same way: sums, concatenations, a flatten into a
linear layer, heads into an output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from amc.groups import Group, Slice, Structure


def weight_role(model: nn.Module, structure: Structure, part: Slice) -> str | None:
    """Whether a slice lies on the output axis of a weight ("out"), on its input axis ("in"), or on neither (None)."""
    if part.axis > 1 or len(structure.tensors[part.tensor].shape) < 2:
        return None
    module = owner(model, part.tensor)
    if isinstance(module, nn.Embedding):
        return "out" if part.axis == 1 else None
    # Positional embeddings and the like have two axes too, but multiply nothing.
    if part.tensor not in structure.positions and not isinstance(module, _ConvNd | nn.Linear):
        return None
    return "out" if part.axis == output_axis(module) else "in"


def owner(model: nn.Module, tensor: str) -> nn.Module:
    """The module that holds a state-dict name."""
    return model.get_submodule(tensor.rpartition(".")[0])


def output_axis(module: nn.Module) -> int:
    """The axis of a layer's weight that runs over its outputs."""
    return int(isinstance(module, _ConvTransposeNd) or is_transposed_linear(module))


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is transformers' linear layer with weight `(in, out)`; named, since that package may be missing."""
    return type(module).__name__ == "Conv1D"


def rows_of(part: Slice, tensor: Tensor) -> Tensor:
    """What lies at each position of a slice, `(m, k)`, all positions of unit 0 first, then those of unit 1, ..."""
    if part.blocks > 1:  # (out, in / blocks, ...) -> (in, out / blocks, ...)
        rows = tensor.unflatten(0, (part.blocks, -1)).transpose(1, 2).flatten(0, 1)
    else:
        rows = tensor.movedim(part.axis, 0)
    index = part.index[by_unit_order(part)]
    return rows[torch.from_numpy(index).to(tensor.device)].flatten(1) if rows.dim() > 1 else rows[index].unsqueeze(1)


def by_unit(part: Slice, tensor: Tensor, channels: int) -> Tensor:
    """What belongs to each unit in a sliced tensor (or in one of its shape), `(channels, k)`."""
    return rows_of(part, tensor).reshape(channels, -1)


def by_unit_order(part: Slice) -> np.ndarray:
    """Places in `part.index`, sorted by unit."""
    return np.argsort(part.unit, kind="stable")


Readers = dict[str, list[tuple[Group, Slice]]]


def readers(model: nn.Module, structure: Structure) -> Readers:
    """Weights of layers that read channels of groups -> those groups, with their slices of the weight's input axis.

    Only convolutions and linear layers are listed; what reads through a raw parameter can't be watched.
    """
    found: Readers = {}
    for group in structure.groups:
        for part in group.slices:
            layer = owner(model, part.tensor)
            watchable = isinstance(layer, _ConvNd | nn.Linear) or is_transposed_linear(layer)
            if watchable and weight_role(model, structure, part) == "in":
                found.setdefault(part.tensor, []).append((group, part))
    return found


def channel_axis(layer: nn.Module, inputs: Tensor) -> int:
    """The axis of a reader's input that its weight's input axis runs over."""
    return inputs.dim() - 1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else inputs.dim() - 1


@contextmanager
def watching(
    model: nn.Module, tensors: Iterable[str], see: Callable[[str, nn.Module, Tensor], Tensor | None]
) -> Iterator[None]:
    """Shows `see(weight's name, layer, input)` whatever the layers of these weights are given; it may replace it."""

    def hook(tensor: str) -> Callable[[nn.Module, Any], Any]:
        def before(layer: nn.Module, given: Any) -> Any:
            replaced = see(tensor, layer, given[0])
            return None if replaced is None else (replaced, *given[1:])

        return before

    handles = [owner(model, tensor).register_forward_pre_hook(hook(tensor)) for tensor in tensors]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's own flag comes back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
