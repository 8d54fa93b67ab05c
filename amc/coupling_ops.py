"""What each low-level operation does to channel labels: one plain dict, operation -> handler.

A handler reads the labels of the arguments and labels the result, `handler(run, args, kwargs, out)`, after the
operation ran. Pointwise operations (PyTorch tags them) share one handler, products of any kind are "multiply, then
sum", and what only moves elements moves their labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amc import ops_elements, ops_norms, ops_products, ops_space
from amc.ops_elements import Handler, pointwise
from amc.ops_products import PRODUCTS
from amc.record import Source

if TYPE_CHECKING:
    from amc.tracer import Tracer

HANDLERS: dict[str, Handler] = {
    **ops_elements.HANDLERS,
    **ops_space.HANDLERS,
    **ops_products.HANDLERS,
    **ops_norms.HANDLERS,
}


def handler(func: Any) -> Handler | None:
    """The handler of an operation, or None where there is none."""
    found = HANDLERS.get(str(func.overloadpacket).removeprefix("aten."))
    return found or (pointwise if torch.Tag.pointwise in func.tags else None)


def keeps_values(func: Any) -> bool:
    """Whether an operation works element by element, or only shows the same elements in another shape."""
    return handler(func) in ops_elements.VALUES


def track_origin(run: Tracer, func: Any, tensors: Sequence[Tensor], out: Any) -> None:
    """What is made of weights alone is a weight, and the largest of them if it has as many elements.

    A view, a standardized or a masked weight is whole still; a slice, or a product of two weights, is not.
    """
    sources = [run.source(t) for t in tensors]
    for result in out if isinstance(out, (tuple, list)) else [out]:
        if isinstance(result, Tensor) and not run.name(result):
            found = Source(inputs=any(s.inputs for s in sources))
            if not found.inputs and any(s.weight for s in sources):
                at = max(range(len(tensors)), key=lambda i: (sources[i].name is not None, distinct(tensors[i])))
                same = distinct(tensors[at]) == distinct(result) and handler(func) not in PRODUCTS
                found = Source(True, sources[at].name, sources[at].whole and same)
            run.set_source(result, found)


def distinct(tensor: Tensor) -> int:
    """Elements, those that an expanded axis repeats once."""
    return math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
