"""Importance: in what order the channels of a group go.

A criterion looks at the evidence (the weights, and where it needs them calibration batches and a loss) and gives every
group one vector per *member*: a layer that produces the group's channels, or one that reads them. Members are
normalized, then aggregated to one importance per unit (higher is kept), and units are ordered by it once; a policy
then keeps a prefix of that order. A criterion that sees nothing of a group (batch-norm scales where there is no
norm) leaves that group to `l1`, and the log says so.

A criterion is a function `Evidence -> {group name: [(channels,) tensor, one per member]}` and a line in
`amc.catalog.CRITERIA`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amc.catalog import CRITERIA
from amc.errors import ModelError, UsageError
from amc.finetune import cross_entropy
from amc.forward import device_of, logits, to_device
from amc.groups import Group, Slice, Structure
from amc.modes import eval_mode
from amc.registry import resolve, suggest
from amc.roles import by_unit, computed, weights

Members = Mapping[str, Sequence[Tensor]]
Criterion = Callable[["Evidence"], Members]
Loss = Callable[[Tensor, Any], Tensor]

AGGREGATE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda members: members.sum(0),
    "mean": lambda members: members.mean(0),
    "max": lambda members: members.amax(0),
    "first": lambda members: members[0],
}

NORMALIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda member: torch.ones((), dtype=member.dtype),
    "mean": lambda member: member.abs().mean(),
    "max": lambda member: member.abs().amax(),
    "l2": lambda member: member.norm(),
}

log = logging.getLogger("amc")


def rank(
    model: nn.Module,
    structure: Structure,
    criterion: str = "l1",
    *,
    batches: Sequence[tuple[Any, Any]] | None = None,
    loss: Loss = cross_entropy,
    aggregate: str = "sum",
    normalize: str = "none",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Every group's units, `(channels,)`, best first; arguments and errors as for `importance`.

    Equal units go by index. Where a group has cells, the best of each cell come first, then the second best of
    each, so that the prefix of any allowed width keeps equally many of every cell.
    """
    scored = importance(
        model, structure, criterion, batches=batches, loss=loss, aggregate=aggregate, normalize=normalize, seed=seed
    )
    return {group.name: order(scored[group.name], group.cells) for group in structure.groups}


def order(importance: np.ndarray, cells: np.ndarray | None = None) -> np.ndarray:
    """Units by falling importance `(channels,)`, equal ones by index, interleaved over `cells` `(channels,)`."""
    best = np.argsort(-importance, kind="stable")
    if cells is None:
        return best
    place = np.empty(len(best), dtype=np.int64)  # of each unit within its cell
    for cell in np.unique(cells):
        members = best[cells[best] == cell]
        place[members] = np.arange(len(members))
    return best[np.argsort(place[best], kind="stable")]


def importance(
    model: nn.Module,
    structure: Structure,
    criterion: str = "l1",
    *,
    batches: Sequence[tuple[Any, Any]] | None = None,
    loss: Loss = cross_entropy,
    aggregate: str = "sum",
    normalize: str = "none",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Importance of every group's units, `(channels,)` float64, higher is kept.

    Args:
        model: the dense model; it is left as it is.
        structure: its groups.
        criterion: a name from `CRITERIA`.
        batches: calibration `(inputs, labels)`; labels may be None where the criterion needs no loss.
        loss: `(logits, labels) -> mean loss`.
        aggregate: how a group's members become one, a name from `AGGREGATE`.
        normalize: what each member is divided by first, a name from `NORMALIZE`.
        seed: of what a criterion draws at random.

    Raises:
        UsageError: an unknown name, or a criterion that needs batches or labels and has none.
        ModelError: an importance that is not finite.
    """
    combine = _choose(AGGREGATE, aggregate, "aggregate")
    scale = _choose(NORMALIZE, normalize, "normalize")
    find: Criterion = resolve(CRITERIA, criterion, "importance criterion")
    evidence = Evidence(model, structure, criterion, batches, loss, seed)
    with eval_mode(model), torch.enable_grad():
        members = dict(find(evidence))
        unseen = [group for group in structure.groups if not members.get(group.name)]
        for group in unseen:
            by_l1 = [rows.abs().sum(1) for rows in evidence.filters(group)]
            members[group.name] = by_l1 or [torch.zeros(group.channels)]
    if unseen:
        names = ", ".join(group.name for group in unseen)
        log.warning("importance %s sees nothing of these groups, which are ranked by l1: %s", criterion, names)
    return {group.name: _one(group, members[group.name], scale, combine, criterion) for group in structure.groups}


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a criterion may look at. While it does, the model is in evaluation mode."""

    model: nn.Module
    structure: Structure
    criterion: str = "l1"
    given: Sequence[tuple[Any, Any]] | None = None
    given_loss: Loss = cross_entropy
    seed: int = 0

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups, in forward order."""
        return self.structure.groups

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """State-dict name -> tensor, detached."""
        return self.model.state_dict()

    def filters(self, group: Group) -> Iterator[Tensor]:
        """Of each layer that produces the group's channels, what belongs to each unit: `(channels, k)`, float64."""
        for part in self.parts(group, "out"):
            yield by_unit(part, self.tensor(part), group.channels).double()

    def parts(self, group: Group, role: str) -> list[Slice]:
        """The group's slices of weights on their output axis (`role` "out") or input axis ("in"), as layers use them.

        A weight that its layer computes (weight norm, a pruning mask) comes in place of what it is computed from.
        """
        return [part for found, part in weights(self.model, self.structure, group) if found == role]

    def tensor(self, part: Slice) -> Tensor:
        """The tensor of a slice that `parts` gives, detached."""
        known = self.tensors.get(part.tensor)
        return computed(self.model, part.tensor) if known is None else known

    @property
    def batches(self) -> Sequence[tuple[Any, Any]]:
        """Calibration batches, on the model's device; raises UsageError where none were given."""
        if not self.given:
            raise UsageError(
                f"importance criterion {self.criterion!r} looks at data and got none; give calibration batches "
                "(`batches=[(inputs, labels), ...]`), or choose one of the weights alone, such as 'l1'"
            )
        device = device_of(self.model)
        return [(to_device(inputs, device), to_device(labels, device)) for inputs, labels in self.given]

    def loss(self, output: Any, labels: Any) -> Tensor:
        """Mean loss of a batch; raises UsageError where there are no labels."""
        if labels is None:
            raise UsageError(
                f"importance criterion {self.criterion!r} needs labels and the calibration batches have none; "
                "give `(inputs, labels)`, or choose a criterion without a loss, such as 'wanda'"
            )
        return self.given_loss(logits(output), labels)


def _one(
    group: Group,
    members: Sequence[Tensor],
    scale: Callable[[Tensor], Tensor],
    combine: Callable[[Tensor], Tensor],
    criterion: str,
) -> np.ndarray:
    """A group's members as one importance."""
    vectors = [member.detach().double().cpu() for member in members]
    tiny = torch.finfo(torch.float64).tiny  # a member of zeros stays zeros
    result = combine(torch.stack([vector / scale(vector).clamp_min(tiny) for vector in vectors])).numpy()
    if not np.isfinite(result).all():
        raise ModelError(
            f"the importance of group {group.name!r} by {criterion!r} is not finite; "
            "the weights or the calibration data hold NaN or infinity"
        )
    return result


def _choose(registry: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in registry:
        raise UsageError(f"{what} {name!r} is unknown; {suggest(name, registry)}")
    return registry[name]
