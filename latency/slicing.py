"""One dense ONNX export, cut to any policy's widths in milliseconds.

An export takes seconds, and a search needs hundreds of files. But a policy only slices tensors (rank once, slice for
ever), and an export holds those same tensors, so the dense file can be sliced too. A plan is made once: which axis of
which initializer belongs to which group, read from the names that the exporter keeps, from the role of a tensor in its
node where it has no name of ours (a bias folded out of batch norm), or from its values (a transposed weight).

What the plan can't know (a channel count hidden in a constant) is not guessed: `sliced` compares the files of a few
policies with the slim model in torch, and refuses where they differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from amc.errors import ModelError
from amc.forward import flatten
from amc.groups import Slice, Structure, of_each_cell
from amc.slim import slim
from amc.tracer import describe
from latency.origin import module_of
from latency.session import open_session

TOLERANCE = 1e-5

Kept = Mapping[str, np.ndarray]


def sliced(
    model: nn.Module, structure: Structure, inputs: tuple[torch.Tensor, ...] | Mapping[str, torch.Tensor], dense: bytes
) -> Slicer:
    """A slicer of `dense`, the export of `model`, proven on random policies and on the narrowest one.

    inputs: example inputs, `(N, …)` each, by position or by name.

    Raises:
        ModelError: it can't be cut, a cut file does not load, or its outputs are not the slim model's (to 1e-5).
    """
    rng = np.random.default_rng(0)
    widths = [[group.floor for group in structure.groups]]
    widths += [[int(rng.choice(group.widths)) for group in structure.groups] for _ in range(2)]
    try:
        slicer = Slicer(dense, structure, {name: _array(value) for name, value in model.state_dict().items()})
        for policy in widths:
            kept = random_kept(structure, policy, rng)
            with torch.no_grad():
                _prove(slicer(kept), slim(model, structure, kept).eval().cpu(), inputs)
    except ModelError:
        raise
    except Exception as error:  # a graph that the plan misreads can fail anywhere, and ONNX Runtime has its own errors
        raise ModelError(f"the dense ONNX file can't be sliced: {describe(error)[:200]}") from error
    return slicer


def _prove(file: bytes, model: nn.Module, inputs: tuple[torch.Tensor, ...] | Mapping[str, torch.Tensor]) -> None:
    """Raises ModelError unless the file computes what the slim model does."""
    session = open_session(file)
    if isinstance(inputs, Mapping):
        feeds = {name: _random_like(x) for name, x in inputs.items()}
        expected = model(**feeds)
    else:
        drawn = [_random_like(x) for x in inputs]
        feeds = dict(zip((value.name for value in session.get_inputs()), drawn, strict=False))
        expected = model(*drawn)
    found = session.run(None, {name: _array(x) for name, x in feeds.items()})
    wanted = [_array(tensor) for tensor in flatten(expected)]
    if len(found) != len(wanted) or not all(map(_close, found, wanted)):
        raise ModelError("the dense ONNX file can't be sliced: its outputs are not those of the slim model")


def _close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return found.shape == wanted.shape and np.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values; as float32 where NumPy lacks their type, as it does bfloat16."""
    tensor = tensor.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:
        return tensor.float().numpy()


def _random_like(x: torch.Tensor) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    if x.dtype.is_floating_point:
        return torch.randn(x.shape, generator=rng, dtype=x.dtype)
    return torch.randint(0, 2, x.shape, generator=rng).to(x.dtype)


def random_kept(structure: Structure, widths: Sequence[int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Units to keep, drawn at random, equally many of every cell."""
    chosen = zip(structure.groups, widths, strict=True)
    return {group.name: of_each_cell(group, width, rng.permutation) for group, width in chosen}


def first_kept(structure: Structure, widths: Sequence[int]) -> dict[str, np.ndarray]:
    """The first units of every cell: where only the shapes count, as they do for latency."""
    return {group.name: of_each_cell(group, width) for group, width in zip(structure.groups, widths, strict=True)}


@dataclass(frozen=True)  # slices compare by identity
class _Cut:
    """One axis of an initializer, and the slice that thins it."""

    axis: int
    group: str
    part: Slice


class Slicer:
    """Cuts one dense ONNX file to any policy. Calling it with the kept units of each group gives a file's bytes.

    dense: the ONNX file of the dense model, weights inside.
    state: state-dict name -> array of the dense model, to recognize weights that the exporter renamed.

    Raises ModelError when a weight of a group is nowhere in the file.
    """

    def __init__(self, dense: bytes, structure: Structure, state: Mapping[str, np.ndarray]) -> None:
        self._channels = {group.name: group.channels for group in structure.groups}
        self._owners: dict[str, tuple[_Cut, ...]] = {}
        for group in structure.groups:
            for part in group.slices:
                cut = _Cut(part.axis, group.name, part)
                self._owners[part.tensor] = (*self._owners.get(part.tensor, ()), cut)
        self._skeleton = onnx.load_model_from_string(dense)
        graph = self._skeleton.graph
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        cuts = _plan(graph.node, arrays, self._owners, state)
        self._cuts = {name: found for name, found in cuts.items() if found}
        self._arrays = {name: arrays[name] for name in self._cuts}
        found = {cut.part.tensor for cuts in self._cuts.values() for cut in cuts}
        for tensor in self._owners.keys() - set(structure.unreached):  # of auxiliary heads, which aren't exported
            if tensor not in found and state[tensor].ndim > 1:  # vectors may have been folded into their neighbours
                raise ModelError(f"the dense ONNX file can't be sliced: it has no trace of the weight `{tensor}`")
        _free_flatten(graph, arrays)
        self._pads = _find_pads(graph, arrays, self._cuts)
        whole = [tensor for tensor in graph.initializer if tensor.name not in self._cuts]
        del graph.initializer[:]
        graph.initializer.extend(whole)
        del graph.value_info[:]  # dense shapes; whoever loads a file infers its own

    def __call__(self, kept: Kept) -> bytes:
        """The ONNX file of the policy; a group that `kept` leaves out stays whole."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self._skeleton)
        masks = {name: np.ones(channels, dtype=bool) for name, channels in self._channels.items()}
        for name, units in kept.items():
            masks[name][:] = False
            masks[name][units] = True
        outputs = {}
        for name, cuts in self._cuts.items():
            array = _thin(self._arrays[name], cuts, masks)
            outputs[name] = array.shape[0]
            proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        for pad in self._pads:
            keep = _keep(self._arrays[pad.weight].shape, 0, self._cuts[pad.weight], masks)
            amounts = pad.amounts.copy()
            before, after = amounts[1], amounts[len(amounts) // 2 + 1]
            amounts[1], amounts[len(amounts) // 2 + 1] = keep[:before].sum(), keep[len(keep) - after :].sum()
            proto.graph.initializer.append(numpy_helper.from_array(amounts, pad.name))
        for node in proto.graph.node:
            if node.op_type == "Conv" and node.input[1] in outputs:
                self._set_group(node, outputs[node.input[1]])
        return proto.SerializeToString()

    def _set_group(self, node: onnx.NodeProto, outputs: int) -> None:
        """A depthwise convolution has as many groups as it has channels left; any other keeps its groups."""
        dense = self._arrays[node.input[1]].shape
        for attribute in node.attribute:
            if attribute.name == "group" and attribute.i > 1 and dense[1] == 1:
                attribute.i = attribute.i * outputs // dense[0]


def _keep(shape: Sequence[int], axis: int, cuts: Iterable[_Cut], masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which positions of an axis stay; groups can share an axis. Of a grouped input axis, all blocks in a row."""
    chosen = [cut for cut in cuts if cut.axis == axis]
    keep = np.ones(shape[axis] * max((cut.part.blocks for cut in chosen), default=1), dtype=bool)
    for cut in chosen:
        keep[cut.part.index] = masks[cut.group][cut.part.unit]
    return keep


def _thin(array: np.ndarray, cuts: Sequence[_Cut], masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """The array without the positions whose units are not in the masks."""
    for axis in sorted({cut.axis for cut in cuts}, reverse=True):  # a block is told by its dense rows: those go last
        keep = _keep(array.shape, axis, cuts, masks)
        blocks = len(keep) // array.shape[axis]
        pairs = zip(np.split(array, blocks), np.split(keep, blocks), strict=True)
        array = np.concatenate([np.compress(stays, block, axis=axis) for block, stays in pairs])
    return array


@dataclass(frozen=True, eq=False)
class _Pad:
    """A shortcut padded with zero channels: how many depends on what stays of the axis that it is added to.

    name: of the initializer that holds the amounts. weight: of the convolution on the addition's other side.
    """

    name: str
    amounts: np.ndarray
    weight: str


def _find_pads(
    graph: onnx.GraphProto, arrays: Mapping[str, np.ndarray], cuts: Mapping[str, tuple[_Cut, ...]]
) -> list[_Pad]:
    producers = {output: node for node in graph.node for output in node.output}
    sums = [node for node in graph.node if node.op_type == "Add"]
    found: list[_Pad] = []
    for node in graph.node:
        if node.op_type != "Pad" or len(amounts := arrays.get(node.input[1], np.zeros(0))) < 4:
            continue
        for other in (o for add in sums if node.output[0] in add.input for o in add.input if o != node.output[0]):
            source = producers.get(other)
            while source is not None and source.op_type in ("BatchNormalization", "Relu", "Identity"):
                source = producers.get(source.input[0])
            if source is not None and source.op_type == "Conv" and source.input[1] in cuts:
                found.append(_Pad(f"{node.output[0]}:amounts", amounts, source.input[1]))
                node.input[1] = found[-1].name
                break
    return found


def _plan(
    nodes: Iterable[onnx.NodeProto],
    arrays: dict[str, np.ndarray],
    owners: Mapping[str, tuple[_Cut, ...]],
    state: Mapping[str, np.ndarray],
) -> dict[str, tuple[_Cut, ...]]:
    """The cuts of each initializer. One that two layers share (the exporter merges equal ones) gets a copy for each."""
    plan: dict[str, tuple[_Cut, ...]] = {}
    for node in nodes:
        for at, name in enumerate(node.input):
            if name not in arrays:
                continue
            cuts = _cuts(node, at, arrays, owners, state)
            if plan.get(name, cuts) != cuts:
                copy = f"{name}:{node.output[0]}"
                arrays[copy] = arrays[name]
                node.input[at] = name = copy
            plan[name] = cuts
    return plan


def _cuts(
    node: onnx.NodeProto,
    at: int,
    arrays: Mapping[str, np.ndarray],
    owners: Mapping[str, tuple[_Cut, ...]],
    state: Mapping[str, np.ndarray],
) -> tuple[_Cut, ...]:
    """The cuts of a node's input: by its role where it has one, else by its name, else by its values."""
    name = node.input[at]
    array = arrays[name]
    if node.op_type in ("Conv", "ConvTranspose") and at == 2:
        # Batch norm folded into a convolution leaves a bias that no tensor of ours has; it lies along the outputs,
        # which a transposed one's weight holds block by block and the bias in a row.
        weight = owners.get(node.input[1], ())
        axis = 1 if node.op_type == "ConvTranspose" else 0
        return tuple(_Cut(0, cut.group, replace(cut.part, blocks=1)) for cut in weight if cut.axis == axis)
    if node.op_type == "BatchNormalization" and at > 0:
        # Layers of equal statistics share tensors after export; the node still knows its module.
        own = f"{module_of(node)}.{('weight', 'bias', 'running_mean', 'running_var')[at - 1]}"
        if own in state and state[own].shape == array.shape:
            return owners.get(own, ())
    if name in state and state[name].shape == array.shape:
        return owners.get(name, ())
    if node.op_type == "MatMul" and array.ndim == 2:
        for tensor, cuts in owners.items():
            if state[tensor].shape == array.shape[::-1] and np.array_equal(state[tensor].T, array):
                return tuple(_Cut(1 - cut.axis, cut.group, cut.part) for cut in cuts)
    return ()


def _free_flatten(graph: onnx.GraphProto, arrays: Mapping[str, np.ndarray]) -> None:
    """`Reshape` to `(batch, features)` with the features counted out: let it count for itself."""
    free = numpy_helper.from_array(np.array([0, -1], dtype=np.int64), "flatten:shape")
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] in arrays and len(shape := arrays[node.input[1]]) == 2:
            if shape[0] not in (0, -1):
                continue
            node.input[1] = free.name
            kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)
    if any(free.name in node.input for node in graph.node):
        graph.initializer.append(free)
