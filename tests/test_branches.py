"""Parts of a model that the example doesn't reach in evaluation mode: auxiliary heads, experts, early exits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from amc.cost import flops, params
from amc.coupling import trace
from amc.finetune import train
from amc.forward import random_batch
from amc.groups import Structure
from amc.slim import Kept, slim
from amc.verify import difference, random_half, verify

IMAGE = (torch.rand(1, 3, 8, 8),)


class Outputs(NamedTuple):
    """As torchvision's GoogLeNet has them."""

    logits: Tensor
    aux_logits: Tensor


class Auxiliary(nn.Module):
    """A second head, with a layer of its own, that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.aux = nn.Sequential(nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(), nn.Conv2d(5, 3, 1))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor | Outputs:
        h = self.norm(self.a(x)).relu()
        y = self.out(self.b(h).relu().mean((2, 3)))
        return Outputs(y, self.aux(h.mean((2, 3), keepdim=True)).flatten(1)) if self.training else y


class Experts(nn.Module):
    """Every example goes to one of three experts, as its gate says."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate = nn.Linear(4, 8), nn.Linear(4, 3)
        self.inner = nn.ModuleList(nn.Linear(8, 5) for _ in range(3))
        self.outer = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h, chosen = self.a(x).relu(), self.gate(x).argmax(-1)
        y = h.new_zeros(len(x), 3)
        for at, (inner, outer) in enumerate(zip(self.inner, self.outer, strict=True)):
            if (mine := chosen == at).any():
                y[mine] = outer(inner(h[mine]).relu())
        return y


class Switched(nn.Module):
    """Says by `branch(self, h)` whether there is more to do with the hidden channels."""

    def __init__(self, branch: object) -> None:
        super().__init__()
        self.a, self.b, self.out, self.rare = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2), nn.Linear(8, 2)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        more = self.branch(self, h)  # type: ignore[operator]
        y = self.out(self.b(h).relu())
        return y if more is None else y + more


def halves(structure: Structure) -> Kept:
    generator = np.random.default_rng(0)
    return {group.name: random_half(group, generator) for group in structure.groups}


def test_heads_of_training_lose_channels_with_the_rest() -> None:
    net = Auxiliary().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    structure = verify(net, IMAGE, trace(net, IMAGE))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(module.training for module in net.modules())
    assert [(g.name, g.channels) for g in structure.groups] == [("a", 8), ("b", 6)]
    assert "aux.0:in" in structure.groups[0].members
    assert "don't reach" in {f.name: f.reason for f in structure.frozen}["aux.0"]
    assert structure.unreached == tuple(sorted(n for n, _ in net.named_parameters() if n.startswith("aux")))

    small = slim(net, structure, halves(structure))
    assert small.aux[0].weight.shape == (5, 4, 1, 1)
    assert flops(structure)([4, 3]) == 36 * 4 * 27 + 16 * 3 * 4 * 9 + 3 * 3
    assert params(structure)([4, 3]) == sum(p.numel() for p in small.parameters())
    batches = [(torch.rand(4, 3, 8, 8), torch.randint(3, (4,))) for _ in range(2)]
    assert len(train(small, batches, steps=2, lr=0.01)) == 2


@pytest.mark.parametrize("drop", [nn.functional.dropout, nn.functional.alpha_dropout])
def test_dropout_by_function_freezes_nothing(drop: Callable[..., Tensor]) -> None:
    def auxiliary(self: nn.Module, h: Tensor) -> Tensor | None:
        return self.rare(drop(h, 0.5, self.training)) if self.training else None

    net, inputs = Switched(auxiliary).eval(), (torch.rand(1, 4),)
    assert [g.name for g in verify(net, inputs, trace(net, inputs)).groups] == ["a", "b"]


def test_experts_that_the_example_is_not_sent_to_are_slimmed_with_the_others() -> None:
    torch.manual_seed(0)
    net, inputs = Experts().eval(), (torch.randn(1, 4),)
    structure = verify(net, inputs, trace(net, inputs))
    group = structure.groups[0]
    assert {f"inner.{k}:in" for k in range(3)} <= set(group.members)
    small = slim(net, structure, halves(structure))
    assert {inner.in_features for inner in small.inner} == {4}
    batch = (torch.randn(64, 4),)
    assert len(net.gate(batch[0]).argmax(-1).unique()) == 3
    assert difference(net, batch, structure, halves(structure)) < 1e-5


def test_random_batches_look_like_the_example() -> None:
    example = {
        "image": torch.rand(1, 3, 4),
        "token": torch.tensor([[2, 5]]),
        "mask": torch.ones(1, 2, dtype=torch.bool),
    }
    batch = random_batch({**example, "table": torch.zeros(7, 2), "nothing": None}, 6)
    assert [tuple(batch[key].shape) for key in (*example, "table")] == [(6, 3, 4), (6, 2), (6, 2), (7, 2)]
    assert [batch[key].dtype for key in example] == [value.dtype for value in example.values()]
    assert set(batch["token"].unique().tolist()) <= {2, 3, 4, 5}
    assert batch["mask"].all()
    assert batch["nothing"] is None


@pytest.mark.parametrize(
    "branch",
    [
        lambda self, h: self.rare(h.view(-1, 8)) if self.training else None,
        lambda self, h: self.rare(h.view(-1, 8) if self.training else h),
    ],
)
def test_sizes_that_only_training_fixes_freeze_their_channels(branch: object) -> None:
    net, inputs = Switched(branch).eval(), (torch.rand(1, 4),)
    structure = verify(net, inputs, trace(net, inputs))
    assert [g.name for g in structure.groups] == ["b"]
    assert "in training mode, the model fails" in {f.name: f.reason for f in structure.frozen}["a"]


def test_what_no_run_reaches_is_named(caplog: pytest.LogCaptureFixture) -> None:
    net, inputs = Switched(lambda self, h: self.rare(h) if h.sum() > 1e6 else None).eval(), (torch.rand(1, 4),)
    structure = verify(net, inputs, trace(net, inputs))
    assert [g.name for g in structure.groups] == ["a", "b"]
    assert "no run of the model used rare.bias, rare.weight" in caplog.text
    caplog.clear()
    net = Switched(lambda self, h: self.rare(h)).eval()
    assert trace(net, inputs).unreached == ()
    assert caplog.text == ""


def test_a_training_mode_that_needs_more_than_examples_changes_nothing() -> None:
    def targets(self: nn.Module, h: Tensor) -> Tensor | None:
        if self.training:
            raise ValueError("give targets")
        return None

    net, inputs = Switched(targets).eval(), (torch.rand(1, 4),)
    assert [g.name for g in verify(net, inputs, trace(net, inputs)).groups] == ["a", "b"]
