"""Reconstruction: what least squares must recover, against networks where the answer is known."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amc.architectures import digits_resnet
from amc.coupling import trace
from amc.errors import ModelError
from amc.groups import Group, Slice, Structure
from amc.reconstruct import gather, patches, refit
from amc.slim import slim
from tests.test_importance import net, net_structure, slice_, structure_of

CONVOLUTIONS = [
    nn.Conv2d(3, 4, 3, padding=1),
    nn.Conv2d(3, 4, (1, 3), stride=(2, 1), bias=False),
    nn.Conv2d(3, 4, 3, stride=2, padding=(2, 1), dilation=2),
    nn.Conv2d(3, 4, 4, padding="same"),
    nn.Conv2d(3, 4, 3, padding="valid"),
    nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    nn.Conv1d(3, 4, 5, padding=2, padding_mode="circular"),
    nn.Conv3d(3, 4, 2, stride=2, padding=1),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_patches_are_what_the_layer_multiplies_its_weights_with(layer: nn.Module):
    x = torch.randn(2, 3, *[9, 8, 7][: len(layer.kernel_size)], generator=torch.Generator().manual_seed(0))
    every = patches(layer, x, 10**6, torch.Generator())
    out = every @ layer.weight.flatten(1).T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(out, layer(x).movedim(1, -1).flatten(0, -2), rtol=1e-4, atol=1e-5)


def test_patches_are_sampled_for_each_image():
    layer = nn.Conv2d(1, 1, 1)
    x = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 5, 5)
    sampled = patches(layer, x, 4, torch.Generator().manual_seed(0))
    assert sampled.flatten().tolist() == [0] * 4 + [1] * 4 + [2] * 4
    tokens = patches(nn.Linear(2, 1), torch.randn(3, 7, 2), 5, torch.Generator())
    assert tokens.shape == (15, 2)


def images(count: int = 40) -> list[tuple[Tensor, None]]:
    x = torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    return [(x[: count // 2], None), (x[count // 2 :], None)]


def cut(model: nn.Sequential, kept: np.ndarray) -> nn.Sequential:
    """The net of `tests.test_importance` with the given channels of its first group."""
    slim, k = copy.deepcopy(model), torch.from_numpy(kept)
    for tensor in (slim[0].weight, slim[1].weight, slim[1].bias):
        tensor.data = tensor.data[k]
    slim[1].running_mean, slim[1].running_var = slim[1].running_mean[k], slim[1].running_var[k]
    slim[3].weight.data = slim[3].weight.data[:, k]
    slim[0].out_channels = slim[1].num_features = slim[3].in_channels = len(kept)
    return slim


def test_a_copied_channel_can_go_without_harm():
    """Channel 3 is twice channel 1: the reader's weights for it move over."""
    model = net(4)
    with torch.no_grad():
        model[0].weight[3] = model[0].weight[1]
        model[1].weight[3], model[1].bias[3] = 2 * model[1].weight[1], 2 * model[1].bias[1]
    structure, kept = net_structure(model), np.array([0, 1, 2])
    slim = cut(model, kept)
    x = images()[0][0]
    harm = (slim(x) - model(x)).abs().max()
    refit(slim, structure, gather(model, structure, images()), {"0": kept})
    assert harm > 0.01
    # The ridge leaves a thousandth.
    assert (slim(x) - model(x)).abs().max() < 0.01 * harm


def test_weights_equal_the_least_squares_of_all_patches():
    """Against `lstsq` on the patches themselves; the bias takes up the mean of what is gone."""
    model = net(6)
    structure, kept = net_structure(model), np.array([0, 2, 5])
    slim = cut(model, kept)
    refit(slim, structure, gather(model, structure, images(), patches_per_image=36), {"0": kept})
    x = torch.cat([inputs for inputs, _ in images()])
    hidden = F.pad(model[2](model[1](model[0](x))), (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).movedim(1, 3)
    design = hidden[:, :, :, kept].flatten(0, 2).flatten(1).double()
    design = torch.cat([design, torch.ones(len(design), 1)], 1)
    target = model[:4](x).movedim(1, -1).flatten(0, 2).double()
    exact = torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(slim[3].weight.flatten(1).T.double(), exact[:-1], atol=2e-3, rtol=0)
    torch.testing.assert_close(slim[3].bias.double(), exact[-1], atol=2e-3, rtol=0)


def test_nothing_removed_changes_nothing():
    model = net(4)
    structure = net_structure(model)
    slim = copy.deepcopy(model)
    refit(slim, structure, gather(model, structure, images()), {"0": np.arange(4)})
    assert all(torch.equal(a, b) for a, b in zip(slim.parameters(), model.parameters(), strict=True))


def test_an_input_that_never_fires_keeps_its_weights():
    model = net(4)
    with torch.no_grad():
        model[0].weight[1] = 0
        model[1].bias[1] = -1
    structure, kept = net_structure(model), np.array([1, 2])
    slim = cut(model, kept)
    refit(slim, structure, gather(model, structure, images()), {"0": kept})
    torch.testing.assert_close(slim[3].weight[:, 0], model[3].weight[:, 1], rtol=0, atol=1e-6)
    assert not torch.equal(slim[3].weight[:, 1], model[3].weight[:, 2])


def test_two_groups_on_one_reader_and_its_own_outputs():
    """A concatenation read by a layer that is itself pruned: each axis of its weight loses what its groups lose."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c, self.d = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(torch.cat([self.a(x), self.b(x)], 1)))

    model = Joined()
    with torch.no_grad():
        model.b.weight[1], model.b.bias[1] = model.a.weight[0], model.a.bias[0]  # what goes is still there
    two = np.arange(2)
    groups = (
        Group(
            "a", 2, (1, 2), slices=(slice_("a.weight", 0, 2), slice_("a.bias", 0, 2), Slice("c.weight", 1, two, two))
        ),
        Group(
            "b",
            2,
            (1, 2),
            slices=(slice_("b.weight", 0, 2), slice_("b.bias", 0, 2), Slice("c.weight", 1, two + 2, two)),
        ),
        Group("c", 3, (1, 2, 3), slices=(slice_("c.weight", 0, 3), slice_("c.bias", 0, 3), slice_("d.weight", 1, 3))),
    )
    structure: Structure = structure_of(model, *groups)
    batches = [(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), None)]
    grams = gather(model, structure, batches)
    assert sorted(grams) == ["c.weight", "d.weight"]

    slim = copy.deepcopy(model)
    slim.b, slim.c, slim.d = nn.Linear(3, 1), nn.Linear(3, 2), nn.Linear(2, 2)
    with torch.no_grad():
        slim.b.weight.copy_(model.b.weight[:1])
        slim.b.bias.copy_(model.b.bias[:1])
        slim.c.weight.copy_(model.c.weight[[0, 2]][:, :3])
        slim.c.bias.copy_(model.c.bias[[0, 2]])
    refit(slim, structure, grams, {"b": np.array([0]), "c": np.array([0, 2])})
    x = batches[0][0]
    joined = torch.cat([slim.a(x), slim.b(x)], 1)
    torch.testing.assert_close(
        slim.c(joined), model.c(torch.cat([model.a(x), model.b(x)], 1))[:, [0, 2]], atol=2e-2, rtol=0
    )


def test_grouped_convolutions_keep_their_weights():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    group = Group(
        "0", 4, (1, 2, 3, 4), slices=(slice_("0.weight", 0, 4), slice_("1.weight", 0, 4), slice_("2.weight", 1, 4))
    )
    assert list(gather(model, structure_of(model, group), images())) == ["2.weight"]


class Scaled(nn.Conv2d):
    """Multiplies with something else than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, 0.1 * self.weight, self.bias)


class Same(nn.Conv2d):
    """A convolution by another name."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)


def test_only_products_with_weights_of_their_own_are_fitted():
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.ReLU(), Scaled(6, 6, 1), nn.ReLU(), Same(6, 6, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(54, 2)),
    ).eval()
    net[8].weight = net[6].weight
    grams = gather(net, trace(net, torch.randn(1, 3, 8, 8)), [(torch.randn(4, 3, 8, 8), None)])
    assert list(grams) == ["4.weight", "11.weight"]


def test_gathering_is_seeded_and_leaves_no_trace():
    model = net(4).train()
    structure = net_structure(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, again, other = (gather(model, structure, images(), patches_per_image=3, seed=s) for s in (0, 0, 1))
    assert first["3.weight"].samples == 40 * 3
    assert torch.equal(first["3.weight"].matrix, again["3.weight"].matrix)
    assert not torch.equal(first["3.weight"].matrix, other["3.weight"].matrix)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_another_slim_model_is_refused():
    model = net(4)
    structure = net_structure(model)
    grams = gather(model, structure, images())
    with pytest.raises(ModelError, match=r"'3.weight' of the slim model has shape \(5, 3, 3, 3\)"):
        refit(cut(model, np.array([0, 1, 2])), structure, grams, {"0": np.array([0, 1])})


def test_a_traced_and_slimmed_network_is_nearer_to_the_dense_one():
    """Every group at half its width, the residual streams included."""
    torch.manual_seed(0)
    model = digits_resnet().eval()
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    structure = trace(model, (x[:1],))
    kept = {group.name: np.arange(group.snap(group.channels / 2)) for group in structure.groups}
    sliced, refitted = (slim(model, structure, kept) for _ in range(2))
    refit(refitted, structure, gather(model, structure, [(x, None)]), kept)
    errors = [F.mse_loss(candidate(x), model(x)).item() for candidate in (refitted, sliced)]
    assert errors[0] < 0.5 * errors[1]
