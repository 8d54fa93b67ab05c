"""The ONNX file of any policy, in the fastest way that the model allows: cut from the dense one, or exported."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from amc.errors import ModelError
from amc.export import export_bytes
from amc.groups import Structure
from amc.slim import slim
from latency.slicing import first_kept, sliced
from latency.template import Template, templated

FEW = 4
"""So many files are exported one by one before a template is learned, which takes three exports or more."""


def policy_files(
    model: nn.Module, structure: Structure, inputs: tuple[torch.Tensor, ...] | Mapping[str, torch.Tensor], dense: bytes
) -> Callable[[Sequence[int]], bytes]:
    """A function from widths to an ONNX file of that policy, in milliseconds where it can be, else in seconds.

    For latency: which units are kept makes no difference to it, nor do the weights.
    """
    try:
        slicer = sliced(model, structure, inputs, dense)
    except ModelError:
        return _Exports(dense, structure, lambda kept: export_bytes(slim(model, structure, kept), inputs))
    return lambda widths: slicer(first_kept(structure, widths))


class _Exports:
    """Exports, and where many are asked for, what a template makes of them."""

    def __init__(self, dense: bytes, structure: Structure, export: Callable[[Mapping[str, np.ndarray]], bytes]) -> None:
        self._dense, self._structure, self._export = dense, structure, export
        self._asked = 0
        self._template: Template | None = None

    def __call__(self, widths: Sequence[int]) -> bytes:
        self._asked += 1
        if self._asked == FEW + 1:
            with contextlib.suppress(ModelError):
                self._template = templated(self._dense, self._structure, self._exported)
        return self._template(widths) if self._template else self._exported(widths)

    def _exported(self, widths: Sequence[int]) -> bytes:
        return self._export(first_kept(self._structure, widths))
