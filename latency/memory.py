"""Memory that activations take: the most that is alive at once while an ONNX file runs, node after node.

A value lives from the node that makes it to the last that reads it; inputs from the start, outputs to the end. An
elementwise operation writes over an input that nobody else reads, as every runtime does. Weights are not counted (the
file's size tells of them), nor what kernels keep to themselves, nor the inside of loops and branches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import onnx

from amc.errors import ModelError

# fmt: off
IN_PLACE = frozenset({
    "Add", "BatchNormalization", "Cast", "Clip", "Div", "Dropout", "Elu", "Erf", "Exp", "Flatten", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Mul", "Neg", "PRelu", "Relu", "Reshape", "Sigmoid",
    "Softmax", "Sqrt", "Squeeze", "Sub", "Tanh", "Unsqueeze",
})
# fmt: on
"""Operations whose output may lie where an input of the same size did."""


def peak_memory(model: bytes, batch: int = 1) -> int:
    """Bytes of the activations of an ONNX file (`read_model` has checked it) that are alive at once, at most.

    Raises ModelError: the shape of a value can't be told.
    """
    proto = onnx.load_model_from_string(model)
    for value in proto.graph.input:
        axes = value.type.tensor_type.shape.dim
        if axes and not axes[0].dim_value:
            axes[0].dim_value = batch
    for value in proto.graph.output:  # they say `batch`, which would stand against what is inferred
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    weights = {tensor.name for tensor in (*graph.initializer, *graph.sparse_initializer)}
    sizes = {value.name: _bytes(value) for value in (*graph.input, *graph.value_info, *graph.output)}
    reads = [{name for name in _read(node) if name and name not in weights} for node in graph.node]
    last = {name: at for at, names in enumerate(reads) for name in names}
    kept = {value.name for value in graph.output}
    live = {value.name for value in graph.input if value.name not in weights}
    peak = now = sum(_size(sizes, name) for name in live)
    for at, node in enumerate(graph.node):
        made = [name for name in node.output if name]
        dying = {name for name in reads[at] & live if last[name] == at and name not in kept}
        new = sum(_size(sizes, name) for name in made)
        over = node.op_type in IN_PLACE and any(_size(sizes, name) == new for name in dying)
        peak = max(peak, now + (0 if over else new))
        unread = {name for name in made if name not in last and name not in kept}
        now += new - sum(_size(sizes, name) for name in dying | unread)
        live = (live | set(made)) - dying - unread
    return peak


def resources(model: bytes, batch: int = 1) -> dict[str, int | None]:
    """What a file takes beside time, bytes: `size`, and `memory` of its activations (None if shapes aren't known)."""
    try:
        return {"size": len(model), "memory": peak_memory(model, batch)}
    except ModelError:
        return {"size": len(model), "memory": None}


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """The values that a node reads; those that its subgraphs take from outside, too."""
    yield from node.input
    for attribute in node.attribute:
        graphs: Iterable[onnx.GraphProto] = (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs)
        for graph in graphs:
            own = {output for inner in graph.node for output in inner.output}
            own |= {value.name for value in (*graph.input, *graph.initializer)}
            yield from (name for inner in graph.node for name in _read(inner) if name not in own)


def _size(sizes: dict[str, int | None], name: str) -> int:
    size = sizes.get(name)
    if size is None:
        raise ModelError(f"the memory of activations can't be told: the shape of `{name}` is not known")
    return size


def _bytes(value: onnx.ValueInfoProto) -> int | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(axis.HasField("dim_value") for axis in kind.shape.dim):
        return None
    item = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    return math.prod(axis.dim_value for axis in kind.shape.dim) * item
