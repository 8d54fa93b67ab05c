"""Roles: which weights write a group's channels, which read them, and what the readers are given.

Criteria judge a unit by the filters that produce it (slices on the output axis of a weight), or by what its readers
get to see (the input of the layers that have a slice on their input axis, after batch norm and activation). Reading
there rather than where channels are made serves every topology the same way: sums, concatenations, a flatten into a
linear layer, heads into an output projection.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from amc.groups import Group, Slice, Structure


def weights(model: nn.Module, structure: Structure, group: Group) -> list[tuple[str, Slice]]:
    """The weights that make ("out") or read ("in") a group's channels, each once: its role and the group's slice of it.

    Where a layer computes its weight from tensors that it holds (weight norm, a pruning mask), it is the computed
    weight that is listed, not what it is computed from.
    """
    found: dict[tuple[str, int], tuple[str, Slice]] = {}
    for part in group.slices:
        role = weight_role(model, structure, part)
        if role:
            part = acting(model, structure, part)
            found.setdefault((part.tensor, part.axis), (role, part))
    return list(found.values())


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


def acting(model: nn.Module, structure: Structure, part: Slice) -> Slice:
    """The same slice of the weight that the layer computes from this tensor and others; of this tensor, if it doesn't.

    The computed weight goes by its name in the layer: `fc.weight`, for `fc.weight_v` as for
    `fc.parametrizations.weight.original1`.
    """
    path, leaf = place(part.tensor)
    layer = model.get_submodule(path)
    held = leaf in layer._parameters or leaf in layer._buffers
    name = leaf.rpartition("_")[0] if held else leaf  # `weight_orig`, `weight_mask`: hooks set a plain `weight`
    weight = vars(layer).get(name) if held else getattr(layer, name, None)
    shape = structure.tensors[part.tensor].shape
    fits = isinstance(weight, Tensor) and weight.dim() == len(shape) and weight.shape[part.axis] == shape[part.axis]
    return replace(part, tensor=f"{path}.{name}".lstrip(".")) if fits else part


def computed(model: nn.Module, weight: str) -> Tensor:
    """A weight that its layer computes, by the name that `acting` gives it, detached."""
    path, leaf = place(weight)
    return getattr(model.get_submodule(path), leaf).detach()


def owner(model: nn.Module, tensor: str) -> nn.Module:
    """The module that holds a state-dict name; of a parametrization's tensors, the module that is parametrized."""
    return model.get_submodule(place(tensor)[0])


def place(tensor: str) -> tuple[str, str]:
    """Path of the module that a name belongs to, and the attribute there."""
    path, parametrized, rest = f".{tensor}".partition(".parametrizations.")
    if parametrized:  # a.parametrizations.weight.original1 belongs to a's weight
        return path[1:], rest.partition(".")[0]
    path, _, leaf = tensor.rpartition(".")
    return path, leaf


def output_axis(module: nn.Module) -> int:
    """The axis of a layer's weight that runs over its outputs."""
    return int(isinstance(module, _ConvTransposeNd) or is_transposed_linear(module))


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is transformers' linear layer with weight `(in, out)`; named, since that package may be missing."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)  # a parametrized layer is a subclass


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

    Names and slices are as `weights` gives them. Only the `weight` of convolutions and linear layers is listed; what
    reads through a raw parameter can't be watched.
    """
    found: Readers = {}
    for group in structure.groups:
        for role, part in weights(model, structure, group):
            layer = owner(model, part.tensor)
            watchable = isinstance(layer, _ConvNd | nn.Linear) or is_transposed_linear(layer)
            if role == "in" and watchable and place(part.tensor)[1] == "weight":
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

    def hook(tensor: str) -> Callable[[nn.Module, Any, Any], Any]:
        def before(layer: nn.Module, args: Any, named: Any) -> Any:
            if args:
                replaced = see(tensor, layer, args[0])
                return None if replaced is None else ((replaced, *args[1:]), named)
            name = next(iter(inspect.signature(layer.forward).parameters))  # it was called by keyword
            replaced = see(tensor, layer, named[name])
            return None if replaced is None else (args, {**named, name: replaced})

        return before

    handles = [owner(model, tensor).register_forward_pre_hook(hook(tensor), with_kwargs=True) for tensor in tensors]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
