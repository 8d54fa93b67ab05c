"""Roles: a layer that computes its weight is judged by that weight, however it is made and whatever it is made of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

from amc.coupling import trace
from amc.groups import Structure
from amc.importance import importance, rank
from amc.reconstruct import gather, refit
from amc.roles import readers, weights
from amc.slim import slim

CRITERIA = ("l1", "fpgm", "wanda", "taylor", "thinet")


class Doubled(nn.Module):
    """A parametrization without a state of its own."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and many models have it
        return nn.utils.weight_norm(layer)


def pruned(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(layer, "weight", 0.4)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of inputs": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "old weight_norm": old_weight_norm,
    "mask": pruned,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "parametrization": lambda layer: register_parametrization(layer, "weight", Doubled()),
}


def net() -> nn.Sequential:
    """Convolution (0), transposed convolution (2), convolution (4), linear layer (7)."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 6, 2),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 25, 3),
    ).eval()


def pair(way: str) -> tuple[nn.Sequential, nn.Sequential]:
    """A net whose layers compute their weights, and a plain one of the same weights."""
    torch.manual_seed(0)
    made, plain = net(), net()
    for at in (0, 2, 4, 7):
        WAYS[way](made[at])
        for name, tensor in made[at].named_parameters():  # lengths and directions that don't agree
            if "original" in name or name.startswith("weight_"):
                with torch.no_grad():
                    tensor.mul_(torch.rand(tensor.shape) + 0.2)
    made(torch.randn(1, 2, 6, 6))  # old hooks compute a weight when the layer runs
    with torch.no_grad():
        for at in (0, 2, 4, 7):
            plain[at].weight.copy_(made[at].weight)
            plain[at].bias.copy_(made[at].bias)
    return made, plain


def traced(model: nn.Module) -> Structure:
    return trace(model, (torch.randn(1, 2, 6, 6),))


@pytest.mark.parametrize("way", WAYS)
def test_computed_weights_are_judged_as_plain_ones_are(way: str):
    made, plain = pair(way)
    batches = [(torch.randn(8, 2, 6, 6), torch.randint(0, 3, (8,)))]
    ours, theirs = traced(made), traced(plain)
    assert len(ours.groups) == len(theirs.groups) == 3
    for criterion in CRITERIA:
        found = importance(made, ours, criterion, batches=batches).values()
        expected = importance(plain, theirs, criterion, batches=batches).values()
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, err_msg=criterion)


@pytest.mark.parametrize("way", WAYS)
def test_each_weight_is_listed_once_by_its_name_in_the_layer(way: str):
    made, _ = pair(way)
    structure = traced(made)
    listed = [[(part.tensor, role) for role, part in weights(made, structure, group)] for group in structure.groups]
    assert listed == [
        [("0.weight", "out"), ("2.weight", "in")],
        [("2.weight", "out"), ("4.weight", "in")],
        [("4.weight", "out"), ("7.weight", "in")],
    ]
    assert set(readers(made, structure)) == {"2.weight", "4.weight", "7.weight"}


def test_the_length_of_a_filter_decides_not_its_direction():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(1, 4, 1)), nn.ReLU(), nn.Conv1d(4, 1, 1)).eval()
    parts = model[0].parametrizations.weight
    with torch.no_grad():
        parts.original0.copy_(torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1))  # g
        parts.original1.copy_(torch.tensor([4.0, 3, 2, 1]).view(4, 1, 1))  # v
    structure = trace(model, (torch.randn(1, 1, 5),))
    (found,) = importance(model, structure, "l1").values()
    np.testing.assert_allclose(found, [1, 2, 3, 4], rtol=1e-6)


def test_a_parametrized_module_may_be_the_model_itself():
    class Root(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(super().forward(x).relu())

    model = Root(2, 4)
    model.out = nn.Linear(4, 2)
    parametrizations.weight_norm(model)
    structure = trace(model.eval(), (torch.randn(1, 2),))
    listed = [(part.tensor, role) for role, part in weights(model, structure, structure.groups[0])]
    assert sorted(listed) == [("out.weight", "in"), ("weight", "out")]


@pytest.mark.parametrize("way", WAYS)
def test_a_computed_weight_is_not_refitted(way: str):
    made, _ = pair(way)
    structure = traced(made)
    grams = gather(made, structure, [(torch.randn(8, 2, 6, 6), None)])
    kept = {name: np.sort(order[:2]) for name, order in rank(made, structure).items()}
    slimmed = slim(made, structure, kept)
    before = copy.deepcopy(slimmed.state_dict())
    refit(slimmed, structure, grams, kept)
    torch.testing.assert_close(slimmed.state_dict(), before, rtol=0, atol=0)
    assert slimmed(torch.randn(2, 2, 6, 6)).shape == (2, 3)


class ByKeyword(nn.Module):
    """Calls its layers by keyword, or by position."""

    def __init__(self, keyword: bool) -> None:
        super().__init__()
        self.keyword = keyword
        self.first, self.up, self.last = nn.Conv1d(2, 6, 3), nn.ConvTranspose1d(6, 4, 2), nn.Conv1d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.up(output_size=[7], input=x) if self.keyword else self.up(x, [7])
        return self.last(input=x.relu()).mean(2) if self.keyword else self.last(x.relu()).mean(2)


def test_a_layer_called_by_keyword_is_watched_as_any_other():
    torch.manual_seed(0)
    plain, keyword = ByKeyword(False).eval(), ByKeyword(True).eval()
    keyword.load_state_dict(plain.state_dict())
    batches = [(torch.randn(8, 2, 8), torch.randint(0, 3, (8,)))]
    structure = trace(plain, (torch.randn(1, 2, 8),))
    for criterion in ("wanda", "taylor", "thinet"):
        expected = importance(plain, structure, criterion, batches=batches)
        found = importance(keyword, structure, criterion, batches=batches)
        np.testing.assert_equal(found, expected, err_msg=criterion)
