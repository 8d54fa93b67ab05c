"""Importance: closed forms worked by hand, planted channels, and the order that policies take prefixes of."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from amc.architectures import digits_resnet, mobilenet_v2
from amc.coupling import trace
from amc.criteria_reconstruction import inner_products, last_penalty, removal_step
from amc.errors import ModelError, UsageError
from amc.groups import Group, Slice, Structure, TensorInfo
from amc.importance import CRITERIA, Evidence, importance, order, rank


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


def chain(first: list[list[float]], second: list[list[float]]) -> tuple[nn.Module, Structure]:
    """Two linear layers without bias (0, 1) and the group between them."""
    model = nn.Sequential(
        nn.Linear(len(first[0]), len(first), bias=False), nn.Linear(len(first), len(second), bias=False)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(first))
        model[1].weight.copy_(torch.tensor(second))
    c = len(first)
    group = Group("0", c, tuple(range(1, c + 1)), slices=(slice_("0.weight", 0, c), slice_("1.weight", 1, c)))
    return model, structure_of(model, group)


X = torch.tensor([[1.0], [-2.0], [4.0]])
NO_LABELS = [(X, None)]
LABELS = [(X, torch.zeros(3))]


def test_fpgm_is_the_distance_to_the_other_filters():
    model, structure = chain([[0.0], [1.0], [10.0]], [[1.0, 1, 1]])
    np.testing.assert_allclose(importance(model, structure, "fpgm")["0"], [11, 10, 19])


def test_activation_statistics_by_hand():
    model, structure = chain([[1.0], [-3.0]], [[1.0, 1.0]])  # channels read x and -3x of x = 1, -2, 4
    by = {c: importance(model, structure, c, batches=NO_LABELS)["0"] for c in CRITERIA if c.startswith("a")}
    np.testing.assert_allclose(by["activation_mean"], [7 / 3, 7])
    np.testing.assert_allclose(by["activation_variance"], [6, 54])
    np.testing.assert_allclose(by["apoz"], [2 / 3, 1 / 3])


def test_statistics_do_not_depend_on_how_images_are_batched():
    model, structure = chain([[1.0], [-3.0]], [[1.0, 1.0]])
    apart = [(X[:1], None), (X[1:], None)]
    for criterion in ("activation_mean", "activation_variance", "apoz", "wanda"):
        one, two = (importance(model, structure, criterion, batches=b)["0"] for b in (NO_LABELS, apart))
        np.testing.assert_allclose(one, two, rtol=1e-12)


def test_wanda_is_weight_times_input_norm():
    model, structure = chain([[1.0], [-3.0]], [[2.0, 1.0], [-5.0, 0.5]])
    norm = 21**0.5  # of x
    np.testing.assert_allclose(importance(model, structure, "wanda", batches=NO_LABELS)["0"], [7 * norm, 4.5 * norm])


def mean_output(output: Tensor, labels: Tensor) -> Tensor:
    return output.mean()


def half_square(output: Tensor, labels: Tensor) -> Tensor:
    return (output[:, 0] - labels).square().mean() / 2


def test_first_order_criteria_by_hand():
    """The output is `sum of a_u b_u x`, so the gate of unit u has the gradient `a_u b_u x` for each sample."""
    model, structure = chain([[1.0], [-3.0]], [[2.0, 0.5]])
    ab = np.array([2.0, -1.5])
    options = {"batches": LABELS, "loss": mean_output}
    np.testing.assert_allclose(importance(model, structure, "taylor", **options)["0"], ab**2 * 1.0)  # mean x is 1
    np.testing.assert_allclose(importance(model, structure, "fisher", **options)["0"], ab**2 * 7.0)  # mean x^2 is 7


def test_hessian_by_hand():
    """The loss `mean (sum of g_u a_u b_u x)^2 / 2` has the second derivative `(a_u b_u)^2 mean x^2` in each gate."""
    model, structure = chain([[3.0]], [[2.0]])
    got = importance(model, structure, "hessian", batches=LABELS, loss=half_square)["0"]
    np.testing.assert_allclose(got, [36 * 7 / 2], rtol=1e-6)
    linear = importance(model, structure, "hessian", batches=LABELS, loss=mean_output)["0"]
    np.testing.assert_array_equal(linear, [0])


def test_a_gate_is_shared_by_all_readers_before_squaring():
    """Two readers whose contributions to the output cancel: the unit can go, although each reader needs it."""

    class Cancels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (
                nn.Linear(1, 2, bias=False),
                nn.Linear(2, 1, bias=False),
                nn.Linear(2, 1, bias=False),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + self.c(y)

    model = Cancels()
    with torch.no_grad():
        model.a.weight.fill_(1.0)
        model.b.weight.copy_(torch.tensor([[5.0, 1.0]]))
        model.c.weight.copy_(torch.tensor([[-5.0, 1.0]]))
    slices = (slice_("a.weight", 0, 2), slice_("b.weight", 1, 2), slice_("c.weight", 1, 2))
    structure = structure_of(model, Group("a", 2, (1, 2), slices=slices))
    for criterion, expected in (("taylor", [0, 4.0]), ("fisher", [0, 28.0])):
        got = importance(model, structure, criterion, batches=LABELS, loss=mean_output)["a"]
        np.testing.assert_allclose(got, expected)


def test_inner_products_of_contributions_by_hand():
    """Unit u contributes `a_u x` times its column of the reader; X has energy 21; relative to the whole output's."""
    model, structure = chain([[1.0], [-3.0]], [[2.0, 0.0], [1.0, 1.0]])
    contributions = np.array([[2.0, 1.0], [0.0, -3.0]])  # (unit, output) a_u W_u
    products = contributions @ contributions.T * 21
    got = inner_products(Evidence(model, structure, "thinet", NO_LABELS))["0"]
    np.testing.assert_allclose(got, products / products.sum(), rtol=1e-6)


def test_greedy_removal_is_optimal_step_by_step():
    rng = np.random.default_rng(0)
    contributions = rng.normal(size=(6, 40))
    step = removal_step(contributions @ contributions.T)
    removed: list[int] = []
    for at in range(6):
        harm = {u: np.sum(contributions[[*removed, u]].sum(0) ** 2) for u in range(6) if u not in removed}
        assert step[min(harm, key=harm.__getitem__)] == at
        removed.append(min(harm, key=harm.__getitem__))


def test_lasso_of_orthogonal_units_by_hand():
    """With M = diag(m), `b_u = max(0, 1 - penalty / m_u)`: unit u leaves at the penalty m_u."""
    np.testing.assert_allclose(last_penalty(np.diag([3.0, 5.0, 1.0, 0.0])), [3, 5, 1, 0])


def test_lasso_drops_the_copy():
    rng = np.random.default_rng(0)
    contributions = rng.normal(size=(5, 40))
    contributions[3] = contributions[1]
    penalty = last_penalty(contributions @ contributions.T)
    assert min(penalty[1], penalty[3]) == penalty.min() < max(penalty[1], penalty[3])


DEAD, UNREAD, FLAT = "dead", "unread", "flat"


@pytest.mark.parametrize(
    ("criterion", "plants"),
    [
        ("l1", {DEAD}),
        ("l2", {DEAD}),
        ("bn_scale", {FLAT}),
        ("taylor", {DEAD, UNREAD}),
        ("fisher", {DEAD, UNREAD}),
        ("hessian", {DEAD, UNREAD}),
        ("activation_mean", {DEAD}),
        ("activation_variance", {DEAD, FLAT}),
        ("apoz", {DEAD}),
        ("wanda", {DEAD, UNREAD}),
        ("thinet", {DEAD, UNREAD}),
        ("lasso", {DEAD, UNREAD}),
    ],
)
def test_a_planted_channel_ranks_last_by_the_criteria_that_should_see_it(
    criterion: str, plants: set[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("amc.criteria_gradient.PROBES", 512)  # a curvature of 0 is told from a small one
    x = torch.randn(64, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    batches = [(x[:32], torch.arange(32) % 3), (x[32:], torch.arange(32) % 3)]
    for plant in plants:
        model = net(8)
        with torch.no_grad():
            model[1].running_var.fill_(0.1)
            if plant == DEAD:  # never fires
                model[0].weight[5] = 0
                model[1].bias[5] = -1
            elif plant == UNREAD:
                model[3].weight[:, 5] = 0
            else:  # the same for every image
                model[1].weight[5] = 0
                model[1].bias[5] = 0.1
        assert rank(model, net_structure(model), criterion, batches=batches)["0"][-1] == 5, plant


def test_a_filter_at_the_geometric_median_ranks_last_by_fpgm():
    model = net(8)
    with torch.no_grad():
        model[0].weight[5] = model[0].weight[[0, 1, 2, 3, 4, 6, 7]].mean(0)
    assert rank(model, net_structure(model), "fpgm")["0"][-1] == 5


def test_a_unit_may_own_many_positions_of_its_reader():
    """A channel flattened into a linear layer: the mean over its positions counts."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
        model[2].weight.copy_(torch.arange(8.0).view(1, 8))
    slices = (slice_("0.weight", 0, 2), slice_("2.weight", 1, 2, each=4))
    structure = structure_of(model, Group("0", 2, (1, 2), slices=slices))
    x = torch.arange(4.0).view(1, 1, 2, 2)
    mean = importance(model, structure, "activation_mean", batches=[(x, None)])["0"]
    np.testing.assert_allclose(mean, [1.5, 4.5])
    wanda = importance(model, structure, "wanda", batches=[(x, None)])["0"]
    np.testing.assert_allclose(wanda, [0 + 1 + 4 + 9, 3 * (0 + 5 + 12 + 21)])


def test_groups_that_a_criterion_sees_nothing_of_are_ranked_by_l1_and_named(caplog: pytest.LogCaptureFixture):
    """As in `nn.MultiheadAttention`, which multiplies with its output projection without calling it."""

    class Past(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self[0](x), self[1].weight)

    model, structure = chain([[1.0], [-3.0]], [[2.0, 0.5]])
    model = Past(*model)
    for criterion in ("wanda", "taylor", "fisher", "hessian", "thinet", "lasso", "apoz", "bn_scale"):
        caplog.clear()
        got = importance(model, structure, criterion, batches=[(X, torch.zeros(3, dtype=torch.int64))])["0"]
        np.testing.assert_array_equal(got, [1, 3])
        assert f"{criterion} sees nothing of these groups, which are ranked by l1: 0" in caplog.text


@pytest.mark.parametrize("criterion", [name for name, (help_, _) in CRITERIA.items() if "needs" in help_])
def test_a_criterion_without_its_data_says_what_to_give(criterion: str):
    model = net()
    structure = net_structure(model)
    with pytest.raises(UsageError, match=f"{criterion!r} looks at data and got none; give calibration batches"):
        rank(model, structure, criterion)
    if "labels" in CRITERIA[criterion][0]:
        with pytest.raises(UsageError, match=f"{criterion!r} needs labels"):
            rank(model, structure, criterion, batches=[(torch.zeros(2, 2, 6, 6), None)])


def test_gradients_leave_no_trace():
    model = net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [(torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)]
    for criterion in ("taylor", "fisher", "hessian", "lasso"):
        rank(model, net_structure(model), criterion, batches=batches)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_example_adds_a_criterion_of_its_own(capsys: pytest.CaptureFixture[str]):
    example = Path(__file__).parents[1] / "examples" / "own_importance.py"
    try:
        runpy.run_path(
            str(example),
            run_name="__main__",
        )
    finally:
        CRITERIA.pop("spread", None)
    by_l1, by_spread = (line.split("order ")[1] for line in capsys.readouterr().out.splitlines())
    assert by_l1.startswith("[2,")
    assert by_spread.endswith(", 2]")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_orders_every_group_the_same_twice(criterion: str):
    model = net(8)
    structure = net_structure(model)
    x = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    batches = [(x, torch.arange(16) % 3)]
    first = rank(model, structure, criterion, batches=batches)
    with torch.no_grad():  # the caller's mode changes nothing
        again = rank(model, structure, criterion, batches=batches)
    for group in structure.groups:
        assert sorted(first[group.name].tolist()) == list(range(group.channels))
        np.testing.assert_array_equal(first[group.name], again[group.name])


TRACED = {
    "digits_resnet": (digits_resnet, (1, 8, 8)),
    "mobilenet_v2": (mobilenet_v2, (3, 32, 32)),
}


@pytest.mark.parametrize("name", TRACED)
def test_every_criterion_sees_every_group_of_real_networks(name: str, caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    factory, shape = TRACED[name]
    model = factory().eval()
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    structure = trace(model, (x[:1],))
    for criterion in CRITERIA:
        if criterion == "hessian" and name != "digits_resnet":
            continue  # the same gates as fisher's, and half a minute
        found = importance(model, structure, criterion, batches=[(x, torch.arange(4))])
        assert all(np.ptp(found[group.name]) > 0 for group in structure.groups) or criterion == "bn_scale"
    assert not caplog.text


def test_l1_of_a_blocks_inner_channels_is_the_norm_of_its_first_convolution():
    torch.manual_seed(0)
    model = digits_resnet().eval()
    ranked = rank(model, trace(model, (torch.zeros(1, 1, 8, 8),)))
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".conv1.weight")}
    assert weights
    for name, weight in weights.items():
        expected = weight.abs().sum((1, 2, 3)).argsort(descending=True)
        assert ranked[name.removesuffix(".weight")].tolist() == expected.tolist()
