"""Calling a model: one place that knows the shapes of inputs and outputs in the wild.

Inputs are one tensor, a tuple or list of tensors (positional), or a dict (keywords). Outputs are a tensor, a tuple
whose first element is it, or an object or dict with `logits`.
"""

from __future__ import annotations

from collections.abc import Mapping
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
