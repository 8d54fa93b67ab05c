"""Models: from what `--model` says to a module in eval mode, with inputs that it is known to run on.

Whatever is wrong with a model is found here, before anything is traced: it is built, given its weights, run once on
example inputs at batch 1, and compared with the data.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amc.catalog import LIBRARIES, MODELS
from amc.data import Data
from amc.errors import ModelError
from amc.forward import call, logits
from amc.registry import resolve, suggest
from amc.seeding import derive, seeded
from amc.userfile import call_factory, describe
from amc.weights import load_weights

MOST_ELEMENTS = 2**28
"""Of an example input that is drawn: a gigabyte of float32. A policy's, too, which may come from a stranger."""
Inputs = tuple[Tensor, ...] | dict[str, Tensor]

SHAPES = {"digits_resnet": (1, 1, 8, 8)}
"""Input shapes of built-in models, where they aren't `CIFAR_SHAPE`."""
CIFAR_SHAPE = (1, 3, 32, 32)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that runs. inputs: examples at batch 1, by position or by keyword; input_names: the arguments' names."""

    model: nn.Module
    name: str
    inputs: Inputs
    input_names: tuple[str, ...]


def load_model(
    spec: str | nn.Module,
    *,
    weights: str | Path | None = None,
    data: Data | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    input_shape: Sequence[int] | Sequence[Sequence[int]] | None = None,
    example: Inputs | None = None,
    classifies: bool = True,
    seed: int = 0,
) -> Loaded:
    """The model that `spec` names (as `--model` takes it), or a module of the user's own.

    data: what it must fit; gives built-in models their classes and channels, and all models their example inputs.
    num_classes, in_channels: the same where there is no data. input_shape: one shape, or one an input, batch first.
    example: inputs at batch 1, for where there is neither data nor an `input_shape`; of a dict, see `placed`.
    classifies: whether the labels are class numbers, for each of which the model must have an output.

    The model comes in eval mode, on the CPU. Example inputs are the model's own `example_inputs` (a tensor, a tuple or
    a dict) if it has that attribute, else the data's first example, else random of `input_shape`, else `example`, else
    random of the shape that a built-in model, or a configuration of transformers, is made for.

    Raises:
        ModelError: it can't be built or run, or its weights or the data don't fit it.
    """
    if data is not None:
        num_classes = num_classes or data.num_classes
        if in_channels is None and data.input_shape is not None and len(data.input_shape) == 4:
            in_channels = data.input_shape[1]
    shapes = _shapes(input_shape)
    known = shapes or [tuple(tensor.shape) for tensor in _tensors(example or ())]
    if in_channels is None and len(known) == 1 and len(known[0]) == 4:
        in_channels = known[0][1]
    if isinstance(spec, nn.Module):
        name, model = type(spec).__name__, spec
    else:
        name = spec
        model = _build(spec, num_classes, in_channels, seed)
    if weights is not None:
        load_weights(model, weights)
    model.eval()
    inputs = _example_inputs(name, model, data, shapes, example, seed)
    model_inputs, output = _run(name, model, inputs)
    if data is not None and classifies:
        _check_fit(name, output, data)
    return Loaded(model, name, model_inputs, _input_names(model, model_inputs))


def _build(spec: str, num_classes: int | None, in_channels: int | None, seed: int) -> nn.Module:
    """The module that `spec` names, its random weights those of the seed."""
    if spec in MODELS:
        factory = resolve(MODELS, spec, "--model")
        sizes = {"num_classes": num_classes, "in_channels": in_channels}
        with seeded(seed, "model"):
            return factory(**{key: size for key, size in sizes.items() if size is not None})
    source, _, rest = spec.partition(":")
    if source in LIBRARIES and rest:
        from amc import libraries

        with seeded(seed, "model"):
            return getattr(libraries, source)(rest, num_classes, in_channels)
    if ":" not in spec:
        raise ModelError(
            f"--model {spec!r} is unknown; {suggest(spec, MODELS)}, or torchvision:NAME, timm:NAME, hf:DIR, "
            "FILE.py:FACTORY or PACKAGE.MODULE:FACTORY"
        )
    model = call_factory(spec, ModelError, seed, "model")
    if not isinstance(model, nn.Module):
        raise ModelError(f"the factory {spec} returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model


# ---- example inputs


def _shapes(input_shape: Sequence[int] | Sequence[Sequence[int]] | None) -> list[tuple[int, ...]]:
    """One shape for each input."""
    given: list[Any] = list(input_shape or [])
    nested = given if given and not isinstance(given[0], int) else [given] if given else []
    shapes = [tuple(int(axis) for axis in shape) for shape in nested]
    for shape in shapes:
        if not shape or min(shape) < 1:
            raise ModelError(f"--input-shape {' '.join(map(str, shape))} must be lengths above 0, e.g. 1 3 32 32")
        if math.prod(shape) > MOST_ELEMENTS:
            raise ModelError(f"--input-shape {' '.join(map(str, shape))} is more than {MOST_ELEMENTS:,} numbers")
    return shapes


def _example_inputs(
    name: str, model: nn.Module, data: Data | None, shapes: list[tuple[int, ...]], example: Inputs | None, seed: int
) -> Inputs:
    if hasattr(model, "example_inputs"):
        own = model.example_inputs
        return _as_inputs(own() if callable(own) else own, f"`example_inputs` of {name}")
    if data is not None:
        inputs = _as_inputs(data.example(), f"the input of --data {data.name}")
        if shapes and isinstance(inputs, tuple) and [tuple(x.shape[1:]) for x in inputs] != [s[1:] for s in shapes]:
            said = " and ".join(" ".join(map(str, x.shape)) for x in inputs)
            raise ModelError(f"--input-shape contradicts --data {data.name}, whose inputs are {said}; leave it out")
        return inputs
    if not shapes and example:
        return placed(model, example)
    if not shapes and name in MODELS:
        shapes = [SHAPES.get(name, CIFAR_SHAPE)]
    if not shapes and hasattr(model, "main_input_name"):
        from amc import libraries

        described = libraries.example_inputs(model)
        if described is not None:
            return described
    if not shapes:
        raise ModelError(
            f"the inputs of {name} are unknown; pass --data, or --input-shape (e.g. 1 3 224 224), "
            "or give the model an attribute `example_inputs`"
        )
    generator = torch.Generator().manual_seed(derive(seed, "inputs"))
    return tuple(torch.randn((1, *shape[1:]), generator=generator) for shape in shapes)


def _as_inputs(value: Any, what: str) -> Inputs:
    inputs: Inputs
    if isinstance(value, Mapping):
        inputs = {str(key): item for key, item in value.items()}
    else:
        inputs = (value,) if isinstance(value, Tensor) else tuple(value) if isinstance(value, list | tuple) else ()
    tensors = _tensors(inputs)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ModelError(f"{what} is a {type(value).__name__}; it must be a tensor, or a tuple or dict of tensors")
    return inputs


def _tensors(inputs: Inputs) -> list[Tensor]:
    return list(inputs.values() if isinstance(inputs, dict) else inputs)


def placed(model: nn.Module, example: Inputs) -> Inputs:
    """Named inputs as a model takes them: by position where the names are in its order or not its own, else by name."""
    if not isinstance(example, dict):
        return example
    arguments, values = inspect.signature(model.forward).parameters, tuple(example.values())
    by_name = set(example) <= set(arguments) or any(p.kind is p.VAR_KEYWORD for p in arguments.values())
    return example if by_name and _input_names(model, values) != tuple(example) else values


def _input_names(model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Names of the arguments that the inputs go to."""
    if isinstance(inputs, dict):
        return tuple(inputs)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names += [f"input{i}" for i in range(len(names), len(inputs))]
    return tuple(names[: len(inputs)])


# ---- does it run, does it fit


def _run(name: str, model: nn.Module, inputs: Inputs) -> tuple[Inputs, Any]:
    """The inputs at batch 1, and what the model makes of them."""
    tensors = _tensors(inputs)
    batch = len(tensors[0]) if tensors[0].dim() else 0
    if batch > 1 and all(tensor.dim() and len(tensor) == batch for tensor in tensors):
        single: Inputs = (
            {key: x[:1] for key, x in inputs.items()} if isinstance(inputs, dict) else tuple(x[:1] for x in inputs)
        )
        try:
            with torch.no_grad():
                return single, call(model, single)
        except Exception:  # the first axis is not the batch, or the model is broken: then the message is of all of it
            pass
    try:
        with torch.no_grad():
            return inputs, call(model, inputs)
    except Exception as problem:
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ModelError(
            f"{name} does not run on inputs of shape {shapes}: in {_innermost(model, problem)}: {describe(problem)}. "
            "Check --data and --input-shape, or give the model an attribute `example_inputs`"
        ) from problem


def _innermost(model: nn.Module, problem: BaseException) -> str:
    """The module that was being called when `problem` was raised, by name and kind."""
    names = {id(module): name for name, module in model.named_modules()}
    found: Any = model
    trace = problem.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if id(module) in names:
            found = module
        trace = trace.tb_next
    name, kind = names[id(found)], type(found).__name__
    return f"`{name}` ({kind})" if name else f"its own forward ({kind})"


def _check_fit(name: str, output: Any, data: Data) -> None:
    """A classifier has an output for every class of the data, and where the classes are named, no more."""
    try:
        scores = logits(output)
    except (IndexError, KeyError, StopIteration, TypeError):
        return  # not a classifier; whoever evaluates it knows what to make of it
    if not isinstance(scores, Tensor) or scores.dim() != 2 or data.num_classes is None:
        return
    outputs = scores.shape[1]
    if outputs < data.num_classes or (data.classes and outputs != data.num_classes):
        raise ModelError(
            f"{name} has {outputs} outputs, but --data {data.name} has {data.num_classes} classes; "
            "choose the data that the model was trained on, or a model for these classes"
            + (", or from Python give metric=… and finetune=… of your own" if outputs == 1 else "")
        )
