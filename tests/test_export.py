"""The exported file is the model: same outputs at any batch size, whole or absent, and the model is left as it was."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from amc.errors import ModelError
from amc.export import export_onnx


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.bn(self.conv(x)).relu().mean((2, 3))))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.left(a) + 2 * self.right(b)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if float(x.sum()) > 0 else x - 1


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 12) * 2


def outputs(path, feeds):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    net = Net()
    net.bn.eval()  # a mixed mode, which export must bring back
    before = {name: value.clone() for name, value in net.state_dict().items()}
    path = tmp_path_factory.mktemp("export") / "net.onnx"
    export_onnx(net, (torch.zeros(1, 3, 8, 8),), path)
    return net, before, path


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_agrees_with_torch_at_any_batch_size(exported, batch):
    net, _, path = exported
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
    modes = [m.training for m in net.modules()]
    expected = net.eval()(x).detach().numpy()
    for module, mode in zip(net.modules(), modes, strict=True):
        module.training = mode
    assert np.abs(outputs(path, {"x": x.numpy()}) - expected).max() < 1e-5


def test_file_is_self_contained_named_and_free_of_source_paths(exported):
    _, _, path = exported
    proto = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(proto, full_check=True)
    assert [v.name for v in proto.graph.input] == ["x"]
    assert [v.name for v in proto.graph.output] == ["output"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not any(t.external_data for t in proto.graph.initializer)
    assert b".py" not in path.read_bytes()
    assert not proto.graph.value_info
    assert [p.name for p in path.parent.iterdir()] == ["net.onnx"]


def test_model_is_left_as_it_was(exported):
    net, before, _ = exported
    assert net.training
    assert not net.bn.training
    assert net.drop.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_named_inputs(tmp_path):
    torch.manual_seed(0)
    net = TwoInputs()
    a, b = torch.randn(3, 4), torch.randn(3, 2)
    export_onnx(net, {"b": b, "a": a}, tmp_path / "two.onnx")
    found = outputs(tmp_path / "two.onnx", {"a": a.numpy(), "b": b.numpy()})
    assert np.abs(found - net(a, b).detach().numpy()).max() < 1e-6


class AnyInputs(nn.Module):
    def forward(self, x, *others):
        return sum(others, x)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_inputs(tmp_path, count):
    path = tmp_path / "any.onnx"
    export_onnx(AnyInputs(), tuple(torch.ones(1, 3) for _ in range(count)), path)
    session = onnxruntime.InferenceSession(path)
    feeds = {one.name: np.full((5, 3), 2, np.float32) for one in session.get_inputs()}
    assert len(feeds) == count
    assert (session.run(None, feeds)[0] == 2 * count).all()


def test_exporter_is_silent(tmp_path, capfd):
    export_onnx(nn.Linear(2, 2), (torch.zeros(1, 2),), tmp_path / "a.onnx")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("model", "shape", "says"),
    [
        (Branching(), (1, 3), "torch.export refuses it"),
        (FixedBatch(), (1, 12), "dynamic batch"),
        (Net(), (1, 2, 8, 8), "does not run"),
    ],
)
def test_what_cannot_be_exported_says_why_and_leaves_no_file(tmp_path, model, shape, says):
    (tmp_path / "a.onnx").write_bytes(b"older")
    with pytest.raises(ModelError, match=says):
        export_onnx(model, (torch.zeros(shape),), tmp_path / "a.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    assert (tmp_path / "a.onnx").read_bytes() == b"older"
    assert model.training


def test_a_scalar_input_is_refused(tmp_path):
    with pytest.raises(ModelError, match="batch axis"):
        export_onnx(Net(), (torch.tensor(1.0),), tmp_path / "a.onnx")
