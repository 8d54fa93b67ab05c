"""What `--model` and `--data` can name without a file of one's own. Imports nothing, so that help texts can read it."""

from __future__ import annotations

MODELS: dict[str, tuple[str, str]] = {
    "digits_resnet": ("small residual network for 8x8 digits, trained on first use", "amc.architectures:digits_resnet"),
    "resnet20": ("CIFAR ResNet-20, parameter-free shortcuts (He 2016)", "amc.architectures:resnet20"),
    "resnet32": ("CIFAR ResNet-32, parameter-free shortcuts (He 2016)", "amc.architectures:resnet32"),
    "resnet44": ("CIFAR ResNet-44, parameter-free shortcuts (He 2016)", "amc.architectures:resnet44"),
    "resnet56": ("CIFAR ResNet-56, parameter-free shortcuts (He 2016)", "amc.architectures:resnet56"),
    "resnet110": ("CIFAR ResNet-110, parameter-free shortcuts (He 2016)", "amc.architectures:resnet110"),
    "plain20": ("CIFAR Plain-20, a ResNet-20 without shortcuts (He 2016)", "amc.architectures:plain20"),
    "vgg16_bn": ("VGG-16 with batch norm for CIFAR (Simonyan 2015)", "amc.architectures:vgg16_bn"),
    "mobilenet_v1": ("MobileNet for CIFAR (Howard 2017)", "amc.architectures:mobilenet_v1"),
    "mobilenet_v2": ("MobileNetV2 for CIFAR (Sandler 2018)", "amc.architectures:mobilenet_v2"),
    "densenet40": ("CIFAR DenseNet-40, growth 12 (Huang 2017)", "amc.architectures:densenet40"),
}

DATASETS: dict[str, tuple[str, str]] = {
    "digits": ("1,797 handwritten digits of 8x8, embedded", "amc.datasets:digits"),
    "imagefolder": ("DIR/train, DIR/val, DIR/test of one folder a class", "amc.datasets:imagefolder"),
    "cifar10": ("the published CIFAR-10 archive in DIR, unpacked", "amc.cifar:cifar10"),
    "cifar100": ("the published CIFAR-100 archive in DIR, unpacked", "amc.cifar:cifar100"),
    "npz": ("arrays x_train, y_train, x_val ... in FILE, uint8 NHWC", "amc.datasets:npz"),
}
