"""The proof that a group can be slimmed, tried before anyone relies on it (DESIGN 8).

Seven removals are tried: the smallest step, a random half of every group, the other half, three times random shares
that differ from group to group (of few widths, two draws are often equal), and all but the floor. For each, the slim
model must run, and agree with the dense model in which the removed channels are zero and left out of statistics that
span channels. Where the dense model runs in training mode on examples alone, the slim one has to. A group that fails at
its floor only (one channel, whose axis a `squeeze` drops; a norm over a single value) gets a higher one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from amc.errors import ModelError
from amc.forward import Inputs, call, changed, flatten, random_batch
from amc.groups import Frozen, Group, Structure, cells_of, of_each_cell
from amc.modes import evaluating
from amc.slim import Kept, copied, like, masked, removed_channels, slim
from amc.tracer import Tracer, describe
from amc.weights import state_tensors

TOLERANCE = 1e-5
"""How far the slim model's outputs may be from the masked dense model's, relative to the largest of them."""

NEARLY = 1e-3
"""Parameters that are all below this are as good as zero, as the scales (1e-6) with which branches start to train."""


def verify(model: nn.Module, inputs: Inputs, structure: Structure, *, floors: bool = True) -> Structure:
    """The structure without the groups that can't be slimmed as predicted; those are frozen, with what went wrong.

    floors: raise those that can't be kept. All groups are tried at once, and apart only if that fails.
    """
    generator = np.random.default_rng(0)
    model = _without_zeros(model)
    good = list(structure.groups)
    frozen = list(structure.frozen)
    halves = {group.name: random_half(group, generator) for group in good}
    half, other = (lambda group: halves[group.name]), (lambda group: _others(group, halves[group.name]))
    agrees, trains = _agrees(model, inputs, structure), _trains(model, inputs, structure)
    apart = partial(random_width, generator=generator)
    trials = [(check, choose) for choose in (smallest_step, half, other, apart, apart, apart) for check in agrees]
    trials += [(check, half) for check in trains]
    for check, choose in trials:
        bad = _failing(check, good, {group.name: choose(group) for group in good})
        frozen += [Frozen(name, reason) for name, reason in bad.items()]
        good = [group for group in good if group.name not in bad]
    for check in agrees if floors else ():
        while bad := _failing(check, good, {group.name: narrowest(group) for group in good}):
            good = [_raised(group) if group.name in bad else group for group in good]
            frozen += [Frozen(group.name, bad[group.name]) for group in good if len(group.widths) < 2]
            good = [group for group in good if len(group.widths) > 1]
    return replace(structure, groups=tuple(good), frozen=tuple(frozen))


def _without_zeros(model: nn.Module) -> nn.Module:
    """A copy in which parameters of zeros, or nearly, are drawn at random: such a branch hides what is wrong in it."""
    zero = [p for p in model.parameters() if p.is_floating_point() and p.numel() and p.detach().abs().max() < NEARLY]
    if not zero:
        return model
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for tensor in zero:
        drawn = 0.1 * torch.randn(tensor.shape, generator=generator)
        memo[id(tensor)] = like(tensor, drawn.to(tensor))
    try:
        return copied(model, memo)
    except ModelError:
        return model  # slimming will say so, group by group


def smallest_step(group: Group) -> np.ndarray:
    """All units but the last of each cell."""
    cells = cells_of(group)
    last = [np.flatnonzero(cells == cell)[-1] for cell in np.unique(cells)]
    return np.setdiff1d(np.arange(group.channels), last)


def random_half(group: Group, generator: np.random.Generator) -> np.ndarray:
    """A random half of each cell, at least one unit of it."""
    cells = len(np.unique(cells_of(group)))
    return of_each_cell(group, max(1, group.channels // cells // 2) * cells, generator.permutation)


def random_width(group: Group, generator: np.random.Generator) -> np.ndarray:
    """As many random units as a random one of the widths from a half on: what holds between equal shares shows here."""
    width = generator.choice([width for width in group.widths if 2 * width >= group.channels])
    return of_each_cell(group, width, generator.permutation)


def _others(group: Group, units: np.ndarray) -> np.ndarray:
    """The units that are not among these, as many of each cell; these, if a cell has no other."""
    cells = cells_of(group)
    rest = np.setdiff1d(np.arange(group.channels), units)
    count = min(np.sum(cells[rest] == cell) for cell in np.unique(cells))
    return np.sort(np.concatenate([rest[cells[rest] == c][:count] for c in np.unique(cells)])) if count else units


def narrowest(group: Group) -> np.ndarray:
    """As few units of each cell as a policy may keep."""
    return of_each_cell(group, group.floor)


def _raised(group: Group) -> Group:
    """The group with a floor of at least twice as many channels."""
    return replace(group, widths=tuple(width for width in group.widths if width >= 2 * group.floor))


def difference(model: nn.Module, inputs: Inputs, structure: Structure, kept: Kept) -> float:
    """How far the slim model is from the masked dense one: the largest difference over the largest output.

    Raises:
        ModelError: the slim model fails, or its outputs have other shapes.
    """
    with evaluating(model):
        removed = {key: mask for key, mask in removed_channels(structure, kept).items() if mask.any()}
        expected = list(flatten(Tracer(masked(model, structure, kept), removed).run(inputs).output))
        small = slim(model, structure, kept)
        with evaluating(small):
            actual = list(flatten(_run(small, inputs)))
    if [tuple(t.shape) for t in expected] != [tuple(t.shape) for t in actual]:
        raise ModelError("the slim model's outputs have other shapes than the dense model's")
    worst = 0.0
    for a, b in zip(expected, actual, strict=True):
        if a.numel():
            scale = a.double().abs().nan_to_num(0.0, 0.0, 0.0).max().clamp_min(torch.finfo(torch.float64).tiny)
            error = (a.double() - b.double()).abs()
            error[(a == b) | (a.isnan() & b.isnan())] = 0.0
            worst = max(worst, float(error.nan_to_num(float("inf")).max() / scale))
    return worst


def _difference_in_double(model: nn.Module, inputs: Inputs, structure: Structure, kept: Kept, error: float) -> float:
    """`difference` without rounding; `error` where the model insists on a precision of its own."""
    try:
        floats = (t for t in state_tensors(model).values() if t.is_floating_point())
        double = copied(model, {id(t): like(t, t.detach().double()) for t in floats}).double()
        wide = changed(inputs, lambda t: t.double() if t.is_floating_point() else t)
        return difference(double, wide, structure, kept)
    except ModelError:
        return error


Check = Callable[[Kept], str]
"""What is wrong with the slim model of these units, or nothing."""


def _agrees(model: nn.Module, inputs: Inputs, structure: Structure) -> list[Check]:
    """A slim model computes what the dense one does: on the example, and on a batch that goes where that doesn't."""
    examples = [inputs]
    if structure.unreached:
        batch = random_batch(inputs)
        examples += [] if _problem(lambda: Tracer(model).run(batch)) else [batch]
    return [partial(_disagreement, model, example, structure) for example in examples]


def _trains(model: nn.Module, inputs: Inputs, structure: Structure) -> list[Check]:
    """A slim model runs in training mode, if the dense one does on examples alone."""
    pair = random_batch(inputs, 2)  # batch norm asks for more than one
    if untrainable(model, pair):
        return []
    return [lambda kept: _problem(lambda: _train_once(slim(model, structure, kept), pair))]


def untrainable(model: nn.Module, inputs: Inputs) -> str:
    """Why the model doesn't run on these inputs in training mode, or nothing."""
    return _problem(lambda: _train_once(copied(model, {}), inputs, "in training mode"))


def _problem(attempt: Callable[[], object]) -> str:
    """What a ModelError says; nothing where there is none."""
    try:
        attempt()
    except ModelError as problem:
        return str(problem)
    return ""


def _train_once(model: nn.Module, inputs: Inputs, how: str = "slimmed and in training mode") -> None:
    """One forward pass in training mode; statistics and random state are the copy's own."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        _run(model.train(), inputs, how)


def _disagreement(model: nn.Module, inputs: Inputs, structure: Structure, kept: Kept) -> str:
    """How the slim model's output is wrong."""
    try:
        error = difference(model, inputs, structure, kept)
    except ModelError as problem:
        return str(problem)
    if TOLERANCE < error < 0.1:  # rounding, perhaps: a wrong coupling stays wrong in double precision
        error = _difference_in_double(model, inputs, structure, kept, error)
    return "" if error <= TOLERANCE else f"slimmed, the model's output is wrong (by {error:.1e} of its range)"


def _failing(check: Check, groups: Sequence[Group], kept: Kept) -> dict[str, str]:
    """The groups that fail, by bisection, and why."""
    if not groups:
        return {}
    reason = check({group.name: kept[group.name] for group in groups})
    if not reason:
        return {}
    if len(groups) == 1:
        return {groups[0].name: reason}
    halves = groups[: len(groups) // 2], groups[len(groups) // 2 :]
    bad = _failing(check, halves[0], kept) | _failing(check, halves[1], kept)
    if not bad:  # each half works without the other: none of them is safe beside the rest
        return {group.name: f"together with other groups: {reason}" for group in groups}
    rests = [[group for group in half if group.name not in bad] for half in halves]
    return bad | (_failing(check, rests[0] + rests[1], kept) if all(rests) else {})


def _run(model: nn.Module, inputs: Inputs, how: str = "slimmed") -> object:
    running: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(_push(running, name), prepend=True))
        handles.append(module.register_forward_hook(_pop(running)))
    try:
        return call(model, inputs)
    except Exception as error:
        where = f"`{running[-1]}`" if running and running[-1] else "its forward"
        raise ModelError(f"{how}, the model fails in {where}: {describe(error)}") from error
    finally:
        for handle in handles:
            handle.remove()


def _push(running: list[str], name: str) -> Callable[..., None]:
    def enter(*_: object) -> None:
        running.append(name)

    return enter


def _pop(running: list[str]) -> Callable[..., None]:
    def leave(*_: object) -> None:
        running.pop()

    return leave
