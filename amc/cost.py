"""Costs: what a policy spends, computed from its integer widths.

Every analytic cost follows from the sizes of the sliced tensors, and these are products of axis lengths that are linear
in the widths. So a predicted cost equals the cost of the slimmed model, exactly, and never falls when a width grows.

- `flops`: multiply-accumulates of convolutions, transposed convolutions and products with a weight matrix at batch 1;
  a constant where the model computes the weight. Products of two activations (attention scores), recurrent cells,
  normalizations and activations are not counted.
- `params`: elements of the parameters.
- `size`: bytes of the model's safetensors file, header included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from amc.groups import Structure
from amc.weights import safetensors_size

Widths = Sequence[int] | np.ndarray


class Cost(Protocol):
    """A resource that a policy spends; calling it with widths (in the order of the groups) never falls as one grows."""

    @property
    def name(self) -> str:
        """As in `--budget NAME=LIMIT`."""
        ...

    @property
    def unit(self) -> str:
        """`MAC`, `ms`, `B` … or empty."""
        ...

    def __call__(self, widths: Widths) -> float:
        """What the policy with these widths spends."""
        ...


@dataclass(frozen=True)
class FunctionCost:
    """A cost given as a function of the widths."""

    name: str
    unit: str
    function: Callable[[Widths], float]

    def __call__(self, widths: Widths) -> float:
        """What the policy with these widths spends."""
        return self.function(widths)


def flops(structure: Structure) -> Cost:
    """Multiply-accumulates at batch 1."""
    names = list(structure.positions)
    positions = np.array([structure.positions[name] for name in names], dtype=np.float64)
    shapes = _Shapes(structure, names)

    def macs(widths: Widths) -> float:
        return round(float(shapes.numel(widths) @ positions)) + structure.fixed_macs

    return FunctionCost("flops", "MAC", macs)


def layer_flops(structure: Structure, widths: Widths) -> dict[str, int]:
    """Multiply-accumulates at batch 1 by layer, in forward order; their sum is the policy's `flops`.

    A layer is named by its module, a weight that is no `weight` of a module by itself; what no policy changes
    (`Structure.fixed_macs`) comes last, as `(computed weights)`.
    """
    names = list(structure.positions)
    counts = _Shapes(structure, names).numel(widths) * np.array([structure.positions[name] for name in names], float)
    found = {name.removesuffix(".weight"): round(float(count)) for name, count in zip(names, counts, strict=True)}
    return {**found, "(computed weights)": structure.fixed_macs} if structure.fixed_macs else found


def params(structure: Structure) -> Cost:
    """Elements of the parameters, tied ones once."""
    shapes = _Shapes(structure, [name for name, info in structure.tensors.items() if info.parameter])
    return FunctionCost("params", "", lambda widths: round(float(shapes.numel(widths).sum())))


def size(structure: Structure) -> Cost:
    """Bytes of the file that `amc.weights.save_weights` writes."""
    shapes = _Shapes(structure, list(structure.tensors))
    dtypes = [info.dtype for info in structure.tensors.values()]

    def file_size(widths: Widths) -> float:
        sized = zip(shapes.of(widths), dtypes, strict=True)
        return safetensors_size(dict(zip(structure.tensors, sized, strict=True)))

    return FunctionCost("size", "B", file_size)


class _Shapes:
    """The axis lengths of some tensors as a linear function of the widths."""

    def __init__(self, structure: Structure, names: Sequence[str]) -> None:
        shapes = [structure.tensors[name].shape for name in names]
        self.ranks = [len(shape) for shape in shapes]
        axes = max(self.ranks, default=0)
        self.dense = np.array([(*shape, *[1] * (axes - len(shape))) for shape in shapes], dtype=np.float64)
        self.dense = self.dense.reshape(len(names), axes)
        self.channels = np.array([group.channels for group in structure.groups], dtype=np.float64)
        # Elements that one removed unit takes from an axis: of a grouped convolution's weight, one block's share.
        self.removed = np.zeros((len(self.channels), len(names), axes))
        row = {name: i for i, name in enumerate(names)}
        for g, group in enumerate(structure.groups):
            for part in group.slices:
                if part.tensor in row:
                    share = len(part.index) / group.channels / part.blocks
                    self.removed[g, row[part.tensor], part.axis] += share
        self._flat = self.removed.reshape(len(self.channels), len(names) * axes)

    def lengths(self, widths: Widths) -> np.ndarray:
        """`(tensors, axes)` lengths, padded with ones."""
        gone = self.channels - np.asarray(widths, dtype=np.float64)
        return self.dense - (gone @ self._flat).reshape(self.dense.shape)

    def numel(self, widths: Widths) -> np.ndarray:
        """`(tensors,)` elements."""
        return self.lengths(widths).prod(axis=1)

    def of(self, widths: Widths) -> list[tuple[int, ...]]:
        """The shapes."""
        rows = np.rint(self.lengths(widths)).astype(int).tolist()
        return [tuple(row[:rank]) for row, rank in zip(rows, self.ranks, strict=True)]


def analytic(structure: Structure) -> dict[str, Cost]:
    """The costs that need no device, by name."""
    return {"flops": flops(structure), "params": params(structure), "size": size(structure)}


def spent(costs: Mapping[str, Cost], widths: Widths) -> dict[str, float]:
    """Every cost of one policy."""
    return {name: cost(widths) for name, cost in costs.items()}
