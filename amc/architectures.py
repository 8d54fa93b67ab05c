"""Built-in architectures: the CIFAR families that pruning papers report on, and a small one for 8x8 digits.

Each follows its paper in the form used for 32x32 images, and carries the parameter names under which weights of that
family are commonly shared. No forward pass holds a channel count, so a slimmed network is the same modules with
smaller weights.

Sources: He et al., arXiv 1512.03385, section 4.2 (ResNet, Plain); Simonyan and Zisserman, arXiv 1409.1556, table 1
(VGG, configuration D); Howard et al., arXiv 1704.04861, table 1 (MobileNet); Sandler et al., arXiv 1801.04381, table 2
(MobileNetV2); Huang et al., arXiv 1608.06993, section 3 (DenseNet).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["pad", "projection", "none"]


def _conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A convolution that keeps the image size but for its stride."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Where the shape changes, the shortcut subsamples and pads with zero channels (`pad`, option A of the paper), or is a
    1x1 convolution (`projection`, option B). With `none` the block is plain.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            if shortcut == "projection":
                self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
            elif shortcut == "pad":
                self.shortcut = nn.AvgPool2d(1, stride)  # a window of one pixel: every stride-th pixel as it is
        self.residual = shortcut != "none"

    def forward(self, x: Tensor) -> Tensor:
        """`(N, inputs, H, W)` to `(N, outputs, H / stride, W / stride)`."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if not self.residual:
            return F.relu(y)
        x = self.shortcut(x)
        missing = y.shape[1] - x.shape[1]
        if missing:
            x = F.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))
        return F.relu(y + x)


class ResNet(nn.Module):
    """Stages of residual blocks; each but the first halves the image."""

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], shortcut: Shortcut, num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        self.stages = len(blocks)
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            layers = []
            for block in range(count):
                stride = 2 if block == 0 and stage > 1 else 1
                layers.append(ResidualBlock(inputs, width, stride, shortcut))
                inputs = width
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(N, C, H, W)` to logits `(N, classes)`."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.linear(x.mean((2, 3)))


def _cifar_resnet(depth: int, num_classes: int, in_channels: int, shortcut: Shortcut = "pad") -> ResNet:
    """Depth 6n + 2: three stages of n blocks."""
    return ResNet([(depth - 2) // 6] * 3, (16, 32, 64), shortcut, num_classes, in_channels)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-20 for 32x32 images (He et al., section 4.2)."""
    return _cifar_resnet(20, num_classes, in_channels)


def resnet32(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-32 for 32x32 images (He et al., section 4.2)."""
    return _cifar_resnet(32, num_classes, in_channels)


def resnet44(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-44 for 32x32 images (He et al., section 4.2)."""
    return _cifar_resnet(44, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-56 for 32x32 images (He et al., section 4.2)."""
    return _cifar_resnet(56, num_classes, in_channels)


def resnet110(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-110 for 32x32 images (He et al., section 4.2)."""
    return _cifar_resnet(110, num_classes, in_channels)


def plain20(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-20 without its shortcuts (He et al., section 4.2)."""
    return _cifar_resnet(20, num_classes, in_channels, "none")


def digits_resnet(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """The embedded default: two stages with projection shortcuts for 8x8 images."""
    return ResNet((2, 2), (12, 24), "projection", num_classes, in_channels)


class VGG(nn.Module):
    """Stages of 3x3 convolutions with batch norm, each ended by a 2x2 pooling, then three linear layers."""

    def __init__(self, stages: Sequence[Sequence[int]], hidden: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = in_channels
        for stage in stages:
            for width in stage:
                layers += [_conv(inputs, width, bias=True), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(),
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(),
            nn.Linear(hidden, num_classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Images `(N, C, H, W)` of at least 32x32 to logits `(N, classes)`."""
        return self.classifier(self.features(x).mean((2, 3)))


def vgg16_bn(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """VGG-16 (configuration D) with batch norm; its linear layers have 512 units, as is usual for 32x32 images."""
    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    return VGG(stages, 512, num_classes, in_channels)


class SeparableBlock(nn.Module):
    """A depthwise 3x3 convolution and a pointwise one, each with batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, inputs, stride=stride, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = _conv(inputs, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, inputs, H, W)` to `(N, outputs, H / stride, W / stride)`."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class MobileNetV1(nn.Module):
    """A stem of stride 1 (images are 32x32, not 224x224) and thirteen separable blocks."""

    BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        inputs = 32
        self.conv1 = _conv(in_channels, inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        blocks = []
        for width, stride in self.BLOCKS:
            blocks.append(SeparableBlock(inputs, width, stride))
            inputs = width
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(N, C, H, W)` to logits `(N, classes)`."""
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(x.mean((2, 3)))


def mobilenet_v1(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """MobileNet for 32x32 images."""
    return MobileNetV1(num_classes, in_channels)


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expand (unless `expansion` is 1), filter each channel, project linearly; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [_conv_bn_relu6(inputs, hidden, 1)] if expansion != 1 else []
        layers.append(_conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden))
        self.conv = nn.Sequential(*layers, _conv(hidden, outputs, 1), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """`(N, inputs, H, W)` to `(N, outputs, H / stride, W / stride)`."""
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Inverted residuals; the first two strides of the paper are 1 here, since images are 32x32."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    """Expansion, channels, blocks, and stride of the first block of each stage."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        inputs = 32
        layers: list[nn.Module] = [_conv_bn_relu6(in_channels, inputs, 3)]
        for expansion, width, count, stride in self.STAGES:
            for block in range(count):
                layers.append(InvertedResidual(inputs, width, stride if block == 0 else 1, expansion))
                inputs = width
        layers.append(_conv_bn_relu6(inputs, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Images `(N, C, H, W)` to logits `(N, classes)`."""
        return self.classifier(self.features(x).mean((2, 3)))


def mobilenet_v2(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """MobileNetV2 for 32x32 images."""
    return MobileNetV2(num_classes, in_channels)


class DenseLayer(nn.Module):
    """Adds `growth` channels to those it is given."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, growth)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, inputs, H, W)` to `(N, inputs + growth, H, W)`."""
        return torch.cat((x, self.conv1(F.relu(self.bn1(x)))), 1)


class Transition(nn.Module):
    """A 1x1 convolution that keeps the channels, and a pooling that halves the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = _conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, channels, H, W)` to `(N, channels, H / 2, W / 2)`."""
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class DenseNet(nn.Module):
    """Three dense blocks without bottleneck or compression."""

    def __init__(self, layers: int, growth: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        channels = 16
        self.conv1 = _conv(in_channels, channels)
        modules: list[nn.Module] = []
        for block in range(3):
            if block:
                modules.append(Transition(channels))
            modules += [DenseLayer(channels + i * growth, growth) for i in range(layers)]
            channels += layers * growth
        self.layers = nn.Sequential(*modules)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(N, C, H, W)` to logits `(N, classes)`."""
        x = F.relu(self.bn(self.layers(self.conv1(x))))
        return self.linear(x.mean((2, 3)))


def densenet40(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """DenseNet-40 with growth 12: three blocks of twelve layers."""
    return DenseNet(12, 12, num_classes, in_channels)
