"""The peak of live activations, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from amc import architectures
from amc.errors import ModelError
from amc.export import export_bytes
from latency.memory import peak_memory


def net(last: list[str], shape=("batch", 4)) -> bytes:
    """x (4) → h (8) → relu → g (8) → `last` of g and another value."""
    weights = [numpy_helper.from_array(np.ones((n, 8), dtype=np.float32), f"w{n}") for n in (4, 8)]
    nodes = [
        helper.make_node("MatMul", ["x", "w4"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w8"], ["g"]),
        helper.make_node("Add", last, ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape[0], 8])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString()


def test_a_chain_holds_what_one_layer_reads_and_writes():
    assert peak_memory(net(["g", "g"])) == 4 * (8 + 8)
    assert peak_memory(net(["g", "g"]), batch=3) == 3 * 4 * (8 + 8)


def test_a_shortcut_is_alive_all_along():
    assert peak_memory(net(["g", "h"])) == 4 * (8 + 8 + 8)  # h, r and g: relu can't write over what is read again


def test_a_shape_that_is_not_known_is_named():
    with pytest.raises(ModelError, match="is not known"):
        peak_memory(net(["g", "g"], shape=("batch", None)))


def test_a_residual_network_holds_three_maps():
    model = architectures.resnet20().eval()
    found = peak_memory(export_bytes(model, (torch.zeros(1, 3, 32, 32),)))
    assert found == 4 * 3 * 16 * 32 * 32  # the stream, and what the second convolution of a block reads and writes
