"""The layout in memory changes a candidate's speed, and nothing that a user sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amc.architectures import resnet20
from amc.layout import arranged, fast_layout


class Viewing(nn.Module):
    """Flattens by a view, which counts on the order in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.linear(x.view(len(x), -1))


def test_images_go_channels_last_on_the_cpu() -> None:
    model = resnet20()
    assert fast_layout(model, torch.zeros(1, 3, 32, 32)) == torch.channels_last
    assert model.training
    assert model.conv1.weight.is_contiguous()


def test_a_model_that_counts_on_its_order_keeps_it() -> None:
    assert fast_layout(Viewing(), torch.zeros(2, 3, 8, 8)) == torch.contiguous_format


def test_a_model_without_images_keeps_its_order() -> None:
    assert fast_layout(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4)) == torch.contiguous_format


def test_the_outputs_stay_those_of_the_model() -> None:
    torch.manual_seed(0)
    model, x = resnet20().eval(), torch.randn(4, 3, 32, 32)
    expected = model(x)
    there = arranged(model, torch.channels_last)
    assert there is model
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(arranged(model, torch.contiguous_format)(x), expected, rtol=0, atol=0)
