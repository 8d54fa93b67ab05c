"""What each low-level operation does to channel labels: one plain dict, operation -> handler.

A handler reads the labels of the arguments and labels the result, `handler(run, args, kwargs, out)`, after the
operation ran. Pointwise operations (PyTorch tags them) share one handler, products of any kind are "multiply, then
sum", and what only moves elements moves their labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amc import ops_elements, ops_norms, ops_products
from amc.ops_elements import Handler, pointwise
from amc.ops_norms import MASKED

if TYPE_CHECKING:
    from amc.tracer import Tracer

HANDLERS: dict[str, Handler] = {**ops_elements.HANDLERS, **ops_products.HANDLERS, **ops_norms.HANDLERS}
WEIGHT_MAKING = (*ops_products.SUMS, *ops_norms.HANDLERS.values())
"""What may be done to a weight before it is used: it is the same weight still, for counting."""


def handler(func: Any) -> Handler | None:
    """The handler of an operation, or None where there is none."""
    found = HANDLERS.get(str(func.overloadpacket).removeprefix("aten."))
    return found or (pointwise if torch.Tag.pointwise in func.tags else None)


def keeps_values(func: Any) -> bool:
    """Whether an operation works element by element, or only shows the same elements in another shape."""
    return handler(func) in ops_elements.VALUES


def track_origin(run: Tracer, func: Any, tensors: Sequence[Tensor], out: Any) -> None:
    """What is made of weights alone (a view, a standardized weight, its mean) counts as the largest of them."""
    out = out[0] if isinstance(out, (tuple, list)) and out else out
    if tensors and isinstance(out, Tensor) and not run.name(out):
        known = keeps_values(func) or handler(func) in WEIGHT_MAKING
        origins = [run.origin(t) for t in tensors] if known else [None]
        if all(origins):
            largest = max(range(len(tensors)), key=lambda i: tensors[i].numel())
            run.set_origin(out, origins[largest] or "")


__all__ = ["HANDLERS", "MASKED", "handler", "keeps_values", "track_origin"]
