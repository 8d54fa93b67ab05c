"""Calling a model: one place that knows the shapes of inputs and outputs in the wild.

Inputs are one tensor, a tuple or list of tensors (positional), or a dict (keywords). Outputs are a tensor, a tuple
whose first element is it, or an object or dict with `logits`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    first = next(iter(_tensors(inputs)), None)

    def drawn(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: drawn(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(drawn(item) for item in value)
        if not isinstance(value, Tensor) or first is None or value.shape[:1] != first.shape[:1] or not value.numel():
            return value
        shape = (count, *value.shape[1:])
        if value.is_floating_point() or value.is_complex():
            return torch.randn(shape, generator=generator, dtype=value.dtype).to(value.device)
        low, high = int(value.min()), int(value.max())
        return torch.randint(low, high + 1, shape, generator=generator).to(value)

    return drawn(inputs)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


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
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(to_device(item, device) for item in value)
    return value


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters live (the CPU if it has none)."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
