"""Policies put to use: a policy file and a dense model in, a slim model out; and the slim model of a finished run.

On the weights that the policy was found for, `kept` gives the same slim model bit for bit. On others the channels are
ranked again by the policy's criterion, since the numbers of channels carry over but their identities don't.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amc.catalog import MODELS
from amc.coupling import trace
from amc.errors import ModelError, PolicyError, RunError
from amc.evaluate import kept_units
from amc.files import read_json
from amc.forward import call
from amc.groups import Group, Structure
from amc.importance import rank
from amc.models import MOST_ELEMENTS, Inputs, load_model, placed
from amc.modes import evaluating
from amc.policy import GroupPolicy, Policy, load_policy
from amc.problem import allowed
from amc.registry import suggest
from amc.slim import slim
from amc.verify import verify
from amc.weights import load_weights, structure_sha256, weights_sha256

log = logging.getLogger("amc")


@dataclass(frozen=True)
class Application:
    """What applying a policy came to. reranked: the channels were ranked again, since the weights differ."""

    model: nn.Module
    structure: Structure
    kept: Mapping[str, np.ndarray]
    reranked: bool


def apply(
    model: nn.Module, policy: Policy, *, inputs: Inputs | None = None, force: bool = False, batches: Any = None
) -> nn.Module:
    """The slim model that `policy` makes of `model`; the given model is untouched.

    inputs: example inputs at batch 1; the model's own `example_inputs`, or what the policy says, unless given.
    force: take a model of another structure if every group of the policy still fits it.
    batches: `(inputs, labels)` for a criterion that needs data, where channels must be ranked again.

    Raises:
        PolicyError: the policy doesn't fit the model. ModelError: the model is none, or can't be traced.
    """
    return applied(model, policy, inputs=inputs, force=force, batches=batches).model


@torch.inference_mode(False)  # in which nothing could be traced
def applied(
    model: nn.Module,
    policy: Policy,
    *,
    inputs: Inputs | None = None,
    force: bool = False,
    batches: Sequence[tuple[Any, Any]] | None = None,
) -> Application:
    """As `apply`, with what was found on the way."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"{model!r} is a {type(model).__name__}; give the dense model, an nn.Module")
    if not isinstance(policy, Policy):
        raise PolicyError(f"{policy!r} is a {type(policy).__name__}; give what amc.load_policy(path) returns")
    if structure_sha256(model) != policy.model.structure_sha256 and not force:
        raise PolicyError(
            f"the policy was found for another structure than this model's ({policy.model.name}); "
            "pass --force (force=True) to apply it where every group still fits"
        )
    example = _example(model, policy) if inputs is None else inputs
    # A policy says what it keeps: at a floor that fails on one example, it may be meant for larger batches.
    structure = verify(model, example, trace(model, example), floors=False)
    fit(policy, structure.groups)
    same = weights_sha256(model) == policy.model.weights_sha256 and all(g.kept is not None for g in policy.groups)
    if same:
        kept = {group.name: np.asarray(group.kept) for group in policy.groups}
    else:
        log.warning("other weights than the policy was found for: channels are ranked again by %s", policy.importance)
        kept = kept_units(rank(model, structure, policy.importance, batches=batches), policy.widths)
    dense = {g.name: np.arange(g.channels) for g in structure.groups if g.name not in kept}
    return Application(slim(model, structure, kept | dense), structure, kept, not same)


def fit(policy: Policy, groups: Sequence[Group]) -> None:
    """Raises a PolicyError unless the model has every group of the policy, with its channels and allowing its width."""
    known = {group.name: group for group in groups}
    for entry in policy.groups:
        if entry.name not in known:
            raise PolicyError(
                f"the policy names a group {entry.name!r} that the model lacks; {suggest(entry.name, known)}"
            )
        _fit_one(entry, known[entry.name])


def _fit_one(entry: GroupPolicy, group: Group) -> None:
    if (entry.channels, entry.kind) != (group.channels, group.kind):
        raise PolicyError(
            f"group {entry.name!r} has {entry.channels} units of kind {entry.kind} in the policy, "
            f"but {group.channels} of kind {group.kind} in the model"
        )
    if entry.kept is not None and group.cells is not None:
        share = np.bincount(group.cells[entry.kept], minlength=int(group.cells.max()) + 1)
        if share.min() != share.max():
            raise PolicyError(
                f"group {entry.name!r} must keep equally many channels of each group of a grouped layer, "
                f"but `kept` holds {', '.join(map(str, share))}"
            )
    if entry.width not in group.widths:
        raise PolicyError(f"group {entry.name!r} can't keep {entry.width} channels; it can keep {allowed(group)}")


def _example(model: nn.Module, policy: Policy) -> Inputs:
    """Example inputs: the model's own, else what the policy says, its integers ones where the model takes no zeros."""
    if hasattr(model, "example_inputs"):
        return load_model(model).inputs
    zeros = placed(model, example_of(policy))
    try:
        with evaluating(model):
            call(model, zeros)
    except Exception:  # a length of zero, say
        return placed(model, example_of(policy, integers=1))
    return zeros


def example_of(policy: Policy, *, integers: int = 0) -> dict[str, Tensor]:
    """Inputs of the names, shapes and types in a policy: numbers drawn at random, and `integers` where they are whole.

    Raises:
        PolicyError: no tensor has such a shape or type.
    """
    generator, tensors = torch.Generator().manual_seed(0), {}
    for info in policy.model.inputs:
        dtype = getattr(torch, info.dtype, None)
        impossible = PolicyError(f"the policy's input {info.name!r} has an impossible dtype or shape ({info.dtype})")
        if not isinstance(dtype, torch.dtype) or math.prod(info.shape) > MOST_ELEMENTS:
            raise impossible
        drawn = dtype.is_floating_point or dtype.is_complex
        tensor = torch.randn(info.shape, generator=generator) if drawn else torch.full(info.shape, integers)
        try:
            tensors[info.name] = tensor.to(dtype)
        except (RuntimeError, NotImplementedError):  # of a kind that is for storage alone
            raise impossible from None
    return tensors


def load(run: str | os.PathLike[str], model: nn.Module | str | None = None) -> nn.Module:
    """The slim, fine-tuned model of a finished run directory, in eval mode.

    model: the dense module, which takes the run's dense weights, or what `--model` takes; needed unless the run's model
        is a built-in one.

    Raises:
        RunError: the directory is not that of a finished run. PolicyError, ModelError: its parts don't fit.
    """
    folder = Path(run)
    for name in ("settings.json", "policy.json", "dense.safetensors", "model.safetensors"):
        if not (folder / name).is_file():
            raise RunError(f"{folder} is not the directory of a finished run: it has no {name}")
    policy = load_policy(folder / "policy.json")
    dense = model if isinstance(model, nn.Module) else _rebuild(folder, policy, model)
    load_weights(dense, folder / "dense.safetensors")
    slimmed = apply(dense, policy)
    load_weights(slimmed, folder / "model.safetensors")
    return slimmed.eval()


def _rebuild(folder: Path, policy: Policy, model: str | None) -> nn.Module:
    try:
        document = read_json(folder / "settings.json")
        spec, classes = document["settings"]["model"], document["resolved"]["num_classes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / 'settings.json'} can't be read: {error}") from None
    if model is None and spec not in MODELS:
        raise RunError(f"{folder} is a run of {spec}; a file can't make this program run code, so pass it as model=…")
    return load_model(model or spec, num_classes=classes, example=example_of(policy)).model
