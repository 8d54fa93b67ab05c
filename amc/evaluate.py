"""What a policy is worth: slice, quick fine-tune, recalibrate batch norm, score on the search split.

What counts is accuracy after fine-tuning, and a score that skips recovery does not predict it. A few dozen steps, with
the learning rate annealed to nothing inside them and the same batches for every candidate, do; batch norm is then
recalibrated on clean images (EagleEye, Li et al., ECCV 2020, section 3.3). Everything that does not depend on the
policy (batches, images, the order of channels) is made once and stays in memory, on the model's device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from amc.errors import DataError, UsageError
from amc.finetune import IGNORED, Batch, Split, check_classes, draw, train
from amc.forward import call, device_of, logits, to_device
from amc.groups import Structure
from amc.layout import arranged
from amc.memory import in_parts, part_of, split
from amc.problem import WidthsByName, Worth
from amc.reconstruct import gather, refit
from amc.seeding import seeded
from amc.slim import slim

Metric = Callable[[nn.Module], float]
Tune = Callable[[nn.Module, int], object]
"""Trains a model in place for so many steps."""
Watch = Callable[[str, int, int], object]
"""Called with (rung, steps done, steps in all) while a policy is scored."""


@dataclass(frozen=True)
class ScoreSettings:
    """How a candidate is scored.

    steps, batch, lr, weight_decay, precision: the quick fine-tune (`amc.finetune.train`); no steps, no fine-tune.
    images: of the search split that are scored, the first ones of a shuffled order; 0 scores all.
    calibration: training images that recalibrate batch norm; 0 leaves it as it is.
    reconstruct: refits the layers that read pruned channels by least squares first, on those images.
    soft: the score is the mean probability of the right class; else it is the accuracy.
    """

    steps: int = 30
    batch: int = 128
    lr: float = 0.02
    weight_decay: float = 1e-4
    precision: torch.dtype = torch.float32
    images: int = 2000
    calibration: int = 512
    reconstruct: bool = False
    soft: bool = True


class Evaluator:
    """Scores policies of one dense model: widths by group name -> accuracy in [0, 1] (or the metric), and score.

    model: dense, on the device where candidates are trained; it is not changed.
    order: each group's units, best first (`amc.importance.rank`).
    layout: in memory, of the candidates (`amc.layout.fast_layout`).
    train_split: for the fine-tune and the calibration; None leaves both out.
    metric: a model's worth, higher is better; the accuracy on `val_split` unless given.
    tune: the user's own training step, in place of ours.
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
        tune: Tune | None = None,
        layout: torch.memory_format = torch.contiguous_format,
        seed: int = 0,
    ) -> None:
        self.settings = s = settings or ScoreSettings()
        self.model, self.structure, self.order, self.layout = model, structure, order, layout
        device = device_of(model)
        self._training: list[Batch] = []
        self._calibration: list[Batch] = []
        if train_split is not None:
            drawn = draw(train_split, s.steps, batch=s.batch, augment=augment, seed=seed)
            self._training = [to_device(batch, device) for batch in drawn]
            self._calibration = in_memory(train_split, s.calibration, device, batch=s.batch, seed=seed)
        self._grams = gather(model, structure, self._calibration, seed=seed) if s.reconstruct else {}
        self._metric, self._seed, self._train_split, self._augment = metric, seed, train_split, tuple(augment)
        self.tune = tune
        self.watch: Watch = lambda rung, done, total: None
        if metric is None:
            self._scored = in_memory(val_split, s.images or len(val_split), device, batch=500, seed=seed)

    @torch.inference_mode(False)  # whatever the caller's mode is: candidates are trained
    def __call__(self, widths: WidthsByName) -> Worth:
        """What a policy is worth, the same each time. Where memory runs out, batches are halved, up to three times."""
        with seeded(self._seed, "evaluate"):
            return in_parts(partial(self._score, widths))

    def _score(self, widths: WidthsByName, parts: int) -> Worth:
        """Its worth, with every batch in so many parts; each is a step of its own."""
        training = split(self._training, parts)
        steps = self.settings.steps if self.tune else len(training)
        return self._worth(self.candidate(widths), training, steps, "quick fine-tune", parts)

    @property
    def trains(self) -> bool:
        """Whether there is something to fine-tune on."""
        return self._train_split is not None

    def recovered(self, widths: WidthsByName, steps: int) -> Worth:
        """What the policy is worth on the images of the score after a fine-tune of `steps` steps.

        Where memory runs out, as of the score: more steps of smaller batches.

        Raises:
            Diverged: the loss became NaN or infinite.
        """

        def tried(parts: int) -> Worth:
            assert self._train_split is not None
            batch, augment = part_of(self.settings.batch, parts), self._augment
            smaller = steps if self.tune else steps * parts
            batches = draw(self._train_split, smaller, batch=batch, augment=augment, seed=self._seed)
            return self._worth(self.candidate(widths), batches, smaller, "fine-tune", parts)

        with seeded(self._seed, "evaluate"):
            return in_parts(tried)

    def _worth(self, candidate: nn.Module, batches: Iterable[Batch], steps: int, rung: str, parts: int = 1) -> Worth:
        """What a candidate is worth after so many steps on `batches`, or of the user's own, and recalibrated."""
        s = self.settings
        if self.tune is None:
            train(
                candidate,
                batches,
                steps=steps,
                lr=s.lr,
                weight_decay=s.weight_decay,
                precision=s.precision,
                progress=partial(self.watch, rung),
            )
        elif steps:
            self.watch(f"fine-tune of your own, {steps} steps", 1, 1)
            self.tune(candidate, steps)
            candidate.eval()  # a metric is of a model in use, whatever mode a step of one's own leaves it in
        self.watch("batch norm, then scoring", 1, 1)
        recalibrate(candidate, split(self._calibration, parts))
        return self.grade(candidate, parts)

    def grade(self, model: nn.Module, parts: int = 1) -> Worth:
        """A model's worth as it is: by the metric, or on the images that are scored.

        Raises:
            UsageError: the metric is no number.
        """
        if self._metric is None:
            found = grade(model, split(self._scored, parts))
            return found if self.settings.soft else Worth.of(found.accuracy)
        worth: Any = self._metric(model)
        try:
            return Worth.of(float(worth))  # of a tensor or one of NumPy's, too
        except (TypeError, ValueError, RuntimeError):
            raise UsageError(f"the metric gave {type(worth).__name__} {worth!r}; it must be a number") from None

    def candidate(self, widths: WidthsByName) -> nn.Module:
        """The slim model of a policy, as sliced, or refitted where the settings say so."""
        kept = kept_units(self.order, widths)
        sliced = slim(self.model, self.structure, kept)
        refit(sliced, self.structure, self._grams, kept)
        return arranged(sliced, self.layout)

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
    # Equal ones: each counts the same in a batch norm.
    parts = np.array_split(chosen, -(-len(chosen) // batch)) if len(chosen) else []
    return [to_device(split.batch(part), device) for part in parts]


def batches_of(split: Split, batch: int = 500) -> Iterable[Batch]:
    """The whole split in its order, a batch at a time."""
    return (split.batch(range(i, min(i + batch, len(split)))) for i in range(0, len(split), batch))


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Top-1 accuracy in [0, 1], as of `grade`."""
    return grade(model, batches).accuracy


def grade(model: nn.Module, batches: Iterable[Batch]) -> Worth:
    """Top-1 accuracy and the mean probability of the right class, both in [0, 1], over the labels that count.

    Classes are the axis after the batch. The probability changes with every image, the accuracy only with those whose
    predicted class changes; so it tells policies apart by fewer images (`docs/benchmarks.md`).

    Raises:
        DataError: a label is none of the model's classes, or none counts.
    """
    device, right, probable, count = device_of(model), 0, 0.0, 0
    model.eval()
    with torch.inference_mode():
        for inputs, labels in batches:
            labels = to_device(labels, device)
            found = logits(call(model, to_device(inputs, device)))
            check_classes(found, labels, "a metric of your own (metric=… in Python)")
            counted = labels.long() != IGNORED  # of bytes, -100 is 156
            right, count = right + int(((found.argmax(1) == labels) & counted).sum()), count + int(counted.sum())
            probable += float((_probability(found, labels.long()) * counted).sum())
    if not count:
        raise DataError(f"there is no label to score by: all are {IGNORED}, which stands for none")
    return Worth(right / count, probable / count)


def _probability(found: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`(N, ...)` of each label, by logits `(N, classes, ...)`; 0 where a label is negative, or logits are NaN."""
    at = labels.clamp(min=0)
    probability = found.float().softmax(1).gather(1, at.unsqueeze(1)).squeeze(1)
    return probability.nan_to_num(0.0) * (at == labels)


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
    try:
        with torch.no_grad():
            for inputs, _ in batches:
                call(model, to_device(inputs, device_of(model)))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
