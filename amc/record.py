"""What one labelled run of a model leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from amc.labels import Labels


@dataclass
class Axis:
    """The labels of one axis of a parameter or buffer; `role` is `in` where a product sums over it, else `out`."""

    tensor: str
    axis: int
    labels: np.ndarray
    role: str = "out"
    blocks: int = 1


@dataclass
class WeightUse:
    """What a convolution, a product with a matrix or an embedding does with its weight."""

    kind: str
    outputs: int
    inputs: int
    positions: int
    stride: int = 1
    kernel: int = 1
    out_axis: int = 0


@dataclass(frozen=True)
class Source:
    """What a tensor was computed from.

    weight: from parameters and buffers alone.
    name: the largest of them; `whole` where the tensor has each of its elements once.
    inputs: from the model's inputs.
    """

    weight: bool = False
    name: str | None = None
    whole: bool = False
    inputs: bool = False

    @property
    def parameter(self) -> str | None:
        """The parameter or buffer that it is as a whole, if it is one."""
        return self.name if self.whole else None


@dataclass
class Record:
    """What a run leaves behind.

    balanced: `(labels, blocks)`; each of `blocks` equal stretches of the labels must lose equally many.
    macs: multiply-accumulates of each weight, where all its elements are multiplied equally often.
    fixed_macs: those of other weights: parts of a parameter, or computed from several.
    """

    labels: Labels = field(default_factory=Labels)
    axes: dict[tuple[str, int], Axis] = field(default_factory=dict)
    balanced: list[tuple[np.ndarray, int]] = field(default_factory=list)
    macs: dict[str, int] = field(default_factory=dict)
    fixed_macs: int = 0
    uses: dict[str, WeightUse] = field(default_factory=dict)
    output: Any = None
