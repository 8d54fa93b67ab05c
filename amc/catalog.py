"""Every name that an option takes, with a line of help and where it is (`amc.registry`). A new criterion, reward, model
or data set is one function or class in one file and one line here.

Imports nothing, so that help texts and error messages can read it.
"""

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

LIBRARIES = ("torchvision", "timm", "hf")
"""Whose models are named as LIBRARY:NAME."""

DATASETS: dict[str, tuple[str, str]] = {
    "digits": ("1,797 handwritten digits of 8x8, embedded", "amc.datasets:digits"),
    "imagefolder": ("DIR/train, DIR/val, DIR/test of one folder a class", "amc.folders:imagefolder"),
    "cifar10": ("the published CIFAR-10 archive in DIR, unpacked", "amc.cifar:cifar10"),
    "cifar100": ("the published CIFAR-100 archive in DIR, unpacked", "amc.cifar:cifar100"),
    "npz": ("arrays x_train, y_train, x_val ... in FILE, uint8 NHWC", "amc.datasets:npz"),
}

CRITERIA: dict[str, tuple[str, str]] = {
    "l1": ("L1 norm of the filters (Li et al., ICLR 2017)", "amc.criteria_weights:l1"),
    "l2": ("L2 norm of the filters (He et al., IJCAI 2018)", "amc.criteria_weights:l2"),
    "bn_scale": ("scale of the batch norm (Liu et al., ICCV 2017)", "amc.criteria_weights:bn_scale"),
    "fpgm": ("distance to the geometric median of the filters (He et al., CVPR 2019)", "amc.criteria_weights:fpgm"),
    "taylor": (
        "squared first-order change of the loss (Molchanov et al., CVPR 2019); needs labels",
        "amc.criteria_gradient:taylor",
    ),
    "fisher": (
        "Fisher information of a gate on the unit (Theis et al. 2018; Liu et al., ICML 2021); needs labels",
        "amc.criteria_gradient:fisher",
    ),
    "hessian": (
        "diagonal second-order change of the loss (LeCun et al., NeurIPS 1989), by Hutchinson; needs labels",
        "amc.criteria_gradient:hessian",
    ),
    "activation_mean": (
        "mean absolute activation (Molchanov et al., ICLR 2017); needs data",
        "amc.criteria_activation:activation_mean",
    ),
    "activation_variance": (
        "variance of the activation (Polyak and Wolf 2015); needs data",
        "amc.criteria_activation:activation_variance",
    ),
    "apoz": ("share of activations above zero (Hu et al. 2016); needs data", "amc.criteria_activation:apoz"),
    "wanda": ("|weight| x norm of the input (Sun et al., ICLR 2024); needs data", "amc.criteria_activation:wanda"),
    "thinet": (
        "greedy least harm to the next layer's output (Luo et al., ICCV 2017); needs data",
        "amc.criteria_reconstruction:thinet",
    ),
    "lasso": (
        "LASSO penalty at which the channel leaves (He et al., ICCV 2017); needs data",
        "amc.criteria_reconstruction:lasso",
    ),
    "random": ("a random order, the control", "amc.criteria_weights:random"),
}

PRECISIONS: dict[str, tuple[str, str]] = {
    "float32": ("32-bit floats throughout", "torch:float32"),
    "bfloat16": ("convolutions and matrix products in bfloat16, weights and all else in float32", "torch:bfloat16"),
}

SOFT = "soft_accuracy"
ALONE = (SOFT, "accuracy")
"""Rewards that are the score alone; they need none between 0 and 1."""
REWARDS: dict[str, tuple[str, str]] = {
    SOFT: ("mean probability of the right class: accuracy without its steps", "amc.reward:alone"),
    "accuracy": ("accuracy alone: the budget is a hard limit", "amc.reward:alone"),
    "amc_flops": ("-error * log(FLOPs), AMC (He et al. 2018)", "amc.reward:amc_flops"),
    "amc_params": ("-error * log(parameters), AMC (He et al. 2018)", "amc.reward:amc_params"),
    "amc_latency": ("-error * log(latency in us), AMC's form with measured latency", "amc.reward:amc_latency"),
    "accuracy_latency": (
        "accuracy * (latency / limit)^-0.07, MnasNet (Tan et al. 2019)",
        "amc.reward:accuracy_latency",
    ),
}
