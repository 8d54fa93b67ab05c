"""ONNX export: one function behind which the exporter lives.

The file is made by `torch.export` (dynamo) and its optimizer, holds its weights itself (no external data), and has a
dynamic first axis named `batch` on every input, so that one file serves every batch size. Nothing else in the project
calls the exporter; whatever replaces it changes this file alone.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from amc.errors import ModelError
from amc.files import write_atomic
from amc.modes import eval_mode

SCOPES = "pkg.torch.onnx.name_scopes"
"""Key of a node's metadata: the modules that it was traced in, outermost first, as a Python list of strings."""

_CHATTY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch.fx", "torch._guards", "torch._dynamo")


def export_onnx(
    model: nn.Module, inputs: tuple[torch.Tensor, ...] | Mapping[str, torch.Tensor], path: str | os.PathLike[str]
) -> None:
    """Write `model` to an ONNX file, whole or not at all; arguments and errors as for `export_bytes`."""
    write_atomic(path, export_bytes(model, inputs))


def export_bytes(model: nn.Module, inputs: tuple[torch.Tensor, ...] | Mapping[str, torch.Tensor]) -> bytes:
    """The content of an ONNX file of `model`, as it computes in eval mode; its first axis is dynamic, named `batch`.

    inputs: example inputs, `(N, …)` each: positional as a tuple, or by the name of the argument. The values are of no
    account, but for the shapes after the first axis.

    The model is left as it was.

    Raises:
        ModelError: the model can't be exported, or not with a dynamic batch.
    """
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    return _program(model, args, kwargs).SerializeToString()


def _program(model: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> Any:
    """The model as an `onnx.ModelProto`."""
    # Example tensors of two rows: torch.export takes an axis of length one for a constant.
    args = tuple(_two_rows(x) for x in args)
    kwargs = {name: _two_rows(x) for name, x in kwargs.items()}
    batch = torch.export.Dim("batch")
    shapes = _dynamic(model, args, kwargs, {0: batch})
    with eval_mode(model), _silence(), torch.no_grad():
        try:
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                optimize=True,
                external_data=False,
                verbose=False,
                dynamic_shapes=shapes,
                output_names=["output"],
            )
            assert program is not None
            proto = program.model_proto
        except Exception as error:
            # The exporter has dozens of exceptions of its own; to the user they are one: this model has no ONNX form.
            raise ModelError(_explain(model, args, kwargs, error)) from error
    for value in proto.graph.input:
        shape = value.type.tensor_type.shape.dim
        if not shape or not shape[0].dim_param:
            raise ModelError(
                f"{type(model).__name__} can't be exported to ONNX with a dynamic batch: the first axis of its input"
                f" `{value.name}` came out fixed. Look for a batch size turned into a constant in the model's forward"
            )
    return _strip(proto)


def _strip(proto: Any) -> Any:
    """Drop the exporter's notes, which hold source paths of this machine; keep which module each node came from.

    Shapes of intermediate values are dropped, too: ONNX Runtime infers them, and runs some models up to a tenth slower
    where it is told; a file that is cut from another has none.
    """
    for node in proto.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        node.ClearField("doc_string")
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    del proto.graph.value_info[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
    return proto


def _explain(
    model: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], error: Exception
) -> str:
    """Why the export failed: the model itself, or only its dynamic batch."""
    name = type(model).__name__
    try:
        model(*args, **kwargs)
    except Exception as own:
        return f"{name} can't be exported to ONNX: it does not run on a batch of two: {_first_line(own)}"
    try:
        torch.export.export(model, args, kwargs)
    except Exception as own:
        return f"{name} can't be exported to ONNX: torch.export refuses it: {_first_line(own)}"
    return f"{name} can't be exported to ONNX with a dynamic batch: {_first_line(_root(error))}"


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _dynamic(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], axes: dict[int, Any]) -> Any:
    """The dynamic axes of all arguments as torch.export wants them: those that `*inputs` takes, within a tuple."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(axes for _ in args) if args else dict.fromkeys(kwargs, axes)
    before = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    rest = tuple(axes for _ in args[before:])
    return (*(axes for _ in args[:before]), *([rest] if rest else []))


def _two_rows(x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 0:
        raise ModelError("ONNX export needs inputs with a batch axis, but one of the example inputs is a scalar")
    return x[:1].expand(2, *x.shape[1:]).contiguous() if len(x) != 2 else x


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's progress lines, graphs and deprecation warnings about itself from the user."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        quiet = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
