"""Calling a model: one place that knows the shapes of inputs and outputs in the wild.

Inputs are one tensor, a tuple or list of tensors (positional), or a dict (keywords). Outputs are a tensor, a tuple
whose first element is it, or an object or dict with `logits`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for one tensor, a sequence of arguments, or a mapping of keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def random_batch(inputs: Inputs, count: int = 16) -> Any:
    """`count` random examples like the one given: normal numbers, and integers in the range of the example's.

    A tensor whose first axis is not that of the examples (as long as that of the first tensor) stays as it is.
    """
    generator = torch.Generator().manual_seed(0)
    first = next(flatten(inputs), None)

    def drawn(value: Tensor) -> Tensor:
        if first is None or value.shape[:1] != first.shape[:1] or not value.numel():
            return value
        shape = (count, *value.shape[1:])
        if value.is_floating_point() or value.is_complex():
            return torch.randn(shape, generator=generator, dtype=value.dtype).to(value.device)
        low, high = int(value.min()), int(value.max())
        return torch.randint(low, high + 1, shape, generator=generator).to(value)

    return changed(inputs, drawn)


def flatten(value: Any, inside: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and objects.

    Caches of keys and values are not looked into: their heads may leave.
    """
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in inside or isinstance(value, (nn.Module, type)) or type(value).__name__.endswith("Cache"):
        return
    items: Iterable[Any] = getattr(value, "__dict__", {}).values()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (tuple, list)):
        items = value
    elif dataclasses.is_dataclass(value):
        items = [getattr(value, entry.name) for entry in dataclasses.fields(value)]
    for item in items:
        yield from flatten(item, (*inside, id(value)))


def logits(output: Any) -> Tensor:
    """The tensor of predictions in a model's output."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output["logits"] if "logits" in output else logits(next(iter(output.values())))
    if hasattr(output, "logits"):
        return output.logits
    return logits(output[0])


def to_device(value: Any, device: torch.device | str) -> Any:
    """`value` with every tensor in it on `device`."""
    return changed(value, lambda tensor: tensor.to(device))


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in its mappings, tuples and lists replaced by what `change` makes of it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: changed(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [changed(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # a named tuple, or a plain one
    return value


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters live (the CPU if it has none)."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
