"""The systems that ours is compared with, each as a function from a problem to the widths that it finds.

They run from their published packages, which this project does not depend on; install what you want to run:

    pip install --no-deps nvidia-modelopt omegaconf pulp     # and what these ask for
    pip install torch-pruning
    pip install --no-deps nni==2.10 json_tricks typeguard psutil astor schema prettytable wcwidth

All prune the channels inside the blocks of a CIFAR ResNet, or all of a plain network's, to half of the FLOPs. Those
that score candidates do so as ours: batch norm recalibrated on 512 images, accuracy on images of the search split.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from amc.evaluate import accuracy, recalibrate
from amc.finetune import Batch
from search.compose import Setup

KEEP = 0.5  # of the FLOPs
SCORED, CALIBRATION, BATCH = 1000, 512, 128  # images


class TraceableBlock(nn.Module):
    """A residual block without a decision in `forward`, which ModelOpt's tracer asks for."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        self.stride, self.missing = block.conv1.stride[0], block.conv2.out_channels - block.conv1.in_channels
        self.residual = block.residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to images."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if not self.residual:
            return F.relu(y)
        if self.missing:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.missing // 2, self.missing // 2))
        return F.relu(y + x)


class Traceable(nn.Module):
    """A CIFAR ResNet of such blocks, on the parts of a given one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.conv1, self.bn1, self.linear = model.conv1, model.bn1, model.linear
        stages = (model.layer1, model.layer2, model.layer3)
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(*map(TraceableBlock, stage)) for stage in stages)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to logits."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def fastnas(setup: Setup) -> dict[str, int]:
    """NVIDIA ModelOpt's FastNAS, its channels in steps of one."""
    import modelopt.torch.prune as mtp

    ratios = tuple(i / 16 for i in range(1, 17))
    rules = {
        "nn.Conv2d": {"*": {"channels_ratio": ratios, "channel_divisor": 1, "kernel_size": ()}},
        "nn.BatchNorm2d": {"*": {"features_ratio": ratios, "feature_divisor": 1}},
    }
    images, calibration = batches(setup)
    with tempfile.TemporaryDirectory() as folder:
        pruned, _ = mtp.prune(
            model=Traceable(setup.loaded.model),
            mode=[("fastnas", rules)],
            constraints={"flops": f"{KEEP:.0%}"},
            dummy_input=setup.loaded.inputs[0],
            config={
                "data_loader": calibration,
                "collect_func": lambda batch: batch[0],
                "score_func": lambda candidate: accuracy(candidate, [images]),
                "checkpoint": str(Path(folder, "fastnas.pth")),
            },
        )
    return widths_of(pruned, setup)


def nni(setup: Setup, episodes: int = 60) -> dict[str, int]:
    """NNI's AMC: the decisions of its best episode.

    Its budget counts only the pruned layers' own FLOPs, so they may end a little above half of all. The model that it
    returns has been pruned by them twice: an episode's last step applies all decisions to the model that has them.
    """
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # it loads whole models that it wrote itself
    from nni.algorithms.compression.v2.pytorch.pruning import AMCPruner

    images, calibration = batches(setup)

    def score(model: nn.Module) -> float:
        candidate = deepcopy(model)
        recalibrate(candidate, calibration)
        return accuracy(candidate, [images])

    names = [group.name for group in setup.problem.groups]
    with tempfile.TemporaryDirectory() as folder:
        pruner = AMCPruner(
            episodes,
            Traceable(deepcopy(setup.loaded.model)),
            [{"op_names": names, "total_sparsity": 1 - KEEP, "max_sparsity_per_layer": 0.9}],
            dummy_input=setup.loaded.inputs[0],
            evaluator=score,
            log_dir=folder,
        )
        pruner.compress()
        *_, decisions = pruner.get_best_result()
    cut = {one["op_names"][0]: one["total_sparsity"] for one in decisions}
    return {group.name: group.channels - int(group.channels * cut[group.name]) for group in setup.problem.groups}


def torch_pruning(setup: Setup) -> dict[str, int]:
    """Torch-Pruning's group magnitude, one threshold for all layers, in 200 steps until the budget is met."""
    import torch_pruning as tp

    model = Traceable(deepcopy(setup.loaded.model))
    names = [group.name for group in setup.problem.groups]
    pruner = tp.pruner.BasePruner(
        model,
        setup.loaded.inputs[0],
        importance=tp.importance.GroupMagnitudeImportance(),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=200,
        ignored_layers=[
            layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Conv2d | nn.Linear) and name not in names
        ],
    )
    while not setup.problem.budget.met(setup.problem.widths(widths_of(model, setup))):
        pruner.step()
    return widths_of(model, setup)


def batches(setup: Setup) -> tuple[Batch, list[Batch]]:
    """What candidates are scored on, and what their batch norm is recalibrated on."""
    train, val = setup.data.train, setup.data.val
    assert train is not None
    images = val.batch(np.random.default_rng(0).permutation(len(val))[:SCORED])
    return images, [train.batch(range(i, i + BATCH)) for i in range(0, CALIBRATION, BATCH)]


def widths_of(pruned: nn.Module, setup: Setup) -> dict[str, int]:
    """The channels that a pruned network has in each group."""
    return {group.name: pruned.get_submodule(group.name).out_channels for group in setup.problem.groups}


PEERS: dict[str, Callable[[Setup], dict[str, int]]] = {"fastnas": fastnas, "nni": nni, "torch-pruning": torch_pruning}
