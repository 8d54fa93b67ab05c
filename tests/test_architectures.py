"""The built-in families are those of the papers, run on any image size, and accept the weights that people share."""

from __future__ import annotations

import pytest
import torch

from amc.architectures import ResidualBlock, ResNet, resnet20
from amc.catalog import MODELS
from amc.registry import resolve

PARAMETERS = {  # the papers', in millions, where they report a network for 32x32 images and 10 classes
    "resnet20": 0.27,
    "resnet32": 0.46,
    "resnet44": 0.66,
    "resnet56": 0.85,
    "resnet110": 1.7,
    "plain20": 0.27,
    "densenet40": 1.0,
}


def build(name, **sizes):
    return resolve(MODELS, name, "--model")(**sizes).eval()


@pytest.mark.parametrize("name", MODELS)
def test_classes_and_channels_are_free_and_rows_are_independent(name):
    model = build(name, num_classes=7, in_channels=2)
    side = 32 if name == "vgg16_bn" else 16
    images = torch.randn(2, 2, side, side)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert together.shape == (2, 7)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "millions"), PARAMETERS.items())
def test_parameters_are_as_published(name, millions):
    count = sum(p.numel() for p in build(name).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.03)


def test_multiply_accumulates_of_resnet20_are_as_published():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build("resnet20")(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() / 2 == 40_551_040


def test_state_dict_has_the_names_of_shared_weights():
    names = set(resnet20().state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "linear.weight"} <= names
    assert not any("shortcut" in name for name in names)
    assert len(names) == 19 * 6 + 2


def test_padded_shortcut_is_option_a():
    block = ResidualBlock(4, 8, 2, "pad").eval()
    torch.nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    images = torch.rand(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    expected[:, 2:6] = images[:, :, ::2, ::2]
    torch.testing.assert_close(block(images), expected, rtol=0, atol=0)


def test_plain_network_is_the_residual_one_without_its_shortcuts():
    plain, residual = build("plain20"), build("resnet20")
    plain.load_state_dict(residual.state_dict())
    for module in residual.modules():
        if isinstance(module, ResidualBlock):
            module.residual = False
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain(images), residual(images), rtol=0, atol=0)


def test_projection_shortcut_stands_where_the_shape_changes():
    model = ResNet((2, 2), (4, 8), "projection", 10, 1)
    shortcuts = {name.rpartition(".shortcut")[0] for name in model.state_dict() if ".shortcut." in name}
    assert shortcuts == {"layer2.0"}
