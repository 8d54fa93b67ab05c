"""A sliced ONNX file computes what the slim model does; what can't be sliced is refused."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from amc import architectures
from amc.coupling import trace
from amc.errors import ModelError
from amc.export import export_onnx
from amc.groups import Group, Layer, Slice, Structure
from amc.slim import slim
from latency.files import policy_files
from latency.session import open_session, random_feeds
from latency.slicing import Slicer, first_kept, random_kept, sliced

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Batch norm that folds and one that does not, depthwise and grouped convolutions, flatten, a 3-d linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.pre = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.flat = nn.Linear(6 * 64, 10)
        self.last = nn.Linear(10, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn2(self.depth(self.bn1(self.first(x)).relu()))
        x = self.grouped(self.pre(x.relu()).relu())
        x = self.flat(x.flatten(1)).relu()
        return self.last(x[:, None, :] * torch.ones(1, 2, 1))


def whole(tensor: str, axis: int, units: int, per: int = 1, blocks: int = 1) -> Slice:
    return Slice(tensor, axis, np.arange(units * per), np.arange(units * per) // per, blocks)


def norm(name: str, units: int) -> list[Slice]:
    return [whole(f"{name}.{part}", 0, units) for part in ("weight", "bias", "running_mean", "running_var")]


def structure() -> Structure:
    first = [
        whole("first.weight", 0, 8),
        *norm("bn1", 8),
        whole("depth.weight", 0, 8),
        *norm("bn2", 8),
        *norm("pre", 8),
    ]
    first += [whole("grouped.weight", 1, 8, blocks=2)]
    grouped = [whole("grouped.weight", 0, 6), whole("grouped.bias", 0, 6), whole("flat.weight", 1, 6, per=64)]
    flat = [whole("flat.weight", 0, 10), whole("flat.bias", 0, 10), whole("last.weight", 1, 10)]
    groups = (
        Group("first", 8, (2, 4, 6, 8), slices=tuple(first), layer=Layer("first"), cells=np.arange(8) // 4),
        Group("grouped", 6, (2, 4, 6), slices=tuple(grouped), layer=Layer("grouped"), cells=np.arange(6) // 3),
        Group("flat", 10, tuple(range(1, 11)), slices=tuple(flat), layer=Layer("flat")),
    )
    return Structure(groups, (), {}, {})


def trained(net: nn.Module, seed: int) -> nn.Module:
    """Batch norms with statistics, as training leaves them."""
    rng = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                value.data = torch.rand(value.shape, generator=rng) + 0.5
    return net.eval()


def masked(net: Net, kept: dict[str, np.ndarray]) -> Net:
    """The dense model with what leaves set to zero where it is consumed: the slim model's function, by other means."""
    net = copy.deepcopy(net)
    gone = {group.name: np.setdiff1d(np.arange(group.channels), kept[group.name]) for group in structure().groups}
    with torch.no_grad():
        for unit in gone["first"]:
            net.grouped.weight[unit // 4 * 3 : unit // 4 * 3 + 3, unit % 4] = 0
        for unit in gone["grouped"]:
            net.flat.weight[:, unit * 64 : unit * 64 + 64] = 0
        net.last.weight[:, gone["flat"]] = 0
    return net


def exported(net: nn.Module, folder) -> bytes:
    export_onnx(net, (X,), folder / "dense.onnx")
    return (folder / "dense.onnx").read_bytes()


def slicer(net: nn.Module, dense: bytes) -> Slicer:
    return Slicer(dense, structure(), {name: value.numpy() for name, value in net.state_dict().items()})


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    torch.manual_seed(0)
    net = trained(Net(), 0)
    return net, exported(net, tmp_path_factory.mktemp("slicing"))


@pytest.mark.parametrize("widths", [(8, 6, 10), (2, 2, 1), (6, 4, 7), (4, 6, 3)])
def test_computes_what_the_slim_model_does(subject, widths):
    net, dense = subject
    kept = random_kept(structure(), widths, np.random.default_rng(sum(widths)))
    with torch.no_grad():
        expected = masked(net, kept)(X).numpy()
    found = open_session(slicer(net, dense)(kept)).run(None, {"x": X.numpy()})[0]
    assert np.abs(found - expected).max() < 1e-5


def test_tensors_have_the_sizes_of_the_policy(subject):
    net, dense = subject
    proto = onnx.load_model_from_string(slicer(net, dense)(first_kept(structure(), (4, 2, 3))))
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    assert shapes["first.weight"] == (4, 3, 3, 3)
    assert shapes["depth.weight"] == (4, 1, 3, 3)
    assert shapes["grouped.weight"] == (2, 2, 3, 3)
    assert shapes["flat.weight"] == (3, 128)
    groups = {n.input[1]: a.i for n in proto.graph.node for a in n.attribute if a.name == "group"}
    assert groups == {"first.weight": 1, "depth.weight": 4, "grouped.weight": 2}


def test_a_group_left_out_stays_whole(subject):
    net, dense = subject
    found = open_session(slicer(net, dense)({})).run(None, {"x": X.numpy()})[0]
    with torch.no_grad():
        assert np.abs(found - net(X).numpy()).max() < 1e-5


def test_a_fresh_model_whose_equal_tensors_the_exporter_merged(tmp_path):
    """All folded biases of an untrained network are the same zeros; each layer still gets its own width of them."""
    torch.manual_seed(3)
    net = Net().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.fill_(0.25)
    kept = random_kept(structure(), (4, 2, 5), np.random.default_rng(0))
    found = open_session(slicer(net, exported(net, tmp_path))(kept)).run(None, {"x": X.numpy()})[0]
    with torch.no_grad():
        assert np.abs(found - masked(net, kept)(X).numpy()).max() < 1e-5


def test_a_weight_that_the_file_lacks_is_refused(subject):
    net, dense = subject
    renamed = dense.replace(b"flat.weight", b"flet.weight")
    with pytest.raises(ModelError, match=r"no trace of the weight `flat\.weight`"):
        slicer(net, renamed)


def test_kept_units_are_balanced_over_the_cells():
    kept = random_kept(structure(), (4, 4, 10), np.random.default_rng(0))
    assert np.bincount(kept["first"] // 4).tolist() == [2, 2]
    assert np.bincount(kept["grouped"] // 3).tolist() == [2, 2]
    assert first_kept(structure(), (4, 2, 3))["grouped"].tolist() == [0, 3]


class Normalized(nn.Module):
    """A group norm, whose export counts channels in its constants."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu()).mean((2, 3))


SLOW = ("resnet20", "plain20", "mobilenet_v1", "mobilenet_v2", "densenet40")  # benchmarks/latency_slicing.py: all


@pytest.mark.parametrize("name", ["digits_resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_built_in_model_slices_to_what_it_exports_to(name, tmp_path):
    torch.manual_seed(0)
    net = trained(getattr(architectures, name)(), 1)
    x = torch.zeros(1, 1, 8, 8) if name == "digits_resnet" else torch.zeros(1, 3, 32, 32)
    traced = trace(net, (x,))
    export_onnx(net, (x,), tmp_path / "dense.onnx")
    proven = sliced(net, traced, (x,), (tmp_path / "dense.onnx").read_bytes())
    rng = np.random.default_rng(0)
    kept = random_kept(traced, [int(rng.choice(group.widths)) for group in traced.groups], rng)
    export_onnx(slim(net, traced, kept), (x,), tmp_path / "slim.onnx")
    opened = [open_session(proven(kept)), open_session(tmp_path / "slim.onnx")]
    feeds = random_feeds(opened[0], 2, 0)
    found, expected = (session.run(None, feeds)[0] for session in opened)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


class HalfBuffer(Net):
    """Holds one tensor of a type that NumPy lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale.float()


class Auxiliary(nn.Module):
    """A head that only training uses, so that the file has none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out, self.aux = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x).relu().mean((2, 3))
        return self.out(h) + self.aux(h) if self.training else self.out(h)


class Transposed(nn.Module):
    """Grouped transposed convolutions: a bias that batch norm leaves when folded, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3, groups=2, bias=False)
        self.bn, self.last = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 12, 3, groups=4)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.bn(self.up(self.first(x).relu())).relu()).relu()).mean((2, 3))


def test_the_bias_of_a_grouped_transposed_convolution_is_cut_in_a_row(tmp_path):
    torch.manual_seed(0)
    net = trained(Transposed(), 2)
    traced = trace(net, (X[:1],))
    assert [group.name for group in traced.groups] == ["first", "up", "last"]
    proven = sliced(net, traced, (X[:1],), exported(net, tmp_path))
    kept = random_kept(traced, [4, 4, 8], np.random.default_rng(0))
    export_onnx(slim(net, traced, kept), (X,), tmp_path / "slim.onnx")
    opened = (open_session(file) for file in (proven(kept), tmp_path / "slim.onnx"))
    found, expected = (session.run(None, {"x": X.numpy()})[0] for session in opened)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [HalfBuffer, Auxiliary])
def test_what_the_file_or_numpy_lacks_is_not_missed(kind, tmp_path):
    torch.manual_seed(0)
    net = kind().eval()
    traced = trace(net, (X[:1],))
    slicer = sliced(net, traced, (X[:1],), exported(net, tmp_path))
    kept = first_kept(traced, [group.floor for group in traced.groups])
    found = open_session(slicer(kept)).run(None, {"x": X.numpy()})[0]
    with torch.no_grad():
        expected = slim(net, traced, kept).eval()(X).numpy()
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("fails", [False, True])
def test_what_can_not_be_sliced_is_exported(fails, tmp_path, monkeypatch):
    """Whether the proof refuses it or the plan misreads the graph so that the cutting itself fails."""
    if fails:
        monkeypatch.setattr(Slicer, "__call__", lambda self, kept: [][0])
    torch.manual_seed(0)
    net = Normalized().eval()
    traced = trace(net, (X[:1],))
    export_onnx(net, (X,), tmp_path / "dense.onnx")
    dense = (tmp_path / "dense.onnx").read_bytes()
    assert traced.groups
    with pytest.raises(ModelError):
        sliced(net, traced, (X[:1],), dense)
    floor = [group.floor for group in traced.groups]
    found = open_session(policy_files(net, traced, (X[:1],), dense)(floor)).run(None, {"x": X.numpy()})[0]
    with torch.no_grad():
        expected = slim(net, traced, first_kept(traced, floor)).eval()(X).numpy()
    assert np.abs(found - expected).max() < 1e-5
