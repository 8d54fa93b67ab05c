"""What a policy is worth: slice, quick fine-tune, recalibrate batch norm, score on the search split.

What counts is accuracy after fine-tuning, and a score that skips recovery does not predict it. A few dozen steps, with
the learning rate annealed to nothing inside them and the same batches for every candidate, do; batch norm is then
recalibrated on clean images (EagleEye, Li et al., ECCV 2020, section 3.3). Everything that does not depend on the
policy (batches, images, the order of channels) is made once and stays in memory, on the model's device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from amc.finetune import Batch, Split, draw, train
from amc.forward import call, device_of, logits, to_device
from amc.groups import Structure
from amc.problem import WidthsByName
from amc.slim import slim

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class ScoreSettings:
    """How a candidate is scored.

    steps, batch, lr, weight_decay: the quick fine-tune; no steps, no fine-tune.
    images: of the search split that are scored, the first ones of a shuffled order; 0 scores all.
    calibration: training images that recalibrate batch norm; 0 leaves it as it is.
    """

    steps: int = 30
    batch: int = 128
    lr: float = 0.02
    weight_decay: float = 1e-4
    images: int = 2000
    calibration: int = 512


class Evaluator:
    """Scores policies of one dense model: widths by group name -> accuracy in [0, 1] (or the metric).

    model: dense, on the device where candidates are trained; it is not changed.
    order: each group's units, best first (`amc.importance.rank`).
    train_split: for the fine-tune and the calibration; None leaves both out.
    metric: a model's worth, higher is better; the accuracy on `val_split` unless given.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        order: Mapping[str, np.ndarray],
        *,
        train_split: Split | None,
        val_split: Split,
        settings: ScoreSettings | None = None,
        augment: Sequence[str] = (),
        metric: Metric | None = None,
        seed: int = 0,
    ) -> None:
        self.settings = s = settings or ScoreSettings()
        self.model, self.structure, self.order = model, structure, order
        device = device_of(model)
        self._training: list[Batch] = []
        self._calibration: list[Batch] = []
        if train_split is not None:
            drawn = draw(train_split, s.steps, batch=s.batch, augment=augment, seed=seed)
            self._training = [to_device(batch, device) for batch in drawn]
            self._calibration = in_memory(train_split, s.calibration, device, batch=s.batch, seed=seed)
        if metric is None:
            scored = in_memory(val_split, s.images or len(val_split), device, batch=500, seed=seed)
            self.metric: Metric = lambda model: accuracy(model, scored)
        else:
            self.metric = metric

    def __call__(self, widths: WidthsByName) -> float:
        """The score of one policy."""
        candidate = self.candidate(widths)
        train(
            candidate,
            self._training,
            steps=len(self._training),
            lr=self.settings.lr,
            weight_decay=self.settings.weight_decay,
        )
        recalibrate(candidate, self._calibration)
        return self.metric(candidate)

    def candidate(self, widths: WidthsByName) -> nn.Module:
        """The slim model of a policy, as sliced."""
        return slim(self.model, self.structure, kept_units(self.order, widths))

    def recalibrate(self, model: nn.Module) -> None:
        """Recalibrates a model's batch norm in place, as for the score."""
        recalibrate(model, self._calibration)


def kept_units(order: Mapping[str, np.ndarray], widths: WidthsByName) -> dict[str, np.ndarray]:
    """The units that each group keeps, ascending: the first `width` of its order."""
    return {name: np.sort(order[name][:width]) for name, width in widths.items()}


def in_memory(
    split: Split, count: int, device: torch.device | str = "cpu", *, batch: int = 500, seed: int = 0
) -> list[Batch]:
    """`count` examples of a split (all, if it has fewer) as batches on the device; the same ones for the same seed."""
    chosen = np.random.default_rng(seed).permutation(len(split))[:count]
    parts = [chosen[i : i + batch] for i in range(0, len(chosen), batch)]
    return [to_device(split.batch(part), device) for part in parts]


def batches_of(split: Split, batch: int = 500) -> Iterable[Batch]:
    """The whole split in its order, a batch at a time."""
    return (split.batch(range(i, min(i + batch, len(split)))) for i in range(0, len(split), batch))


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Top-1 accuracy in [0, 1] over all labels of `batches`; classes are the axis after the batch."""
    device, right, count = device_of(model), 0, 0
    model.eval()
    with torch.inference_mode():
        for inputs, labels in batches:
            labels = to_device(labels, device)
            hits = logits(call(model, to_device(inputs, device))).argmax(1) == labels
            right, count = right + int(hits.sum()), count + hits.numel()
    return right / count if count else float("nan")


def recalibrate(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Sets the batch-norm statistics in place to their averages over `batches`, everything else in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or not batches:
        return
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    with torch.no_grad():
        for inputs, _ in batches:
            call(model, to_device(inputs, device_of(model)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
