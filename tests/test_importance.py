"""Importance: closed forms worked by hand, planted channels, and the order that policies take prefixes of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from amc.errors import ModelError, UsageError
from amc.groups import Group, Slice, Structure, TensorInfo
from amc.importance import CRITERIA, importance, order, rank


def slice_(tensor: str, axis: int, channels: int, each: int = 1, blocks: int = 1) -> Slice:
    return Slice(tensor, axis, np.arange(channels * each), np.repeat(np.arange(channels), each), blocks)


def structure_of(model: nn.Module, *groups: Group) -> Structure:
    parameters = dict(model.named_parameters())
    tensors = {n: TensorInfo(tuple(t.shape), str(t.dtype), n in parameters) for n, t in model.state_dict().items()}
    return Structure(groups, (), tensors, {n: 1 for n, t in parameters.items() if t.dim() > 1})


def net(channels: int = 4) -> nn.Sequential:
    """conv (0) -> batch norm (1) -> ReLU (2) -> conv (3) -> global pool, flatten -> linear (6)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 5, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )
    return model.eval()


NORM = ("1.weight", "1.bias", "1.running_mean", "1.running_var")


def net_structure(model: nn.Sequential) -> Structure:
    c = model[0].out_channels
    inner = (slice_("0.weight", 0, c), *(slice_(name, 0, c) for name in NORM), slice_("3.weight", 1, c))
    outer = (slice_("3.weight", 0, 5), slice_("3.bias", 0, 5), slice_("6.weight", 1, 5))
    return structure_of(
        model,
        Group("0", c, tuple(range(1, c + 1)), slices=inner),
        Group("3", 5, tuple(range(1, 6)), slices=outer),
    )


def test_norms_of_filters_by_hand():
    model = net(3)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0, 0, 0, 0] = -5.0  # l1 5, l2 5
        model[0].weight[1, :, 0, 0] = 3.0  # l1 6, l2 sqrt(18)
        model[0].weight[2, 1, 2, 2] = 1.0
    structure = net_structure(model)
    np.testing.assert_allclose(importance(model, structure, "l1")["0"], [5, 6, 1])
    np.testing.assert_allclose(importance(model, structure, "l2")["0"], [5, 18**0.5, 1])
    assert rank(model, structure, "l1")["0"].tolist() == [1, 0, 2]
    assert rank(model, structure, "l2")["0"].tolist() == [0, 1, 2]


def test_bn_scale_is_the_absolute_scale_and_leaves_groups_without_norm_to_l1():
    model = net(4)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.1, -0.9, 0.5, 0.0]))
    structure = net_structure(model)
    np.testing.assert_allclose(importance(model, structure, "bn_scale")["0"], [0.1, 0.9, 0.5, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(rank(model, structure, "bn_scale")["3"], rank(model, structure, "l1")["3"])


def test_random_is_seeded_by_group():
    model = net(16)
    structure = net_structure(model)
    first = rank(model, structure, "random", seed=1)["0"]
    np.testing.assert_array_equal(first, rank(model, structure, "random", seed=1)["0"])
    assert (first != rank(model, structure, "random", seed=2)["0"]).any()
    alone = structure_of(model, structure.groups[0])
    np.testing.assert_array_equal(first, rank(model, alone, "random", seed=1)["0"])


def test_equal_units_go_by_index():
    assert order(np.array([1.0, 2.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]


def test_prefixes_keep_cells_balanced():
    cells = np.array([0, 0, 0, 1, 1, 1])
    ranked = order(np.array([9.0, 8.0, 7.0, 1.0, 3.0, 2.0]), cells)
    assert ranked.tolist() == [0, 4, 1, 5, 2, 3]
    for width in (2, 4, 6):
        assert np.bincount(cells[ranked[:width]]).tolist() == [width // 2] * 2


def residual() -> tuple[nn.Module, Structure]:
    """Two linear layers (0, 1) whose outputs are added, read by a third (2)."""
    torch.manual_seed(1)
    model = nn.ModuleList([nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False), nn.Linear(3, 2)])
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [2, 0], [5, 0]]))
        model[1].weight.copy_(torch.tensor([[8.0, 0], [4, 0], [0, 0]]))
    slices = (slice_("0.weight", 0, 3), slice_("1.weight", 0, 3), slice_("2.weight", 1, 3))
    return model, structure_of(model, Group("0", 3, (1, 2, 3), slices=slices))


@pytest.mark.parametrize(
    ("aggregate", "normalize", "expected"),
    [
        ("sum", "none", [9, 6, 5]),
        ("mean", "none", [4.5, 3, 2.5]),
        ("max", "none", [8, 4, 5]),
        ("first", "none", [1, 2, 5]),
        ("sum", "mean", [1 / (8 / 3) + 8 / 4, 2 / (8 / 3) + 4 / 4, 5 / (8 / 3)]),
        ("sum", "max", [0.2 + 1, 0.4 + 0.5, 1]),
        ("max", "l2", [8 / 80**0.5, 4 / 80**0.5, 5 / 30**0.5]),
    ],
)
def test_members_are_normalized_then_aggregated(aggregate: str, normalize: str, expected: list[float]):
    model, structure = residual()
    got = importance(model, structure, aggregate=aggregate, normalize=normalize)["0"]
    np.testing.assert_allclose(got, expected)


def test_output_axes_of_other_layers():
    model = nn.ModuleDict(
        {
            "up": nn.ConvTranspose2d(4, 4, 2, groups=2),
            "embed": nn.Embedding(7, 4),
            "grouped": nn.Conv1d(4, 6, 3, groups=2),
            "dense": nn.Linear(8, 2),
        }
    )
    with torch.no_grad():
        model["up"].weight.copy_(torch.arange(4 * 2 * 2 * 2.0).reshape(4, 2, 2, 2))
    up = Group("up", 4, (2, 4), slices=(slice_("up.weight", 1, 4, blocks=2), slice_("grouped.weight", 1, 4, blocks=2)))
    embed = Group("embed", 4, (1, 2, 3, 4), slices=(slice_("embed.weight", 1, 4), slice_("dense.weight", 1, 4, each=2)))
    got = importance(model, structure_of(model, up, embed))
    w = model["up"].weight.detach()
    expected = [w[:2, 0].sum(), w[:2, 1].sum(), w[2:, 0].sum(), w[2:, 1].sum()]  # block by block
    np.testing.assert_allclose(got["up"], expected)
    np.testing.assert_allclose(got["embed"], model["embed"].weight.detach().abs().sum(0), rtol=1e-6)


def test_what_the_user_can_get_wrong():
    model = net()
    structure = net_structure(model)
    with pytest.raises(UsageError, match=r"'l11' is unknown; did you mean 'l1'"):
        rank(model, structure, "l11")
    with pytest.raises(UsageError, match=r"aggregate 'product' is unknown.*sum, mean, max, first"):
        rank(model, structure, aggregate="product")
    with torch.no_grad():
        model[0].weight[1] = float("nan")
    with pytest.raises(ModelError, match="group '0' by 'l1' is not finite"):
        rank(model, structure)


def test_a_training_model_stays_as_it_is():
    model = net().train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rank(model, net_structure(model))
    assert [m.training for m in model] == [True, False, True, True, True, True, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_orders_every_group_the_same_twice(criterion: str):
    model = net(8)
    structure = net_structure(model)
    x = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    batches = [(x, torch.arange(16) % 3)]
    first, again = (rank(model, structure, criterion, batches=batches) for _ in range(2))
    for group in structure.groups:
        assert sorted(first[group.name].tolist()) == list(range(group.channels))
        np.testing.assert_array_equal(first[group.name], again[group.name])
