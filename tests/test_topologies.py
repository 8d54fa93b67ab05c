"""Every group of every small network slims correctly, at its smallest, half and full width."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from amc.coupling import trace
from amc.groups import Group, Structure
from amc.slim import masked, slim
from amc.tracer import Tracer
from amc.verify import difference, verify
from tests.topologies import TOPOLOGIES, build


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Many small operations: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def traced(name: str) -> tuple[nn.Module, tuple[Tensor, ...], Structure]:
    net, inputs = build(name)
    return net, inputs, verify(net, inputs, trace(net, inputs))


def keep(group: Group, width: int) -> np.ndarray:
    """`width` units, spread over the cells."""
    cells = np.zeros(group.channels, int) if group.cells is None else group.cells
    number = len(np.unique(cells))
    assert width % number == 0
    order = np.random.default_rng(width).permutation(group.channels)
    return np.sort(np.concatenate([order[cells[order] == cell][: width // number] for cell in range(number)]))


def recount(net: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Multiply-accumulates by hooks on layers, as a reader of the definition would count them."""
    total = 0

    def count(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += out.numel() * module.in_features
        elif module.transposed:
            total += given[0].numel() * module.out_channels // module.groups * module.weight[0, 0].numel()
        else:
            total += out.numel() * module.weight[0].numel()

    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    handles = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        net(*inputs)
    for handle in handles:
        handle.remove()
    return total


def counted(structure: Structure, net: nn.Module) -> int:
    state = net.state_dict()
    return sum(positions * state[name].numel() for name, positions in structure.positions.items())


SPANNING = (
    "Norms",
    "NormsByHand",
    "ConvNeXtBlock",
    "VisionTransformer",
    "GroupedQueryAttention",
    "Mixer",
    "TorchEncoderLayer",
)
"""Networks with norms whose statistics span channels."""


def uncounted(name: str) -> int:
    """nn.MultiheadAttention multiplies by its weights without calling a layer: 4 tokens, 8 to 24 and 8 to 8."""
    return 4 * 8 * (24 + 8) if name == "TorchEncoderLayer" else 0


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_groups(name: str) -> None:
    _, _, structure = traced(name)
    assert {group.name: group.channels for group in structure.groups} == TOPOLOGIES[name][2]
    assert all(frozen.reason for frozen in structure.frozen)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_group_slims_at_smallest_half_and_full_width(name: str) -> None:
    net, inputs, structure = traced(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for group in structure.groups:
        for width in {group.widths[0], group.snap(group.channels / 2), group.channels}:
            kept = {group.name: keep(group, width)}
            assert difference(net, inputs, structure, kept) < 1e-5, (group.name, width)
            small = slim(net, structure, kept)
            assert counted(structure, small) == recount(small, inputs) + uncounted(name), (group.name, width)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_all_groups_slim_together(name: str) -> None:
    net, inputs, structure = traced(name)
    for pick in (lambda g: g.widths[0], lambda g: g.snap(g.channels / 2)):
        kept = {group.name: keep(group, pick(group)) for group in structure.groups}
        assert difference(net, inputs, structure, kept) < 1e-5
        small = slim(net, structure, kept)
        assert counted(structure, small) == recount(small, inputs) + uncounted(name)
        again = trace(small, inputs)
        assert {g.name: g.channels for g in again.groups}.items() >= {
            g.name: len(kept[g.name]) for g in structure.groups if len(kept[g.name]) > 1 and g.cells is None
        }.items()


@pytest.mark.parametrize("name", [n for n in TOPOLOGIES if n not in SPANNING])
def test_zeroed_channels_alone_make_the_dense_model_agree(name: str) -> None:
    """The identity without any masking of statistics, on the networks whose norms don't span channels."""
    net, inputs, structure = traced(name)
    kept = {group.name: keep(group, group.snap(group.channels / 2)) for group in structure.groups}
    with torch.no_grad():
        expected = masked(net, structure, kept)(*inputs)
        actual = slim(net, structure, kept)(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_masking_matters_where_norms_span_channels() -> None:
    """Without it the dense layer norm of the reference would count removed channels: the check has teeth."""
    net, inputs, structure = traced("VisionTransformer")
    kept = {"patch": np.arange(8)}
    reference = masked(net, structure, kept)
    with torch.no_grad():
        plain, small = reference(*inputs), slim(net, structure, kept)(*inputs)
    assert (plain - small).abs().max() > 1e-3
    assert difference(net, inputs, structure, kept) < 1e-5
    assert Tracer(reference).run(inputs).output.shape == plain.shape
