"""Where memory runs out: the same work again, with every batch in smaller parts."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import torch

from amc.finetune import Batch

T = TypeVar("T")

log = logging.getLogger("amc")


def in_parts(work: Callable[[int], T]) -> T:
    """What `work(parts)` gives, with every batch in so many parts: whole, or where memory runs out in 2, 4 or 8."""
    for parts in (1, 2, 4):
        try:
            return work(parts)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            log.warning("out of memory at %s of the batch size; trying half of that", Fraction(1, parts))
        free_memory()  # after the handler, whose traceback holds on to the tensors
    return work(8)


def part_of(batch: int, parts: int) -> int:
    """The size of one of so many parts of a batch; batch norm needs two examples."""
    return min(max(batch // parts, 2), batch)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, as Python, torch's CPU allocator or CUDA say it."""
    said = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error).lower() for text in said)


def free_memory() -> None:
    """Gives back what nobody uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def split(batches: Sequence[Batch], parts: int) -> list[Batch]:
    """Every batch in so many parts of nearly equal size; one that has fewer than two examples a part stays whole."""
    return [part for batch in batches for part in _parts(batch, parts)] if parts > 1 else list(batches)


def _parts(batch: Batch, parts: int) -> list[Batch]:
    inputs, labels = batch
    if labels is None or len(labels) < 2 * parts:
        return [batch]

    def cut(value: Any) -> list[Any]:
        if isinstance(value, torch.Tensor):
            return list(torch.tensor_split(value, parts))
        if isinstance(value, Mapping):
            return [dict(zip(value, each, strict=True)) for each in zip(*map(cut, value.values()), strict=True)]
        return list(zip(*map(cut, value), strict=True))

    return list(zip(cut(inputs), cut(labels), strict=True))
