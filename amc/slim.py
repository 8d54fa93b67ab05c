"""Slimming: the same model with fewer channels.

`slim` slices each tensor once and deep-copies the model round the slices, so that only what stays is allocated, and
tied weights, hooks, buffers, dtypes, devices and modes come out as they were. The result is made of the model's own
modules. That it computes what it should is proved elsewhere (`amc/verify.py`).
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amc import attributes
from amc.errors import ModelError
from amc.groups import Group, Slice, Structure
from amc.modes import refreshed
from amc.roles import place
from amc.tracer import describe
from amc.weights import identity, state_tensors

Kept = Mapping[str, np.ndarray]
"""Group name -> `(width,)` the units that stay. A group that is not named stays whole."""

_plans: weakref.WeakKeyDictionary[Structure, dict[str, list[tuple[Group, Slice]]]] = weakref.WeakKeyDictionary()


def slim(model: nn.Module, structure: Structure, kept: Kept) -> nn.Module:
    """A new model that keeps the given units of each group; the given model is untouched.

    Raises:
        ModelError: the model holds something that can't be copied.
    """
    state = state_tensors(model)
    stays = _stays(structure, kept)
    memo: dict[int, Any] = {}
    for name, cuts in _cuts(structure, stays):
        memo[id(state[name])] = like(state[name], _sliced(state[name], cuts, stays))
    result = copied(model, memo)
    smaller = [n for n, t in state_tensors(result).items() if n in state and t.shape != state[n].shape]
    for module in {place(name)[0] for name in smaller}:
        attributes.update(result.get_submodule(module))
    for group in structure.groups:
        if group.kind == "head" and group.name in stays:
            _update_heads(result, structure, group, int(stays[group.name].sum()))
    refreshed(result)
    return result


def masked(model: nn.Module, structure: Structure, kept: Kept) -> nn.Module:
    """A copy of the dense model in which everything that `slim` would remove is zero."""
    state = state_tensors(model)
    stays = _stays(structure, kept)
    memo: dict[int, Any] = {}
    for name, cuts in _cuts(structure, stays):
        tensor = state[name].detach().clone()
        for group, cut in cuts:
            _zero(tensor, cut, cut.index[~stays[group.name][cut.unit]])
        memo[id(state[name])] = like(state[name], tensor)
    return copied(model, memo)


def _plan(structure: Structure) -> dict[str, list[tuple[Group, Slice]]]:
    """Tensor -> the slices on it. Kept per structure: the search slims thousands of times."""
    if structure not in _plans:
        plan: dict[str, list[tuple[Group, Slice]]] = {}
        for group in structure.groups:
            for cut in group.slices:
                plan.setdefault(cut.tensor, []).append((group, cut))
        _plans[structure] = plan
    return _plans[structure]


def _cuts(structure: Structure, stays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, list[tuple[Group, Slice]]]]:
    """Each tensor that loses something, and the slices on it of the groups that do."""
    for tensor, every in _plan(structure).items():
        cuts = [(group, cut) for group, cut in every if group.name in stays]
        if cuts:
            yield tensor, cuts


def _stays(structure: Structure, kept: Kept) -> dict[str, np.ndarray]:
    """Mask of the units that stay, of each group that loses any."""
    stays = {}
    for group in structure.groups:
        units = kept.get(group.name)
        if units is not None and len(units) < group.channels:
            stays[group.name] = np.zeros(group.channels, bool)
            stays[group.name][np.asarray(units)] = True
    return stays


def removed_channels(structure: Structure, kept: Kept) -> dict[tuple[str, int], np.ndarray]:
    """(tensor, axis) -> mask of the positions that `slim` removes there."""
    stays = _stays(structure, kept)
    removed: dict[tuple[str, int], np.ndarray] = {}
    for group in structure.groups:
        if group.name in stays:
            for cut in group.slices:
                shape = structure.tensors[cut.tensor].shape
                mask = removed.setdefault((cut.tensor, cut.axis), np.zeros(shape[cut.axis] * cut.blocks, bool))
                mask[cut.index[~stays[group.name][cut.unit]]] = True
    return removed


def _sliced(tensor: Tensor, cuts: Sequence[tuple[Group, Slice]], stays: Mapping[str, np.ndarray]) -> Tensor:
    masks: dict[tuple[int, int], np.ndarray] = {}
    for group, cut in cuts:
        key = (cut.axis, cut.blocks)
        if key not in masks:
            masks[key] = np.ones(tensor.shape[cut.axis] * cut.blocks, bool)
        masks[key][cut.index] &= stays[group.name][cut.unit]
    result = tensor.detach()
    rows: np.ndarray | None = None
    for (axis, blocks), mask in sorted(masks.items()):
        if blocks > 1:
            return _sliced_by_block(result, tensor.shape[0], rows, mask.reshape(blocks, -1), axis)
        index = np.flatnonzero(mask)
        rows = mask if axis == 0 else rows
        result = result.index_select(axis, torch.from_numpy(index).to(tensor.device))
    return result


def _sliced_by_block(tensor: Tensor, height: int, rows: np.ndarray | None, columns: np.ndarray, axis: int) -> Tensor:
    """Of a grouped convolution's weight: the rows of each block (already cut) keep the columns of that block."""
    blocks = len(columns)
    block_of = np.arange(height) // (height // blocks)
    block_of = block_of if rows is None else block_of[rows]
    parts = []
    for block in range(blocks):
        part = tensor[torch.from_numpy(block_of == block).to(tensor.device)]
        parts.append(part.index_select(axis, torch.from_numpy(np.flatnonzero(columns[block])).to(tensor.device)))
    return torch.cat(parts)


def _zero(tensor: Tensor, cut: Slice, index: np.ndarray) -> None:
    """Set positions of an axis to zero."""
    if cut.blocks == 1:
        tensor.index_fill_(cut.axis, torch.from_numpy(index).to(tensor.device), 0)
        return
    height, width = tensor.shape[0] // cut.blocks, tensor.shape[cut.axis]
    for position in index.tolist():
        block, column = divmod(position, width)
        tensor[block * height : (block + 1) * height].select(cut.axis, column).zero_()


def like(old: Tensor, new: Tensor) -> Tensor:
    """A parameter or buffer in the place of another."""
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new


def copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy in which tensors are replaced as `memo` says, by the id of the old one.

    Raises:
        ModelError: the model holds something that can't be copied.
    """
    _share(model, memo)
    for module in model.modules():  # a weight computed by a hook, with its graph
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"the model can't be copied: {describe(error)}; remove what it keeps beside parameters and buffers"
        ) from error


def _share(model: nn.Module, memo: dict[int, Any]) -> None:
    """Tensors that share their memory alone (`a.weight.data = b.weight.data`) share it in the copy, too."""
    first: dict[tuple[Any, ...], Tensor] = {}
    for name, tensor in state_tensors(model).items():
        original = first.setdefault(identity(name, tensor), tensor)
        if original is not tensor:
            if id(original) not in memo:
                memo[id(original)] = like(original, original.detach().clone())
            memo[id(tensor)] = like(tensor, memo[id(original)].detach())


def _update_heads(model: nn.Module, structure: Structure, group: Group, kept: int) -> None:
    """Tell the modules round an attention's projections how many heads there are."""
    projections = [cut for cut in group.slices if cut.tensor in structure.positions]
    inner = {len(cut.index) for cut in projections}
    holders = {place(cut.tensor)[0].rpartition(".")[0] for cut in projections}
    holders |= {place(cut.tensor)[0] for cut in group.slices}
    paths = zip(*(cut.tensor.split(".") for cut in projections), strict=False)
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, paths)
    holders.add(".".join(names[0] for names in shared))
    for name in holders:
        attributes.update_heads(model.get_submodule(name), group.channels, kept, inner)
