"""The modes that a model is looked at in: evaluation, and what training alone runs; the model is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Each module has the mode again that it had before the body."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and nothing else; restores each module's mode."""
    with _modes_kept(model):
        model.eval()
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, fused attention or random state left behind; restores each module's mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(_modes_kept(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        torch.manual_seed(0)
        torch.backends.mha.set_fastpath_enabled(False)
        model.train()
        model.eval()
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            model.train()  # a module that caches in evaluation mode forgets


@contextmanager
def branching(model: nn.Module) -> Iterator[None]:
    """As `evaluating`, but code takes the branches of training mode (auxiliary heads).

    Modules without children stay in evaluation mode: batch norm then needs no batch, and dropout drops nothing.
    """
    held = [(module, name, b, b.clone()) for module in model.modules() for name, b in module.named_buffers("", False)]
    with evaluating(model):
        model.train()
        for module in model.modules():
            if module is not model and not any(True for _ in module.children()):
                module.eval()
        try:
            yield
        finally:
            for module, name, buffer, value in held:
                setattr(module, name, buffer.copy_(value))


def refreshed(model: nn.Module) -> None:
    """Make modules forget what they computed from their weights for evaluation, as they do when training begins."""
    with _modes_kept(model):
        model.train()
