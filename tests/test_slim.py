"""Slimming: what stays as it was, and that verification catches what is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amc.cost import params, size
from amc.coupling import trace
from amc.errors import ModelError
from amc.slim import slim
from amc.verify import _failing, difference, random_half, smallest_step, verify
from amc.weights import own_tensors, safetensors_size
from tests.topologies import build


def halves(structure: object) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {group.name: random_half(group, generator) for group in structure.groups}  # type: ignore[attr-defined]


def test_kept_channels_are_the_dense_ones() -> None:
    net, inputs = build("Plain")
    small = slim(net, trace(net, inputs), {"net.0": np.array([1, 4, 6])})
    dense, state = net.state_dict(), small.state_dict()
    assert torch.equal(state["net.0.weight"], dense["net.0.weight"][[1, 4, 6]])
    assert torch.equal(state["net.1.running_var"], dense["net.1.running_var"][[1, 4, 6]])
    assert torch.equal(state["net.3.weight"], dense["net.3.weight"][:, [1, 4, 6]])
    assert torch.equal(state["net.3.bias"], dense["net.3.bias"])


def test_modules_say_their_new_sizes() -> None:
    net, inputs = build("GroupedConvolution")
    structure = trace(net, inputs)
    small = slim(net, structure, halves(structure))
    assert (small.stem.out_channels, small.grouped.in_channels, small.grouped.out_channels) == (4, 4, 8)
    assert small.grouped.groups == 4
    net, inputs = build("Depthwise")
    small = slim(net, trace(net, inputs), {"stem": np.array([0, 5])})
    assert (small.depth.in_channels, small.depth.out_channels, small.depth.groups) == (2, 4, 2)
    net, inputs = build("ConvNeXtBlock")
    assert slim(net, trace(net, inputs), {"stem": np.arange(3)}).block[0].normalized_shape == (3,)
    net, inputs = build("VisionTransformer")
    assert slim(net, trace(net, inputs), {"attention.qkv": np.array([2])}).attention.num_heads == 1


def test_a_slim_model_is_a_model_of_its_own() -> None:
    net, inputs = build("ResidualIdentity")
    structure = trace(net, inputs)
    small = slim(net, structure, {"inner": np.arange(3)})
    shared = {t.data_ptr() for t in net.state_dict().values()} & {t.data_ptr() for t in small.state_dict().values()}
    assert not shared
    assert {type(module).__module__.split(".")[0] for module in small.modules()} == {"torch", "tests"}


def test_dtype_mode_and_gradients_stay() -> None:
    net, inputs = build("ResidualIdentity")
    structure = trace(net, inputs)
    net = net.to(torch.bfloat16).train()
    net.norm.eval()
    net.inner.weight.requires_grad_(False)
    small = slim(net, structure, halves(structure))
    assert all(t.dtype == torch.bfloat16 for t in small.state_dict().values() if t.is_floating_point())
    assert (small.training, small.norm.training) == (True, False)
    assert (small.inner.weight.requires_grad, small.outer.weight.requires_grad) == (False, True)
    assert isinstance(small.inner.weight, nn.Parameter)


def test_tied_weights_stay_tied() -> None:
    net, inputs = build("WeightTied")
    small = slim(net, trace(net, inputs), {"conv": np.arange(5)})
    assert small.a.weight is small.b.weight
    assert small.a.weight.shape == (5, 5, 1, 1)
    assert small.shift.shape == (1, 5, 1, 1)


def test_hooks_go_along() -> None:
    net, inputs = build("Plain")
    seen: list[tuple[int, ...]] = []
    net.get_submodule("net.0").register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape)))
    small = slim(net, trace(net, inputs), {"net.0": np.arange(2)})
    small(*inputs)
    assert seen[-1] == (1, 2, 6, 6)


def test_a_slim_model_trains() -> None:
    net, inputs = build("GroupedQueryAttention")
    structure = trace(net, inputs)
    small = slim(net, structure, halves(structure))
    small(*inputs).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_full_widths_are_a_plain_copy() -> None:
    net, inputs = build("Dense")
    structure = trace(net, inputs)
    small = slim(net, structure, {group.name: np.arange(group.channels) for group in structure.groups})
    for key, value in small.state_dict().items():
        assert torch.equal(value, net.state_dict()[key])


def test_verification_keeps_all_that_is_right() -> None:
    net, inputs = build("Inception")
    structure = trace(net, inputs)
    assert verify(net, inputs, structure).groups == structure.groups


@pytest.mark.parametrize("fault", ["order", "missing"])
def test_verification_catches_a_wrong_coupling_and_blames_the_right_group(fault: str) -> None:
    net, inputs = build("Inception")
    structure = trace(net, inputs)
    group = structure.groups[1]
    *others, last = group.slices
    wrong = {
        "order": (*others, replace(last, unit=np.roll(last.unit, 1))),  # reads the channels in another order
        "missing": tuple(others),  # forgets the consumer
    }[fault]
    groups = tuple(replace(g, slices=wrong) if g is group else g for g in structure.groups)
    checked = verify(net, inputs, replace(structure, groups=groups))
    assert [g.name for g in checked.groups] == ["a", "c", "last"]
    assert next(f.reason for f in checked.frozen if f.name == "b").startswith("slimmed, the model")


def test_verification_finds_sizes_that_code_fixes() -> None:
    net, inputs = build("PaddedShortcutFixed")
    checked = verify(net, inputs, trace(net, inputs))
    assert [g.name for g in checked.groups] == ["stem", "inner"]
    assert "outer" in {f.name for f in checked.frozen}


class Halves(nn.Module):
    """Two layers that read a half of the channels each, wherever the middle then is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(3, 16), nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.stem(x).tensor_split(2, -1)
        return self.head(torch.cat([self.a(first), self.b(second)], -1))


class TwoAttentions(nn.Module):
    """Both read one number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.out = 4, nn.Linear(8, 2)
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.proj = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for qkv, proj in zip(self.qkv, self.proj, strict=True):
            q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            x = x + proj((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        return self.out(x)


@pytest.mark.parametrize(
    ("net", "shape", "traced", "proved"),
    [
        (Halves(), (1, 5, 3), ["stem", "stem:1", "a", "b"], ["a", "b"]),
        (TwoAttentions(), (1, 5, 8), ["qkv.0", "qkv.1"], []),
    ],
)
def test_verification_finds_groups_that_work_at_equal_widths_alone(
    net: nn.Module, shape: tuple[int, ...], traced: list[str], proved: list[str]
) -> None:
    inputs = (torch.randn(shape),)
    structure = trace(net, inputs)
    assert [group.name for group in structure.groups] == traced
    assert [group.name for group in verify(net, inputs, structure).groups] == proved


class Through(nn.Module):
    """A linear layer, something of its channels, and another one."""

    def __init__(self, use: Callable[[Tensor], Tensor], inputs: int = 3) -> None:
        super().__init__()
        self.stem, self.use, self.head = nn.Linear(inputs, 8), use, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self.stem(x)).mean(1))


class OwnNorm(nn.Module):
    """A layer norm as in ConvNeXt's published code."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.normalized_shape = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8)), (8,)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias)


class Pooling(nn.Module):
    """Attention over positions by a product with one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.vector).softmax(1)[..., None] * x


@pytest.mark.parametrize(
    ("use", "frozen"),
    [
        (OwnNorm(), ""),
        (Pooling(), ""),
        (lambda x: F.layer_norm(x, x.shape[-1:]), ""),
        (lambda x: F.layer_norm(x, (8,)), "slimmed, the model fails"),
        (nn.LayerNorm(8, elementwise_affine=False), "`use` fixes its normalized_shape and has no weight"),
    ],
)
def test_sizes_that_follow_from_the_input_or_a_weight_fix_nothing(use: Any, frozen: str) -> None:
    net, inputs = Through(use).eval(), (torch.randn(1, 5, 3),)
    checked = verify(net, inputs, trace(net, inputs))
    assert [group.name for group in checked.groups] == ([] if frozen else ["stem"])
    assert frozen in {each.name: each.reason for each in checked.frozen}.get("stem", "")


class PooledNorm(nn.GroupNorm):
    """A group norm of pooled features, as in ASPP: with one channel a group it has one value to norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean(1))[:, None]


@pytest.mark.parametrize(
    ("use", "widths"),
    [(lambda x: x.mean(1).squeeze()[None, None], (2, 3, 4, 5, 6, 7, 8)), (PooledNorm(2, 8), (4, 6, 8))],
)
def test_a_floor_at_which_the_model_fails_is_raised(use: Any, widths: tuple[int, ...]) -> None:
    """A single channel's axis is squeezed away; a single value can't be normed."""
    net, inputs = Through(use).eval(), (torch.randn(1, 5, 3),)
    traced = trace(net, inputs)
    checked = verify(net, inputs, traced)
    assert [(group.name, group.widths) for group in checked.groups] == [("stem", widths)]
    assert traced.groups[0].floor == widths[0] // 2


def test_trial_removals_are_the_smallest_step_and_a_half() -> None:
    net, inputs = build("GroupedConvolution")
    group = trace(net, inputs).groups[0]
    assert smallest_step(group).tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert len(random_half(group, np.random.default_rng(0))) == 4


def test_what_modules_cache_in_evaluation_is_forgotten() -> None:
    class Caching(nn.Module):
        """Keeps a product of its weights while it is in evaluation mode (LeViT's attention biases)."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(4, 6), nn.Linear(6, 2), nn.Parameter(torch.rand(6))
            self.cache: Tensor | None = None

        def train(self, mode: bool = True) -> Caching:
            self.cache = None if mode else self.cache
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            self.cache = self.scale * 2 if self.cache is None else self.cache
            return self.b(self.a(x) * self.cache)

    net, inputs = Caching().eval(), (torch.randn(1, 4),)
    with torch.no_grad():
        net(*inputs)
    structure = verify(net, inputs, trace(net, inputs))
    assert [g.name for g in structure.groups] == ["a"]
    slim(net, structure, {"a": np.arange(2)})(*inputs)


def test_what_can_not_be_copied_is_a_model_error() -> None:
    net, inputs = build("Plain")
    structure = trace(net, inputs)
    net.handle = (x for x in range(3))  # type: ignore[assignment]
    with pytest.raises(ModelError, match="can't be copied"):
        slim(net, structure, {})


def test_difference_is_zero_for_the_dense_model() -> None:
    net, inputs = build("UNet")
    assert difference(net, inputs, trace(net, inputs), {}) == 0.0


def test_weight_norm_and_norms_of_single_channels_are_slimmed() -> None:
    for wrap in (nn.utils.parametrizations.weight_norm, _old_weight_norm):
        net = nn.Sequential(wrap(nn.Linear(4, 6)), nn.ReLU(), wrap(nn.Linear(6, 5)), nn.Linear(5, 2)).eval()  # type: ignore[operator]
        inputs = (torch.randn(1, 4),)
        assert len(verify(net, inputs, trace(net, inputs)).groups) == 2
        net = nn.Sequential(
            *(nn.Conv1d(3, 8, 3), wrap(nn.Conv1d(8, 8, 3, groups=8)), wrap(nn.Conv1d(8, 12, 3, groups=4))),  # type: ignore[operator]
            *(nn.Flatten(), nn.Linear(48, 2)),
        ).eval()
        inputs = (torch.randn(1, 3, 10),)
        structure = verify(net, inputs, trace(net, inputs))
        assert [group.channels for group in structure.groups] == [8, 12], "depthwise and grouped convolutions, too"
        small = slim(net, structure, halves(structure))
        assert [layer.out_channels for layer in small[:3]] == [4, 4, 4]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(8, 8), nn.Conv2d(8, 2, 3)).eval()
    inputs = (torch.randn(1, 3, 8, 8),)
    assert [g.channels for g in verify(net, inputs, trace(net, inputs)).groups] == [8]


@pytest.mark.parametrize("bias", [True, False])
def test_parametrized_layers_say_their_new_sizes(bias: bool) -> None:
    wrap = nn.utils.parametrizations.weight_norm
    layers = [wrap(nn.Conv2d(8, 8, 3, groups=8, bias=bias)), wrap(nn.Conv2d(8, 12, 1, bias=bias))]
    net, inputs = nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.Conv2d(12, 2, 3)).eval(), (torch.randn(1, 3, 8, 8),)
    structure = verify(net, inputs, trace(net, inputs))
    assert [group.channels for group in structure.groups] == [8, 12]
    small = slim(net, structure, halves(structure))
    assert [(layer.in_channels, layer.out_channels, layer.groups) for layer in small[1:3]] == [(4, 4, 4), (4, 6, 1)]


@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_is_slimmed(wrap: object) -> None:
    layers = [wrap(nn.Conv2d(3, 8, 3)), nn.ReLU(), wrap(nn.Conv2d(8, 6, 3)), nn.Flatten(), wrap(nn.Linear(96, 2))]  # type: ignore[operator]
    net, inputs = nn.Sequential(*layers).eval(), (torch.randn(1, 3, 8, 8),)
    structure = verify(net, inputs, trace(net, inputs))
    assert [g.channels for g in structure.groups] == [8, 6]
    small = slim(net, structure, halves(structure)).train()
    small(torch.randn(2, 3, 8, 8)).sum().backward()


@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_norm_that_cannot_compute_a_slim_weight_freezes_its_groups(wrap: Any) -> None:
    """Spectral norm's vectors are of the whole weight's columns, those of a grouped convolution of one group's."""
    norm = wrap(nn.Conv2d(8, 8, 3, groups=2))
    net, inputs = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 2, 3)).eval(), (torch.randn(1, 3, 8, 8),)
    checked = verify(net, inputs, trace(net, inputs))
    assert [group.name.partition(".")[0] for group in checked.groups] == ["1"]
    assert "its weight can't be computed" in {each.name: each.reason for each in checked.frozen}["0"]


def _old_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(module)


def test_hooked_weights_with_gradients_are_copied() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.utils.spectral_norm(nn.Linear(6, 5)), nn.Linear(5, 2))
    net(torch.randn(3, 4)).sum().backward()
    structure = trace(net, (torch.randn(1, 4),))
    assert slim(net, structure, {}) is not net


@pytest.mark.parametrize("scale", [0.0, 1e-6])
def test_branches_of_zeros_or_nearly_hide_nothing(scale: float) -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(4, 6), nn.Linear(6, 4), nn.Parameter(torch.full((4,), scale))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return x + self.scale * self.b(h * h.shape[-1])

    net, inputs = Wrong().eval(), (torch.randn(1, 4),)
    structure = verify(net, inputs, trace(net, inputs))
    assert structure.groups == ()
    assert "wrong" in {f.name: f.reason for f in structure.frozen}["a"]


def test_tied_weights_are_slimmed_in_both_places() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.a, self.o = nn.Embedding(9, 6), nn.Linear(6, 5), nn.Linear(6, 9, bias=False)
            self.o.weight = self.e.weight

        def forward(self, x: Tensor) -> Tensor:
            h = self.e(x)
            return self.o(h + nn.functional.linear(self.a(h).relu(), self.a.weight.t()))

    net, inputs = Tied().eval(), (torch.arange(4)[None],)
    structure = verify(net, inputs, trace(net, inputs))
    assert {g.name: g.channels for g in structure.groups} == {"e": 6, "a": 5}
    small = slim(net, structure, halves(structure))
    assert small.o.weight is small.e.weight
    assert small.a.weight.shape == (2, 3)


def test_weights_that_share_their_memory_alone_are_tied() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 3)
    ).eval()
    net[3].weight.data = net[1].weight.data
    inputs = (torch.randn(1, 3, 8, 8),)
    structure = verify(net, inputs, trace(net, inputs))
    assert {g.name: g.channels for g in structure.groups} == {"0": 6}
    for kept in ({}, halves(structure)):
        small = slim(net, structure, kept)
        assert small[1].weight.data_ptr() == small[3].weight.data_ptr()
        assert small[1].weight is not small[3].weight
        widths = [len(kept.get(g.name, range(g.channels))) for g in structure.groups]
        tensors = own_tensors(small)
        assert params(structure)(widths) == sum(t.numel() for t in tensors.values())
        assert size(structure)(widths) == safetensors_size({n: (t.shape, t.dtype) for n, t in tensors.items()})
    assert (small[3].in_channels, small[3].out_channels) == (3, 3)


def test_groups_of_both_halves_are_tried_together_once_the_bad_ones_are_out():
    """A and D fail alone; B and C, of different halves, only with each other."""
    net, inputs = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))), torch.zeros(1, 4)
    groups = trace(net, inputs).groups
    kept = {group.name: np.arange(2) for group in groups}
    a, b, c, d = kept

    def check(kept):
        alone = {a, d} & set(kept)
        return "alone" if alone else "together" if {b, c} <= set(kept) else ""

    assert _failing(check, groups, kept) == {
        a: "alone",
        d: "alone",
        b: "together with other groups: together",
        c: "together with other groups: together",
    }
