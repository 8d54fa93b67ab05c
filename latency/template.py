"""ONNX files of any policy from a few exports: what depends on the widths is learned by comparing them.

Names don't tell all that an export holds of a policy: a channel count may be in the shape of a `Reshape`, and a weight
may be what the exporter computed ahead (a weight norm, a class token for every row). But the files of one model's
policies differ in numbers alone: lengths of axes, elements of shapes, attributes. Each that differs between the dense
model and some random policies is taken for a multiple of what some axis of some weight keeps. A file is then the dense
one with these numbers set and its weights cut to their first entries: the nodes of the slim model on tensors of the
same shapes, which is what latency depends on. Its outputs are of no use.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, numpy_helper

from amc.errors import ModelError
from amc.groups import Structure
from amc.tracer import describe
from latency.session import check_runs, open_session, random_feeds

MOST = 6
"""Exports, each of seconds."""
LONGEST = 64
"""Integer vectors up to this length may be shapes, whose elements are learned; longer ones must be the same for all."""

Key = tuple[int, int | str, str, int]
"""Where a number is: the node, its input or attribute, `axis`, `value` or `attribute`, and which of several."""


def templated(dense: bytes, structure: Structure, export: Callable[[Sequence[int]], bytes]) -> Template:
    """A template of the model that was exported to `dense`, proven on a policy that it was not learned from.

    export: widths -> the exported file of that policy.

    Raises:
        ModelError: files differ in more than numbers, a number follows no weight, or the proof fails.
    """
    try:
        return _proven(dense, structure, export)
    except ModelError:
        raise
    except Exception as error:  # a graph that is misread can fail anywhere
        raise ModelError(f"the dense ONNX file can't be a template: {describe(error)[:200]}") from error


def _proven(dense: bytes, structure: Structure, export: Callable[[Sequence[int]], bytes]) -> Template:
    rng, files = np.random.default_rng(0), dict[tuple[int, ...], bytes]()
    for _ in range(MOST):
        widths = tuple(_between(group.widths, rng) for group in structure.groups)
        file = export(widths)
        if len(files) > 1:
            template = Template(dense, structure, files)
            made = template(widths)
            if _alike(onnx.load_model_from_string(made), onnx.load_model_from_string(file)):
                session = open_session(made)
                check_runs(session, random_feeds(session, 1, 0))
                return template
        files[widths] = file  # which tells apart what was alike in those before
    raise ModelError(
        f"the dense ONNX file can't be a template: {MOST} exports don't tell which number follows which weight"
    )


def _alike(made: onnx.ModelProto, exported: onnx.ModelProto) -> bool:
    """Whether two files have the same nodes, and these the same numbers."""
    return _form(made) == _form(exported) and _numbers(made) == _numbers(exported)


def _between(widths: Sequence[int], rng: np.random.Generator) -> int:
    """A width that is neither all nor, if possible, one: an axis of one is exported as no axis is."""
    inner = [width for width in widths[:-1] if width > 1]
    return int(rng.choice(inner or widths))


@dataclass(frozen=True)
class _Rule:
    """A number that is this part of what an axis keeps: `dense` of `whole`."""

    axis: int
    dense: int
    whole: int

    def __call__(self, kept: np.ndarray) -> int:
        return int(self.dense * kept[self.axis] // self.whole)


Change = tuple[tuple[str, int, _Rule], ...]
"""What becomes of a tensor: `axis` or `value`, which one, and its rule."""


class Template:
    """Makes the ONNX file of a policy, right in its nodes and sizes but not in its weights.

    dense: the exported file of the dense model. files: those of some policies, by their widths.

    Raises ModelError as `templated` does.
    """

    def __init__(self, dense: bytes, structure: Structure, files: Mapping[tuple[int, ...], bytes]) -> None:
        self._axes = _axes(structure)
        full = tuple(group.channels for group in structure.groups)
        kept = self._axes @ np.array([(1, *widths) for widths in (full, *files)]).T
        self._skeleton = onnx.load_model_from_string(dense)
        rules = _learn(self._skeleton, [onnx.load_model_from_string(file) for file in files.values()], kept)
        self._attributes = {key: rule for key, rule in rules.items() if isinstance(key[1], str)}
        self._take_out({key: rule for key, rule in rules.items() if isinstance(key[1], int)})
        del self._skeleton.graph.value_info[:]  # dense shapes; whoever loads a file infers its own

    def _take_out(self, rules: Mapping[Key, _Rule]) -> None:
        """Sets the tensors apart that change. One that nodes share gets a copy for each way in which it does."""
        graph = self._skeleton.graph
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        changes: dict[tuple[int, int], list[tuple[str, int, _Rule]]] = defaultdict(list)
        for (node, at, kind, i), rule in rules.items():
            assert isinstance(at, int)
            changes[node, at].append((kind, i, rule))
        self._changing: dict[str, tuple[np.ndarray, Change]] = {}
        names: dict[tuple[str, Change], str] = {}
        for (node, at), change in changes.items():
            dense = graph.node[node].input[at]
            name = names.setdefault((dense, tuple(change)), f"{dense}:{len(names)}")
            graph.node[node].input[at] = name
            self._changing[name] = arrays[dense], tuple(change)
        used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        whole = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend(whole)

    def __call__(self, widths: Sequence[int]) -> bytes:
        """The file of the policy that keeps `widths`, in the groups' order."""
        kept = self._axes @ np.array([1, *widths])
        proto = onnx.ModelProto()
        proto.CopyFrom(self._skeleton)
        for name, (dense, change) in self._changing.items():
            array = dense[tuple(_cuts(dense, change, kept))].copy()
            for kind, i, rule in change:
                if kind == "value":
                    array.reshape(-1)[i] = rule(kept)
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
        for (node, slot, _, i), rule in self._attributes.items():
            attribute = next(a for a in proto.graph.node[node].attribute if a.name == slot)
            if attribute.type == AttributeProto.INT:
                attribute.i = rule(kept)
            else:
                attribute.ints[i] = rule(kept)
        return proto.SerializeToString()


def _cuts(dense: np.ndarray, change: Change, kept: np.ndarray) -> list[slice]:
    """The first entries of every axis, as many as it has left."""
    lengths = {i: rule(kept) for kind, i, rule in change if kind == "axis"}
    return [slice(lengths.get(axis)) for axis in range(dense.ndim)]


def _axes(structure: Structure) -> np.ndarray:
    """`(axes, 1 + groups)`: what each thinned axis of a tensor keeps always, and for each unit of a group."""
    owned: dict[tuple[str, int], np.ndarray] = {}
    channels = np.array([group.channels for group in structure.groups])
    for at, group in enumerate(structure.groups):
        for part in group.slices:
            length = structure.tensors[part.tensor].shape[part.axis] * part.blocks
            row = owned.setdefault((part.tensor, part.axis), np.array([length] + [0] * len(channels)))
            row[1 + at] += len(part.index) // group.channels
    rows = np.array(list(owned.values())).reshape(-1, 1 + len(channels))
    rows[:, 0] -= rows[:, 1:] @ channels
    return np.unique(rows, axis=0)


def _learn(dense: onnx.ModelProto, files: Sequence[onnx.ModelProto], kept: np.ndarray) -> dict[Key, _Rule]:
    """What becomes of each number that is not the same in all files.

    kept: `(axes, 1 + files)` lengths, the dense model's first.
    """
    if any(_form(file) != _form(dense) for file in files):
        raise ModelError("the dense ONNX file can't be a template: another policy's has other nodes")
    first, *others = (_numbers(proto) for proto in (dense, *files))
    rules = {}
    for key, number in first.items():
        found = np.array([number, *(other[key] for other in others)])
        if (found == number).all():
            continue
        follow = np.flatnonzero((found * kept[:, :1] == number * kept).all(axis=1))
        if not follow.size:
            node = dense.graph.node[key[0]]
            raise ModelError(f"the dense ONNX file can't be a template: no weight is as long as what {node.name} needs")
        rules[key] = _Rule(int(follow[0]), number, int(kept[follow[0], 0]))
    return rules


def _numbers(proto: onnx.ModelProto) -> dict[Key, int]:
    """Every number that may depend on widths."""
    graph = proto.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    found: dict[Key, int] = {}
    for n, node in enumerate(graph.node):
        for at, name in enumerate(node.input):
            if name in tensors:
                tensor = tensors[name]
                found |= {(n, at, "axis", axis): length for axis, length in enumerate(tensor.dims)}
                if _is_shape(tensor):
                    values = numpy_helper.to_array(tensor).reshape(-1)
                    found |= {(n, at, "value", i): int(value) for i, value in enumerate(values)}
        for attribute in node.attribute:
            numbers = [attribute.i] if attribute.type == AttributeProto.INT else attribute.ints
            found |= {(n, attribute.name, "attribute", i): number for i, number in enumerate(numbers)}
    return found


def _is_shape(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type == onnx.TensorProto.INT64 and len(tensor.dims) < 2 and math.prod(tensor.dims) <= LONGEST


def _form(proto: onnx.ModelProto) -> list[tuple[Any, ...]]:
    """All of a file but numbers and weights: its nodes, where their inputs come from, their attributes."""
    graph = proto.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    sources: dict[str, Any] = {"": None}
    sources |= {value.name: ("input", i) for i, value in enumerate(graph.input)}
    form = []
    for n, node in enumerate(graph.node):
        inputs = tuple(_tensor_form(tensors[x]) if x in tensors else sources.get(x, x) for x in node.input)
        attributes = tuple(sorted(_attribute_form(attribute) for attribute in node.attribute))
        form.append((node.domain, node.op_type, inputs, len(node.output), attributes))
        sources |= {name: (n, i) for i, name in enumerate(node.output) if name}
    return form


def _tensor_form(tensor: onnx.TensorProto) -> tuple[Any, ...]:
    """Type and rank; the values, too, of integers that are no shape: they may be positions of channels."""
    indices = tensor.data_type in (onnx.TensorProto.INT32, onnx.TensorProto.INT64) and not _is_shape(tensor)
    values = numpy_helper.to_array(tensor).tobytes() if indices else b""
    length = tuple(tensor.dims) if indices or _is_shape(tensor) else ()
    return "tensor", tensor.data_type, len(tensor.dims), length, values


def _attribute_form(attribute: onnx.AttributeProto) -> tuple[Any, ...]:
    """Name and type, and what is neither a number nor a list of integers."""
    if attribute.type in (AttributeProto.INT, AttributeProto.FLOAT):
        return attribute.name, attribute.type, 1, b""
    if attribute.type == AttributeProto.INTS:
        return attribute.name, attribute.type, len(attribute.ints), b""
    return attribute.name, attribute.type, 0, attribute.SerializeToString()
