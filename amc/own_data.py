"""Data sets of the user's own: map-style, of (input, label), used as they are.

Nothing is known of them but their length and what they answer to an index, so inputs may be anything that torch can
collate, and classes and labels are looked for where torch's own data sets hold them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset, default_collate

from amc.data import SPLITS, Data, Indices, Options, warn_of_others, without_val
from amc.errors import DataError
from amc.userfile import call_factory, describe


def factory(spec: str, options: Options) -> Data:
    """What a factory returns: `{"train": …, "val": …, "test": …}`, map-style data sets of (input, label)."""
    splits = call_factory(spec, DataError, options.seed, "data")
    source = Path(spec.rpartition(":")[0])
    text = source.read_bytes() if source.is_file() else b""
    return own(splits, options, name=spec, text=text)


def own(splits: Any, options: Options, name: str = "own", text: bytes = b"") -> Data:
    """A mapping of data sets, used as they are; the fingerprint sees their sizes and `text`, not their contents."""
    options.refuse("of your own", "mean", "std", "input_size")
    if isinstance(splits, Data):
        return splits
    given = {k: v for k, v in splits.items() if v is not None} if isinstance(splits, Mapping) else {}
    if not {"train", "val"} & set(given):
        found = f"a mapping of {', '.join(map(repr, splits))}" if isinstance(splits, Mapping) else type(splits).__name__
        raise DataError(
            f'--data {name} gave {found}; it must be {{"train": …, "val": …, "test": …}}, data sets of (input, label)'
        )
    made = {key: _own_split(name, key, given[key]) for key in SPLITS if key in given}
    warn_of_others(name, set(given) - set(made))
    if "val" not in made:
        train = made["train"]
        labels = train.labels if train.labels is not None else np.zeros(len(train), dtype=np.int64)
        if len(train) < 2:
            raise DataError(f"--data {name}: `train` has one example, too few to take a `val` from")
        stays, val = without_val(labels, options.seed)
        made |= {"train": _subset(train, stays), "val": _subset(train, val)}
    sizes = {key: len(split) for key, split in made.items()}
    inputs = made["val"].batch([0])[0]
    return Data(
        name,
        made.get("train"),
        made["val"],
        made.get("test"),
        num_classes=_count_classes(list(made.values())),
        fingerprint=hashlib.sha256(text + repr(sorted(sizes.items())).encode()).hexdigest(),
        input_shape=tuple(inputs.shape) if isinstance(inputs, Tensor) else None,
    )


class DatasetSplit:
    """A map-style data set of (input, label)."""

    def __init__(self, name: str, dataset: Any, labels: np.ndarray | None) -> None:
        self.name = name
        self.dataset = dataset
        self.labels = labels

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Indices) -> tuple[Any, Any]:
        """Inputs and labels, collated by torch; None for the labels of examples that are an input alone."""
        samples = [self._sample(int(i)) for i in indices]
        try:
            if all(label is None for _, label in samples):
                return default_collate([sample for sample, _ in samples]), None
            inputs, labels = default_collate(samples)
        except Exception as problem:
            raise DataError(
                f"{self.name}: examples can't be put into one batch: {describe(problem)}. Give inputs of one shape and "
                "labels of one shape, or, with metric=… and finetune=… of your own in Python, inputs alone"
            ) from problem
        return inputs, _class_numbers(labels)

    def _sample(self, index: int) -> tuple[Any, Any]:
        try:
            sample = self.dataset[index]
        except Exception as problem:
            raise DataError(f"{self.name}: example {index} raised {describe(problem)}") from problem
        if isinstance(sample, Tensor) or (isinstance(sample, tuple) and len(sample) == 1):
            return (sample if isinstance(sample, Tensor) else sample[0]), None
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise DataError(f"{self.name}: example {index} is a {type(sample).__name__}; it must be (input, label)")
        return sample[0], sample[1]


def _class_numbers(labels: Any) -> Any:
    """Labels as losses want them: whole numbers and truth values of any kind in 64 bits, anything else as it is."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        return labels
    return labels.long()


def _own_split(name: str, key: str, dataset: Any) -> DatasetSplit:
    title = f"--data {name}, `{key}`"
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(f"{title} is a {type(dataset).__name__}; it must be a data set with a length and an index")
    try:
        length = len(dataset)
    except Exception as problem:
        raise DataError(f"{title}: its length raised {describe(problem)}; give a map-style data set") from problem
    if not length:
        raise DataError(f"{title} is empty")
    return DatasetSplit(title, dataset, _known_labels(dataset))


def _subset(split: DatasetSplit, index: np.ndarray) -> DatasetSplit:
    labels = None if split.labels is None else split.labels[index]
    return DatasetSplit(split.name, Subset(split.dataset, index.tolist()), labels)


def _known_labels(dataset: Any) -> np.ndarray | None:
    """Integer labels that the data set holds as a list, as torch's and torchvision's do."""
    tensors: tuple[Any, ...] = getattr(dataset, "tensors", ())
    known = tensors[1] if len(tensors) == 2 else getattr(dataset, "targets", getattr(dataset, "labels", None))
    try:
        labels = np.asarray(known)
    except (ValueError, TypeError, RuntimeError):
        return None
    return labels.astype(np.int64) if labels.dtype.kind in "iu" and labels.shape == (len(dataset),) else None


def _answers_as_held(split: DatasetSplit) -> bool:
    """Whether the example of the highest label that is held comes with it: a `target_transform` gives it another."""
    if split.labels is None:
        return True
    index = int(split.labels.argmax())
    with contextlib.suppress(DataError):  # one that can't be read is met when it is needed
        label = split.batch([index])[1]
        return isinstance(label, Tensor) and label.tolist() == [split.labels[index]]
    return True


def _count_classes(splits: list[DatasetSplit]) -> int | None:
    if not all(_answers_as_held(split) for split in splits):
        return None
    declared = getattr(splits[0].dataset, "classes", None)
    if isinstance(declared, list | tuple):
        return len(declared)
    if any(split.labels is None for split in splits):
        return None
    return 1 + max(int(split.labels.max()) for split in splits if split.labels is not None)
