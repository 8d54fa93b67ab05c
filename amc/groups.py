"""Channel groups: which channels leave together.

Removing an output channel of a layer removes the matching entry of its batch norm, the matching input channel of
every consumer, and, through a residual addition, the same channel of every layer that is added to it. Such coupled
channels form a group (Fang et al., DepGraph, CVPR 2023, section 3), and a group is the unit of decision of a policy:
it keeps `width` of its `channels`.

A group knows the tensors it slices and nothing else about the model. Costs, slimming and export all read these
slices, so what one predicts the other does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Slice:
    """One axis of one tensor, and the group's unit that owns each position on it.

    tensor: state-dict name of a parameter or buffer, e.g. `layer1.0.conv1.weight`.
    axis: the tensor's axis.
    index: `(m,)` positions along the axis that belong to the group, ascending.
    unit: `(m,)` the unit of the group (0 <= unit < channels) that owns each position; every unit owns equally many.
    blocks: 1, but for the input axis of a grouped convolution, where it is the number of convolution groups: a
        weight `(out, in / blocks, k, k)` is then indexed by input channel, 0 <= index < in, block by block.
    """

    tensor: str
    axis: int
    index: np.ndarray
    unit: np.ndarray
    blocks: int = 1


@dataclass(frozen=True)
class Layer:
    """What the agent sees of the layer that produces a group's channels (AMC, section 3.1).

    kind: `conv`, `depthwise`, `linear` or `other`.
    outputs, inputs: channels of the dense layer (AMC's n and c).
    positions: output positions at batch 1 (AMC's h·w; tokens for a linear layer).
    """

    name: str
    kind: str = "other"
    outputs: int = 1
    inputs: int = 1
    positions: int = 1
    stride: int = 1
    kernel: int = 1


@dataclass(frozen=True, eq=False)
class Group:
    """Coupled channels, kept or removed together.

    name: the module (or parameter) that first produces the channels, in forward order.
    channels: how many units the dense model has (channels; heads where `kind` is `head`).
    widths: the widths that a policy may choose, ascending, the last of them `channels`.
    slices: the tensor axes that the group's channels live on.
    members: for reading, e.g. `("layer1.0.conv1:out", "layer1.0.bn1:out", "layer1.0.conv2:in")`.
    cells: `(channels,)` cell of each unit. Every cell keeps equally many units (the groups of a grouped convolution
        or of a group norm), so widths step by the number of cells. All zero where nothing constrains the choice.
    """

    name: str
    channels: int
    widths: tuple[int, ...]
    kind: str = "channel"
    slices: tuple[Slice, ...] = ()
    members: tuple[str, ...] = ()
    layer: Layer = field(default_factory=lambda: Layer(""))
    cells: np.ndarray | None = None

    @property
    def floor(self) -> int:
        """The smallest width that a policy may choose."""
        return self.widths[0]

    def snap(self, width: float) -> int:
        """The allowed width nearest to `width` (the wider of two that are equally near)."""
        widths = np.asarray(self.widths)
        return int(widths[np.lexsort((-widths, np.abs(widths - width)))[0]])

    def snap_down(self, width: float) -> int:
        """The largest allowed width that is not above `width`, or the floor."""
        at = bisect_right(self.widths, width)
        return self.widths[max(at - 1, 0)]


def cells_of(group: Group) -> np.ndarray:
    """`(channels,)` cell of each unit; one for all where the group has none."""
    return np.zeros(group.channels, int) if group.cells is None else group.cells


def of_each_cell(
    group: Group, width: int, ordered: Callable[[np.ndarray], np.ndarray] = lambda units: units
) -> np.ndarray:
    """`(width,)` units, equally many of each cell: its first ones, once they are ordered."""
    cells = cells_of(group)
    names = np.unique(cells)
    chosen = [ordered(np.flatnonzero(cells == cell))[: width // len(names)] for cell in names]
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class Frozen:
    """Something that can't be pruned, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class TensorInfo:
    """Shape, bytes an element, and whether it is a parameter (else a persistent buffer)."""

    shape: tuple[int, ...]
    dtype: str
    parameter: bool


@dataclass(frozen=True, eq=False)
class Structure:
    """What tracing finds out about a model.

    groups: in forward order.
    frozen: what can't be pruned, by name, with the reason.
    tensors: state-dict name -> TensorInfo, in state-dict order, each storage once (tied weights under the first name).
    positions: state-dict name of a weight -> how often one of its elements is multiplied at batch 1, so that its
        multiply-accumulates are `positions x numel`. Only weights of convolutions, transposed convolutions and
        products with a weight matrix are listed.
    fixed_macs: multiply-accumulates at batch 1 that no policy changes: of products whose weight is computed from
        others, or is a part of one. Their channels are frozen.
    unreached: parameters that the example inputs don't reach in evaluation mode, but training or other inputs do: of
        auxiliary heads, of experts. They are sliced like others, and cost no multiply-accumulates.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    tensors: Mapping[str, TensorInfo]
    positions: Mapping[str, int]
    fixed_macs: int = 0
    unreached: tuple[str, ...] = ()
