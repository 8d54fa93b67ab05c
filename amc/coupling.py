"""Finds a model's channel groups: runs it on channel labels and collects what has to leave together.

The idea of a group is DepGraph's (Fang et al., CVPR 2023); how it is found is not. Instead of rules for pairs of
layers, exact labels travel through the forward pass (`amc.tracer`), so that concatenations, splits, shuffles, padded
shortcuts and attention need no rules of their own. What labels can't follow is frozen, with the reason.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
from torch import nn

from amc.errors import ModelError, UsageError
from amc.forward import Inputs
from amc.groups import Frozen, Group, Layer, Slice, Structure, TensorInfo
from amc.record import Axis, Record, WeightUse
from amc.tracer import Tracer, state_names
from amc.weights import own_tensors, some, state_tensors

log = logging.getLogger("amc")

LEAVES = frozenset(("weight", "bias", "running_mean", "running_var", "in_proj_weight", "in_proj_bias"))
"""Names of parameters that are better known by their module."""


def trace(
    model: nn.Module,
    inputs: Inputs,
    *,
    exclude: Sequence[str] = (),
    only: Sequence[str] = (),
    round_to: int = 1,
    min_keep: float = 0.0,
) -> Structure:
    """The groups of a model, by running it in evaluation mode (nothing of it is changed).

    Where that leaves parameters out, it is run in training mode and on random inputs, too.

    inputs: example inputs of batch 1: a tensor, a tuple, or a mapping of keyword arguments.
    exclude, only: shell patterns on names of groups and of the modules that make their channels (`layer1.*`), or, with
        a colon, on members as they are listed (`fc:in`); what they rule out is frozen.
    round_to: widths are multiples of it (in channels), the full width aside.
    min_keep: the smallest keep ratio, in [0, 1].

    Raises:
        ModelError: the forward raises; the message names the innermost module that was running.
        UsageError: a pattern matches nothing, or a number is out of range.
    """
    if round_to < 1 or not 0 <= min_keep <= 1:
        raise UsageError(f"round_to={round_to} must be at least 1 and min_keep={min_keep} in [0, 1]")
    tracer = Tracer(model)
    record = tracer.run(inputs)
    tensors = tensor_infos(model)
    unreached = _reach(tracer, inputs)
    groups, frozen = collect(record)
    groups, frozen = _select(groups, frozen, exclude, only)
    groups, frozen = _set_widths(groups, frozen, round_to, min_keep)
    positions = {n: record.macs[n] // math.prod(info.shape) for n, info in tensors.items() if n in record.macs}
    return Structure(tuple(groups), tuple(frozen), tensors, positions, record.fixed_macs, unreached)


def _reach(tracer: Tracer, inputs: Inputs) -> tuple[str, ...]:
    """Parameters that only further passes reach; a warning names those that none does."""
    first = tracer.unmet()
    if first:
        tracer.reach(inputs)
    never = tracer.unmet()
    if never:
        log.warning(
            "no run of the model used %s: these keep their size, and fail if ever they meet pruned channels; "
            "give example inputs that reach them, or exclude the groups before them",
            some(sorted(never)),
        )
    return tuple(sorted(first - never))


def tensor_infos(model: nn.Module) -> dict[str, TensorInfo]:
    """The model's tensors, each once; what its state dict adds to them (extra state) is in the file, too."""
    infos: dict[str, TensorInfo] = {}
    names = state_names(model)
    for name, tensor in {**own_tensors(model), **state_tensors(model)}.items():
        if names.get(id(tensor), name) != name:
            continue
        if isinstance(tensor, nn.parameter.UninitializedParameter):
            raise ModelError(f"`{name}` has no shape yet (a lazy module); run the model once before it is pruned")
        dtype = str(tensor.dtype).removeprefix("torch.")
        infos[name] = TensorInfo(tuple(tensor.shape), dtype, isinstance(tensor, nn.Parameter))
    return infos


def collect(record: Record) -> tuple[list[Group], list[Frozen]]:
    """Groups and frozen layers, in forward order, from the labels of a run.

    A unit is a class of labels. Units are exchangeable, and form a group, if they own equally many positions on the
    same axes.
    """
    axes = list(record.axes.values())
    find, reasons = record.labels.find, record.labels.roots_frozen()
    roots = [find(axis.labels) for axis in axes]
    kind = np.zeros(record.labels.size, np.uint64)
    for key, classes in zip(_keys(len(axes)), roots, strict=True):
        unique, counts = np.unique(classes, return_counts=True)
        kind[unique] += counts.astype(np.uint64) * key
    stuck = np.zeros(record.labels.size, bool)
    stuck[list(reasons)] = True
    groups: list[Group] = []
    frozen: list[Frozen] = []
    names: Counter[str] = Counter()
    done: set[tuple[int, bool]] = set()
    heads = record.labels.roots_head()
    for first, classes in zip(axes, roots, strict=True):
        if first.role != "out" or (first.axis > 1 and first.tensor in record.uses):
            continue
        for signature, bound in dict.fromkeys(zip(kind[classes].tolist(), stuck[classes].tolist(), strict=True)):
            if (signature, bound) in done:
                continue
            done.add((signature, bound))
            members = [(a, r, (kind[r] == signature) & (stuck[r] == bound)) for a, r in zip(axes, roots, strict=True)]
            members = [(a, r, hit) for a, r, hit in members if hit.any()]
            units = list(dict.fromkeys(classes[(kind[classes] == signature) & (stuck[classes] == bound)].tolist()))
            producer = _producer([a for a, _, _ in members], record.uses)
            if producer is None:  # positions, tokens, kernels: nothing makes them, so they are no channels
                continue
            name = owner(producer.tensor)
            if bound:
                frozen.append(Frozen(name, reasons[units[0]]))
                continue
            slices = _slices(members, units, record.labels.size)
            cells, problem = _cells(record, units)
            if len(units) < 2 and not problem:
                made = next(s for s in slices if (s.tensor, s.axis) == (producer.tensor, producer.axis))
                if len(made.index) < 2:
                    continue
                problem = "its channels can only leave all at once"
            if problem:
                frozen.append(Frozen(name, problem))
                continue
            group = Group(
                _unique(name, names),
                len(units),
                (len(units),),
                "head" if heads & set(units) else "channel",
                slices,
                tuple(dict.fromkeys(f"{owner(a.tensor)}:{a.role}" for a, _, _ in members)),
                _layer(producer.tensor, record.uses),
                cells,
            )
            groups.append(group)
    return groups, _unrepeated(frozen)


def owner(tensor: str) -> str:
    """The module that a tensor is known by, or the tensor's own name."""
    module, _, leaf = tensor.rpartition(".")
    return module if module and leaf in LEAVES else tensor


def _keys(count: int) -> np.ndarray:
    """A fixed 64-bit key per axis, so that sums of them tell sets of axes apart."""
    return np.random.default_rng(0).integers(1, 1 << 63, count, dtype=np.uint64)


def _producer(axes: Sequence[Axis], uses: Mapping[str, WeightUse]) -> Axis | None:
    """The first weight whose outputs these are."""
    for axis in axes:
        if axis.role == "out" and axis.tensor in uses and uses[axis.tensor].out_axis == axis.axis:
            return axis
    return None


def _slices(
    members: Sequence[tuple[Axis, np.ndarray, np.ndarray]], units: Sequence[int], labels: int
) -> tuple[Slice, ...]:
    unit_of = np.full(labels, -1)
    unit_of[units] = np.arange(len(units))
    return tuple(
        Slice(axis.tensor, axis.axis, np.flatnonzero(hit), unit_of[classes[hit]], axis.blocks)
        for axis, classes, hit in members
    )


def _cells(record: Record, units: Sequence[int]) -> tuple[np.ndarray | None, str]:
    """The cell of each unit, from every axis that is cut into equal blocks; or why they can't be balanced."""
    row_of = np.full(record.labels.size, -1)
    row_of[units] = np.arange(len(units))
    counts = []
    for labels, blocks in record.balanced:
        rows = row_of[record.labels.find(labels)].reshape(blocks, -1)
        if (rows < 0).all():
            continue
        table = np.zeros((len(units), blocks), int)
        for block, row in enumerate(rows):
            np.add.at(table[:, block], row[row >= 0], 1)
        if (table != table[:, :1]).any():
            counts.append(table)
    if not counts:
        return None, ""
    distinct, cells, sizes = np.unique(np.hstack(counts), axis=0, return_inverse=True, return_counts=True)
    cells = cells.ravel()
    at = 0
    for table in counts:
        total = distinct[:, at : at + table.shape[1]].sum(0)
        at += table.shape[1]
        if (total != total[0]).any() or (sizes != sizes[0]).any():
            return None, "the blocks of a grouped layer can't lose equally many of its channels"
    if sizes[0] < 2:
        return None, "each block of a grouped layer has one of its channels"
    order = np.argsort([np.flatnonzero(cells == c)[0] for c in range(len(distinct))])
    return np.argsort(order)[cells], ""


def _layer(tensor: str, uses: Mapping[str, WeightUse]) -> Layer:
    use = uses.get(tensor)
    if use is None:
        return Layer(owner(tensor))
    return Layer(owner(tensor), use.kind, use.outputs, use.inputs, use.positions, use.stride, use.kernel)


def _unique(name: str, names: Counter[str]) -> str:
    names[name] += 1
    return name if names[name] == 1 else f"{name}:{names[name] - 1}"


def _unrepeated(frozen: Sequence[Frozen]) -> list[Frozen]:
    return list({(f.name, f.reason): f for f in frozen}.values())


def _select(
    groups: list[Group], frozen: list[Frozen], exclude: Sequence[str], only: Sequence[str]
) -> tuple[list[Group], list[Frozen]]:
    """Freeze the groups that `exclude` matches and those that `only` doesn't."""
    names = [*(n for g in groups for n in (g.name, *g.members)), *(f.name for f in frozen)]
    for option, patterns in (("--exclude", exclude), ("--only", only)):
        for pattern in patterns:
            if not any(_matches(pattern, name) for name in names):
                near = difflib.get_close_matches(pattern, [g.name for g in groups], 3, 0.0)
                raise UsageError(f"`{option} {pattern}` matches no group; the nearest are {', '.join(near)}")
    kept = []
    for group in groups:
        hit = [p for p in exclude if any(_matches(p, n) for n in (group.name, *group.members))]
        if hit:
            frozen = [*frozen, Frozen(group.name, f"excluded by --exclude {hit[0]}")]
        elif only and not any(_matches(p, n) for p in only for n in (group.name, *group.members)):
            frozen = [*frozen, Frozen(group.name, "not named by --only")]
        else:
            kept.append(group)
    return kept, frozen


def _matches(pattern: str, name: str) -> bool:
    """A pattern with a colon speaks of members as they are listed; one without, of what modules make, not read."""
    if ":" in pattern:
        return fnmatchcase(name, pattern)
    return not name.endswith(":in") and fnmatchcase(name.removesuffix(":out"), pattern)


def _set_widths(
    groups: Sequence[Group], frozen: list[Frozen], round_to: int, min_keep: float
) -> tuple[list[Group], list[Frozen]]:
    kept = []
    for group in groups:
        step = 1 if group.cells is None else int(group.cells.max()) + 1
        per_unit = next((len(s.index) // group.channels for s in group.slices), 1)
        widths = [
            width
            for width in range(step, group.channels, step)
            if width * per_unit % round_to == 0 and width >= min_keep * group.channels
        ]
        if widths:
            kept.append(replace(group, widths=(*widths, group.channels)))
        else:
            limits = f"--round-to {round_to} and --min-keep {min_keep:g}"
            frozen = [*frozen, Frozen(group.name, f"{limits} leave none of its {group.channels} channels to remove")]
    return kept, frozen
