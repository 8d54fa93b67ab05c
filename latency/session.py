"""ONNX models from anyone: read, checked, and opened.

A file is checked before ONNX Runtime sees it, so that what is truncated, malformed or reaches outside of itself ends in
one clear message. External data is refused: a file of this project holds its weights itself, and a path in a file from
elsewhere is a way to read what it should not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from amc.errors import AmcError, DeviceError, ModelError
from latency import worker

MAX_BYTES = 2 << 30
"""Protobuf's own limit; a larger file can't be one that this project reads."""


def open_session(
    model: str | os.PathLike[str] | bytes,
    *,
    threads: int = 1,
    providers: Iterable[str] | None = None,
    optimization: str = "all",
) -> onnxruntime.InferenceSession:
    """A session on a checked model: `threads` threads in an operator, one operator at a time, no spinning above one.

    providers: `cpu`, `cuda`, `tensorrt`, `openvino` …, whatever the installed ONNX Runtime offers; the CPU by default.
    optimization: `none`, `basic`, `extended` or `all` (what production uses).

    Raises:
        ModelError: the model can't be read or loaded.
        DeviceError: a provider is missing or does not start.
    """
    data = read_model(model)
    try:
        return worker.open_session(
            data, threads=threads, providers=None if providers is None else list(providers), optimization=optimization
        )
    except worker.WorkerError as error:
        raise as_error(error) from error


def random_feeds(session: onnxruntime.InferenceSession, batch: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs at this batch size, a function of `seed` alone. Raises ModelError where none can be made up."""
    try:
        return worker.random_feeds(session, batch, seed)
    except worker.WorkerError as error:
        raise as_error(error) from error


def check_runs(session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray], batch: int = 1) -> None:
    """Raises ModelError unless the session takes these feeds of so many rows through its model."""
    try:
        outputs = session.run(None, dict(feeds))
        said = f"it gives {[x.shape for x in outputs]}"
        runs = all(x.shape[:1] == (batch,) for x, y in zip(outputs, session.get_outputs(), strict=True) if _by_row(y))
    except Exception as error:  # ONNX Runtime has an exception for each of its statuses
        runs, said = False, f"ONNX Runtime: {str(error).strip()[:300]}"
    if not runs:
        raise ModelError(
            f"the exported model does not run on a batch of {batch} ({said}); does its forward do something else there?"
        )


def _by_row(value: Any) -> bool:
    """Whether a value of a session has the batch as its first axis."""
    return bool(value.shape) and not isinstance(value.shape[0], int)


def as_error(error: worker.WorkerError) -> AmcError:
    """The worker knows no error class of ours; here its two kinds become them."""
    return ModelError(str(error)) if error.kind == "model" else DeviceError(str(error))


def read_model(model: str | os.PathLike[str] | bytes) -> bytes:
    """The bytes of an ONNX model, checked. Raises ModelError."""
    name = "the ONNX model" if isinstance(model, bytes) else f"`{os.fspath(model)}`"
    data = model if isinstance(model, bytes) else _read(Path(model), name)
    if len(data) > MAX_BYTES:
        raise ModelError(f"{name} is larger than {MAX_BYTES >> 30} GiB, the most that a single ONNX file can hold")
    try:
        proto = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's DecodeError, whose package has no types
        raise ModelError(f"{name} is not an ONNX file, or is truncated") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data for tensor in _tensors(proto)):
        raise ModelError(f"{name} keeps weights in other files; save it with its weights inside (external_data=False)")
    try:
        onnx.checker.check_model(data)
    except (onnx.checker.ValidationError, UnicodeDecodeError) as error:  # its message may quote bytes that are no text
        raise ModelError(f"{name} is not valid ONNX: {str(error).strip().splitlines()[0][:300]}") from error
    for tensor in _tensors(proto):
        _check_size(tensor, name)
    return data


def _read(path: Path, name: str) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ModelError(f"{name} is larger than {MAX_BYTES >> 30} GiB, the most that a single ONNX file can hold")
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{name} can't be read: {error.strerror}") from error


def _check_size(tensor: onnx.TensorProto, name: str) -> None:
    """Raw data must be as long as the shape says: ONNX's checker leaves this to whoever reads the tensor."""
    if not tensor.HasField("raw_data"):
        return
    kind = onnx.TensorProto.DataType
    packed = (kind.INT4, kind.UINT4, kind.FLOAT4E2M1)  # two to a byte: ONNX Runtime checks those itself
    if tensor.data_type in packed:
        return
    try:
        item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(f"{name}: the tensor `{tensor.name}` has an unknown type") from error
    wanted = math.prod(tensor.dims) * item
    if wanted != len(tensor.raw_data):
        raise ModelError(
            f"{name}: the tensor `{tensor.name}` of shape {tuple(tensor.dims)} needs {wanted} bytes, but has"
            f" {len(tensor.raw_data)}"
        )


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of the model, those of subgraphs, functions and attributes too."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graph_tensors(graph)
