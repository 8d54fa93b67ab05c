"""Whether a model and data can be recovered by fine-tuning, and scored: what can't is refused before the search."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from amc.data import Data, Split
from amc.errors import DataError
from amc.evaluate import Metric, Tune
from amc.finetune import IGNORED, cross_entropy
from amc.forward import call, changed, device_of, logits, to_device
from amc.own_data import DatasetSplit
from amc.verify import untrainable
from search.settings import Settings

FIRST = 8
"""Examples of a data set of one's own that are looked at before anything is built."""


def check_recovery(settings: Settings, data: Data, metric: Metric | None, finetune: Tune | None) -> None:
    """Raises a DataError where scoring or recovery needs labels, or a train split, that the data lack."""
    if finetune is not None and data.train is None:
        raise DataError(
            "finetune=… needs a `train` split: its length says how many steps an epoch has, and batch norm is "
            "recalibrated on its inputs; labels are not needed"
        )
    splits = {"val": data.val} if data.train is None else {"val": data.val, "train": data.train}
    unlabelled = [name for name, split in splits.items() if _lacks_labels(split)]
    if "val" in unlabelled and metric is None:
        raise DataError(
            "the `val` split has no labels, so there is no accuracy; give (input, label) examples, as a TensorDataset "
            "does, or metric=…, a model's worth"
        )
    trains = finetune is None and settings.recovers()
    if "train" in unlabelled and trains:
        raise DataError(
            "the `train` split has no labels to fine-tune on; give finetune=… (your own training step), or leave "
            "recovery out by score_steps=0, finetune_epochs=0"
        )
    read = {"val": metric is None, "train": trains}
    for name, split in splits.items():
        if read[name]:
            _check_labels(name, split)


def check_test(data: Data, metric: Metric | None) -> None:
    """Raises a DataError where there is a test split without the labels that its accuracy takes."""
    if metric is None and data.test is not None and _lacks_labels(data.test):
        raise DataError("the `test` split has no labels, so there is no accuracy on it; leave it out")


def _lacks_labels(split: Split) -> bool:
    return split.labels is None and split.batch([0])[1] is None


def check_training(settings: Settings, model: nn.Module, data: Data) -> None:
    """Raises a DataError where the model can't be trained on the data, or not in batches as small as asked."""
    if data.train is None:
        return
    sizes: dict[int, str] = {}
    for option, steps in (("score", settings.score_steps), ("finetune", settings.finetune_epochs)):
        if steps:
            sizes.setdefault(min(getattr(settings, f"{option}_batch"), len(data.train), 2), option)
    for size, option in sizes.items():
        inputs = changed(data.example(), partial(torch.repeat_interleave, repeats=size, dim=0))
        problem = untrainable(model, to_device(inputs, device_of(model)))
        if problem and size == 1:
            raise DataError(
                f"a batch of one example can't be trained on: {problem}; raise --{option}-batch, or give more training "
                "examples"
            )
        if problem:
            raise DataError(
                f"nothing can be fine-tuned: {problem}; give finetune=… of your own in Python, or leave recovery out "
                "by --score-steps 0 --finetune-epochs 0"
            )
    if sizes:
        inputs, labels = data.train.batch(range(min(len(data.train), FIRST)))
        device = device_of(model)
        with torch.no_grad():
            output = logits(call(model, to_device(inputs, device)))
            cross_entropy(output, to_device(labels, device))
        if output.isnan().any():
            raise DataError(
                "the dense model gives NaN on the first training examples; do they, or its weights, hold NaN or "
                "infinite numbers?"
            )


def _check_labels(name: str, split: Split) -> None:
    """Raises a DataError if the first labels are no class numbers nor their shares.

    Accuracy takes class numbers as floats, too. The others are met by the loss.
    """
    if not isinstance(split, DatasetSplit):
        return  # ours are right
    labels = split.batch(range(min(len(split), FIRST)))[1]
    if isinstance(labels, tuple | list) and any(isinstance(label, str) for label in labels):
        raise DataError(
            f"the `{name}` split's labels are text, as in {labels[0]!r}; give class numbers from 0 on, or "
            f"{'metric' if name == 'val' else 'finetune'}=… of your own in Python"
        )
    if not isinstance(labels, torch.Tensor) or labels.is_complex():
        return  # accuracy, or the loss, knows what to say of them
    if labels.is_floating_point() and labels.dim() > 1 and (name == "val" or _shares(labels)):
        return
    whole = bool((labels == labels.round()).all()) if labels.is_floating_point() else True
    trained = labels.is_floating_point() or bool(((labels < 0) & (labels != IGNORED)).any())
    if not whole or (name == "train" and trained):
        raise DataError(
            f"the `{name}` split's labels are {labels.dtype}, as in {labels.flatten()[:3].tolist()}; they must be "
            f"class numbers from 0 on, or give {'metric' if name == 'val' else 'finetune'}=… of your own in Python"
        )


def _shares(labels: torch.Tensor) -> bool:
    """Whether floats `(N, classes, ...)` are shares of classes, as after label smoothing or mixup."""
    sums = labels.float().sum(1)
    return labels.shape[1] > 1 and bool((labels >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=0.01)
