"""The memory layout in which candidates are trained: channels last where that is faster and changes nothing else.

On a CPU, training steps of a CIFAR ResNet took between 0.53 and 0.72 of their time with channels last. The layout
follows from the model and its device, never from a timing: two equal runs must stay equal.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from amc.forward import Inputs, call, device_of, logits, to_device

TOLERANCE = 1e-3
"""Of the largest output: sums are taken in another order, nothing more."""


def fast_layout(model: nn.Module, inputs: Inputs) -> torch.memory_format:
    """`torch.channels_last` for convolutional models on the CPU that give the same outputs in it; else contiguous."""
    if device_of(model).type != "cpu" or not any(isinstance(m, nn.Conv2d) for m in model.modules()):
        return torch.contiguous_format
    same = arranged(copy.deepcopy(model).eval(), torch.channels_last)
    mode = model.training
    try:
        with torch.inference_mode():
            expected = logits(call(model.eval(), to_device(inputs, "cpu")))
            found = logits(call(same, to_device(inputs, "cpu")))
    except RuntimeError:  # a `view` that counts on the order in memory
        return torch.contiguous_format
    finally:
        model.train(mode)
    near = float((found - expected).abs().max()) <= TOLERANCE * max(float(expected.abs().max()), 1e-12)
    return torch.channels_last if near else torch.contiguous_format


def arranged(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The model itself, with its image-like weights in that layout; convolutions follow their weights'."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return model
