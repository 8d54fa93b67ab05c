"""Tracing: names, patterns, widths, counts, what is frozen and why, and what is said of models that fail."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amc.cost import flops, size
from amc.coupling import trace
from amc.errors import ModelError, UsageError
from amc.groups import Structure
from amc.labels import Labels, along
from amc.ops_elements import chunks
from amc.slim import slim
from amc.verify import verify
from amc.weights import own_tensors, safetensors_size
from tests.topologies import build

IMAGE = (torch.zeros(1, 3, 8, 8),)


def structure_of(name: str, **options: object) -> Structure:
    net, inputs = build(name)
    return trace(net, inputs, **options)  # type: ignore[arg-type]


def reasons(structure: Structure) -> dict[str, str]:
    return {frozen.name: frozen.reason for frozen in structure.frozen}


class Net(nn.Module):
    """A stem, whatever is done with its output, and a classifier."""

    def __init__(self, use: object, channels: int = 8) -> None:
        super().__init__()
        self.stem, self.use, self.out = nn.Conv2d(3, 8, 3), use, nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.use(self.stem(x)).mean((2, 3)))  # type: ignore[operator]


def test_a_group_says_what_it_slices() -> None:
    group = structure_of("Plain").groups[0]
    assert group.members == ("net.0:out", "net.1:out", "net.3:in")
    assert [(s.tensor, s.axis) for s in group.slices] == [
        ("net.0.weight", 0),
        ("net.0.bias", 0),
        ("net.1.weight", 0),
        ("net.1.bias", 0),
        ("net.1.running_mean", 0),
        ("net.1.running_var", 0),
        ("net.3.weight", 1),
    ]
    layer = group.layer
    assert (layer.name, layer.kind, layer.outputs, layer.inputs) == ("net.0", "conv", 8, 3)
    assert (layer.positions, layer.stride, layer.kernel) == (36, 1, 3)


def test_a_flattened_channel_owns_all_its_positions() -> None:
    group = structure_of("FlattenIntoLinear").groups[0]
    flat = next(s for s in group.slices if s.tensor == "fc.weight")
    assert flat.unit.tolist() == [unit for unit in range(6) for _ in range(9)]


def test_a_concatenation_gives_each_part_its_stretch() -> None:
    structure = structure_of("Inception")
    stretches = {g.name: next(s.index for s in g.slices if s.tensor == "last.weight") for g in structure.groups[:3]}
    assert {name: (index[0], index[-1]) for name, index in stretches.items()} == {
        "a": (0, 3),
        "b": (4, 8),
        "c": (9, 14),
    }


def test_heads_are_units_with_all_their_features() -> None:
    group = next(g for g in structure_of("VisionTransformer").groups if g.kind == "head")
    rows = next(s for s in group.slices if s.tensor == "attention.qkv.weight")
    assert rows.index[rows.unit == 1].tolist() == [*range(4, 8), *range(20, 24), *range(36, 40)]


def test_grouped_query_heads_leave_with_their_key_head() -> None:
    group = next(g for g in structure_of("GroupedQueryAttention").groups if g.kind == "head")
    owned = {s.tensor: int((s.unit == 0).sum()) for s in group.slices}
    assert owned == {"q.weight": 8, "k.weight": 4, "v.weight": 4, "o.weight": 8}


def test_grouped_convolutions_keep_blocks_equal() -> None:
    stem, grouped = structure_of("GroupedConvolution").groups
    assert stem.widths == (4, 8, 12)
    assert stem.cells is not None
    assert stem.cells.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    reader = next(s for s in stem.slices if s.tensor == "grouped.weight")
    assert (reader.axis, reader.blocks, len(reader.index)) == (1, 4, 12)
    assert grouped.widths == (4, 8, 12, 16)


def test_a_padded_shortcut_shrinks_equally_on_both_sides() -> None:
    stem, _, outer = structure_of("PaddedShortcut").groups
    assert next(s.index for s in stem.slices if s.tensor == "outer.weight").tolist() == list(range(4, 12))
    assert outer.widths == (2, 4, 6, 8)


def test_tied_weights_are_named_once() -> None:
    structure = structure_of("WeightTied")
    assert "a.weight" in structure.tensors
    assert "b.weight" not in structure.tensors
    assert structure.positions["a.weight"] == 2 * 36


def test_positions_add_up_over_uses() -> None:
    assert structure_of("SharedModule").positions == {"stem.weight": 36, "shared.weight": 108, "head.2.weight": 1}


def test_transposed_convolutions_multiply_at_their_inputs() -> None:
    structure = structure_of("UNet")
    assert structure.positions["up.weight"] == 16
    assert structure.positions["merge.weight"] == 64


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda x: x.amax(1, keepdim=True) + x, "compares them"),
        (lambda x: x.softmax(1), "compares them"),
        (lambda x: x + x.mean(1, keepdim=True).relu().sum((2, 3), keepdim=True), "uses a mean"),
        (lambda x: x * torch.linspace(0, 1, 8)[:, None, None], "fixed size"),
        (lambda x: torch.ops.aten.copy(torch.zeros(1, 8, 12, 6)[:, :, :6], x), "fixed size"),
        (lambda x: x[:, [1, 0, 2, 3, 4, 5, 6, 7]], "by position"),
        (lambda x: torch.fft.fft(x).real, "not understood"),
        (lambda x: x.cumsum(1), "accumulates"),
        (lambda x: x.cummax(1)[0], "accumulates"),
        (lambda x: x.topk(8, 1)[0], "sorts"),
        (lambda x: x.sort(dim=1).values, "sorts"),
        (lambda x: x * x[:, :1].sigmoid(), "by its position"),
        (lambda x: x.roll(1, 1), "shifts"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 2))[:, 1:9], "unequal"),
    ],
)
def test_what_needs_every_channel_is_frozen_and_says_so(use: object, words: str) -> None:
    structure = trace(Net(use), IMAGE)
    if words == "unequal":
        assert "stem" not in reasons(structure)  # only the padding itself is fixed
    else:
        assert structure.groups == ()
        assert words in reasons(structure)["stem"]


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt(),
        lambda x: F.normalize(x, dim=1),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda x: torch.stack([x, -x]).sum(0),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        F.logsigmoid,
        lambda x: x.unfold(3, 2, 1).sum(-1),
        lambda x: x.flip(3).roll(1, 2).repeat(1, 1, 2, 1),
        lambda x: x.clone().squeeze_().swapaxes_(0, 2).unsqueeze_(0).transpose_(1, 3),
        lambda x: x.clone().flatten(2)[0].t_().mT.unflatten(1, (6, 6))[None].squeeze_((2, 3)),
    ],
)
def test_what_treats_channels_alike_is_not_frozen(use: object) -> None:
    assert [g.name for g in trace(Net(use), IMAGE).groups] == ["stem"]


def test_the_output_is_frozen_and_the_input_is_not_mentioned() -> None:
    assert reasons(structure_of("Plain")) == {"net.5.2": "its channels are the model's output"}


def test_two_groups_of_one_module_get_names_of_their_own() -> None:
    names = [g.name for g in structure_of("SplitFixed").groups]
    assert names == ["stem", "mid", "mid:1", "inner"]


def test_round_to_and_min_keep_limit_widths() -> None:
    options = {"round_to": 4, "min_keep": 0.4}
    assert {g.name: g.widths for g in structure_of("Plain", **options).groups} == {"net.0": (4, 8), "net.3": (8, 12)}
    rounded = structure_of("Depthwise", round_to=8)
    assert [g.name for g in rounded.groups] == ["point"]
    assert "--round-to 8" in reasons(rounded)["stem"]


def test_exclude_and_only_match_names_and_members() -> None:
    assert [g.name for g in structure_of("Inception", exclude=["a", "last*"]).groups] == ["b", "c"]
    assert [g.name for g in structure_of("Inception", only=["norm"]).groups] == ["a", "b", "c"]
    assert [g.name for g in structure_of("Inception", exclude=["last:in"]).groups] == ["last"]
    assert reasons(structure_of("Inception", exclude=["a"]))["a"] == "excluded by --exclude a"


def test_a_pattern_without_a_match_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"--exclude point2.*point"):
        structure_of("Depthwise", exclude=["point2"])
    with pytest.raises(UsageError, match="round_to"):
        structure_of("Depthwise", round_to=0)


def test_a_forward_that_raises_names_the_module_and_leaves_the_model_alone() -> None:
    net = build("Plain")[0].train()
    net.get_submodule("net.1").eval()
    modes = [module.training for module in net.modules()]
    with pytest.raises(ModelError, match=r"fails in `net\.0`.*\(1, 4, 8, 8\)"):
        trace(net, (torch.zeros(1, 4, 8, 8),))
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_tracing_changes_nothing() -> None:
    net, inputs = build("ResidualIdentity")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.get_rng_state()
    trace(net.train(), inputs)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net.training
    assert torch.equal(state, torch.get_rng_state())


def test_keyword_inputs() -> None:
    net, (image, vector) = build("TwoInputs")
    assert [g.name for g in trace(net, {"vector": vector, "image": image}).groups] == ["image", "vector"]


def test_lazy_and_scripted_modules_are_named() -> None:
    with pytest.raises(ModelError, match="lazy"):
        trace(nn.Sequential(nn.Flatten(), Unused()), IMAGE)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lazy = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Extra(nn.Linear):
    """Its state dict holds a tensor beside copies of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self._register_state_dict_hook(lambda _m, state, *_: state.update({n: t.clone() for n, t in state.items()}))

    def get_extra_state(self) -> Tensor:
        return torch.ones(3)

    def set_extra_state(self, state: Tensor) -> None:
        pass


def test_a_state_dict_of_fresh_tensors_hides_no_weights() -> None:
    net, inputs = nn.Sequential(nn.Linear(4, 8), Extra(8, 6), nn.Linear(6, 2)).eval(), (torch.rand(1, 4),)
    structure = verify(net, inputs, trace(net, inputs))
    assert [group.name for group in structure.groups] == ["0", "1"]
    small = slim(net, structure, {group.name: np.arange(3) for group in structure.groups})
    tensors = {name: (tensor.shape, tensor.dtype) for name, tensor in own_tensors(small).items()}
    assert size(structure)([3, 3]) == safetensors_size(tensors), "the extra state is in the file"


class Wrapped(nn.Module):
    """A model whose output is put into a container."""

    def __init__(self, wrap: object) -> None:
        super().__init__()
        self.a, self.out, self.wrap = nn.Linear(4, 6), nn.Linear(6, 5), wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.out(self.a(x)))  # type: ignore[operator]


@pytest.mark.parametrize("wrap", [lambda y: SimpleNamespace(logits=y), lambda y: [SimpleNamespace(parts={"a": (y,)})]])
def test_outputs_in_any_object_are_found(wrap: object) -> None:
    structure = trace(Wrapped(wrap), (torch.rand(1, 4),))
    assert [g.name for g in structure.groups] == ["a"]
    assert "model's output" in reasons(structure)["out"]


def test_an_output_without_a_tensor_is_an_error() -> None:
    with pytest.raises(ModelError, match="returns no tensor"):
        trace(Wrapped(lambda y: y.sum().item()), (torch.rand(1, 4),))


class ComputedWeights(nn.Module):
    """Weights made of others, or used in parts, between two layers that can be pruned."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.last, self.out = nn.Linear(4, 6), nn.Linear(8, 7), nn.Linear(7, 2)
        self.w, self.a, self.b = (nn.Parameter(torch.rand(shape)) for shape in ((8, 6), (8, 3), (3, 6)))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.stem(x), self.w
        if self.how == "parts":
            y = torch.cat([F.linear(h, w[:4]).mean(1), F.linear(h[:, 0], w[4:])], -1)
        else:
            made = {
                "product": lambda: self.a @ self.b,
                "merged": lambda: w + self.a @ self.b,
                "rounded": lambda: torch.fake_quantize_per_tensor_affine(w, 0.1, 0, -8, 7),
                "joined": lambda: torch.cat([w[:4], w[:4]]),
                "scaled": lambda: w / w.norm(),
            }[self.how]
            y = F.linear(h, made()).mean(1)
        return self.out(self.last(y))


@pytest.mark.parametrize("how", ["product", "merged", "rounded", "joined", "scaled", "parts"])
def test_computed_weights_are_counted(how: str) -> None:
    net, x = ComputedWeights(how), torch.rand(1, 5, 4)
    structure = verify(net, (x,), trace(net, (x,)))
    assert "last" in [g.name for g in structure.groups]
    for choose in (lambda g: g.channels, lambda g: g.floor):
        widths = [choose(g) for g in structure.groups]
        small = slim(net, structure, {g.name: np.arange(n) for g, n in zip(structure.groups, widths, strict=True)})
        rows, columns = 8 if how == "joined" else len(small.w), small.w.shape[1]
        middle = 4 * columns * (5 + 1) if how == "parts" else 5 * rows * columns
        layers = 5 * small.stem.weight.numel() + small.last.weight.numel() + small.out.weight.numel()
        assert flops(structure)(widths) == layers + middle


class Expanded(nn.Module):
    """Multiplies each channel with the same column."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.column, self.out = nn.Linear(6, 8), nn.Parameter(torch.randn(4, 1)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.out(F.linear(h, self.column.expand(4, h.shape[-1])))


def test_expanded_weights_are_counted() -> None:
    net, inputs = Expanded().eval(), (torch.randn(1, 6),)
    structure = trace(net, inputs)
    assert structure.groups == (), "pruned, the product would cost less than is known"
    assert "expanded" in reasons(structure)["a"]
    assert flops(structure)([]) == 6 * 8 + 8 * 4 + 4 * 3


@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_normalized_convolutions_are_counted(wrap: object) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), wrap(nn.Conv2d(8, 4, 3)), nn.Flatten(), nn.Linear(64, 2))  # type: ignore[operator]
    structure = trace(net.eval(), IMAGE)
    assert flops(structure)([g.channels for g in structure.groups]) == 36 * 8 * 27 + 16 * 4 * 72 + 128


class Recurrent(nn.Module):
    """A recurrent layer or cell between a stem and a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.recurrent, self.head = nn.Linear(4, 8), getattr(nn, kind)(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.recurrent(self.stem(x))
        return self.head(y[0] if isinstance(y, tuple) else y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_recurrent_layers_are_not_counted(kind: str, dtype: torch.dtype) -> None:
    net = Recurrent(kind).to(dtype).eval()
    assert trace(net, (torch.rand(5, 4, dtype=dtype),)).positions == {"stem.weight": 5, "head.weight": 5}


def test_a_linear_layer_of_one_vector_is_understood() -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6, bias=False), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x[0]))).unsqueeze(0)

    net, inputs = Vector().eval(), (torch.rand(1, 4),)
    assert [g.name for g in verify(net, inputs, trace(net, inputs)).groups] == ["a", "b"]


def test_union_find_merges_positions_and_rows() -> None:
    labels = Labels()
    a, b = labels.fresh(6), labels.fresh(6)
    labels.unify(a, b)
    assert labels.find(b).tolist() == a.tolist()
    rows = labels.coarsen(a.reshape(2, 3), [1])
    assert rows.ravel().tolist() == [0, 3]
    assert labels.find(b).tolist() == [0, 0, 0, 3, 3, 3]
    labels.freeze(rows[:1], "why")
    assert labels.roots_frozen() == {0: "why"}
    assert along(np.arange(3), 1, 4).shape == (1, 3, 1, 1)


def test_chunks_match_shapes_finely() -> None:
    assert list(chunks((1, 12, 4, 4), (1, 3, 4, 16))) == [([1], [1, 2]), ([2, 3], [3])]
    assert list(chunks((6, 4), (3, 8))) == [([0, 1], [0, 1])]
