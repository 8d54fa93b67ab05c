"""A template's files have the nodes and sizes of the exports; where there can be none, policies are exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from amc.coupling import trace
from amc.errors import ModelError
from amc.export import export_bytes
from amc.groups import Structure
from amc.slim import slim
from latency import files
from latency.files import policy_files
from latency.session import open_session, random_feeds
from latency.slicing import first_kept, sliced
from latency.template import templated

X = (torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


class Excited(nn.Module):
    """Squeeze-and-excitation whose gates are put in shape by hand, after a group norm and a channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.down, self.up = nn.Linear(16, 6), nn.Linear(6, 16)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        gates = self.up(self.down(x.mean((2, 3))).relu()).sigmoid()
        x = self.depth(x * gates.view(gates.shape[0], gates.shape[1], 1, 1))
        x = x.view(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Ahead(nn.Module):
    """What the exporter computes ahead: a weight norm, a scale that is put in shape, and a token for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Conv2d(3, 12, 3))
        self.scale = nn.Parameter(torch.rand(12) + 0.5)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.wide, self.head = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (self.normed(x) * self.scale[:, None, None]).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.head(self.wide(x).relu()[:, 0])


def model_of(kind: type[nn.Module]) -> tuple[nn.Module, Structure, bytes]:
    torch.manual_seed(0)
    net = kind().eval()
    return net, trace(net, X), export_bytes(net, X)


def exporter(net: nn.Module, structure: Structure) -> Callable[[Sequence[int]], bytes]:
    return lambda widths: export_bytes(slim(net, structure, first_kept(structure, widths)), X)


def sizes(file: bytes) -> list[object]:
    """Each node, with the lengths of its weights, the elements of its shapes and its integer attributes."""
    graph = onnx.load_model_from_string(file).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    return [
        (
            node.op_type,
            [list(tensors[x].dims) if x in tensors else None for x in node.input],
            [
                onnx.numpy_helper.to_array(tensors[x]).tolist()
                for x in node.input
                if x in tensors and tensors[x].data_type == onnx.TensorProto.INT64
            ],
            sorted((a.name, a.i, list(a.ints)) for a in node.attribute),
        )
        for node in graph.node
    ]


@pytest.mark.parametrize("kind", [Excited, Ahead])
def test_a_file_has_the_nodes_and_sizes_of_the_export(kind):
    net, structure, dense = model_of(kind)
    with pytest.raises(ModelError):
        sliced(net, structure, X, dense)
    export = exporter(net, structure)
    template = templated(dense, structure, export)
    for widths in (
        [group.widths[0] for group in structure.groups],
        [group.widths[len(group.widths) // 3] for group in structure.groups],
        [group.channels for group in structure.groups],
    ):
        file = template(widths)
        session = open_session(file)
        assert session.run(None, random_feeds(session, 2, 0))[0].shape == (2, 5)
        if min(widths) > 1:
            assert sizes(file) == sizes(export(widths))


def test_numbers_that_follow_no_weight_and_other_nodes_are_refused():
    net, structure, dense = model_of(Excited)
    export = exporter(net, structure)
    floors = [group.floor for group in structure.groups]
    with pytest.raises(ModelError, match="no weight is as long as"):
        templated(dense, structure, lambda widths: export(floors))
    with pytest.raises(ModelError, match="has other nodes"):
        templated(model_of(Ahead)[2], structure, export)


@pytest.mark.parametrize("possible", [True, False])
def test_after_a_few_exports_a_template_takes_over_where_there_can_be_one(possible, monkeypatch):
    net, structure, dense = model_of(Excited)
    exports = []

    def counted(model, inputs):
        exports.append(model)
        return export_bytes(model, inputs)

    def refused(*args):
        raise ModelError("not here")

    monkeypatch.setattr(files, "export_bytes", counted)
    if not possible:
        monkeypatch.setattr(files, "templated", refused)
    made = policy_files(net, structure, X, dense)
    rng = np.random.default_rng(0)
    for _ in range(files.FEW + 3):
        widths = [int(rng.choice(group.widths)) for group in structure.groups]
        session = open_session(made(widths))
        assert session.run(None, random_feeds(session, 2, 0))[0].shape == (2, 5)
    assert len(exports) in (range(files.FEW + 3, files.FEW + 7) if possible else [files.FEW + 3])
