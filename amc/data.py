"""Data: named splits of labelled examples that can be drawn by index.

A search asks for the same few thousand examples over and over, in an order that depends on its seed alone. So a split
answers `batch(indices)` with ready tensors, and nothing here iterates, shuffles or forks: images stay uint8 in memory
(folders are decoded once, on first use) and are normalized a batch at a time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from amc.catalog import DATASETS
from amc.errors import DataError
from amc.registry import resolve, suggest

log = logging.getLogger("amc")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Indices = Sequence[int] | np.ndarray


class Split(Protocol):
    """Labelled examples that can be drawn by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Indices) -> tuple[Any, Any]:
        """Inputs and labels of the given examples, on the CPU, the examples along the first axis.

        Of images: float32 `(N, C, H, W)`, normalized, and int64 `(N,)`.
        """
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """int64 `(len,)` where they are known without drawing every example, else None."""
        ...


@dataclass(frozen=True, eq=False)
class Data:
    """A data set: what is trained on, what is searched on, and what the search never sees.

    name: as given. val: the search split. test: None where there is none; train likewise.
    num_classes: None where it isn't known (data sets of the user's own).
    fingerprint: sha256 of the contents (of folders: names and sizes), hexadecimal.
    augment: the augmentations of `amc.finetune` that suit.
    input_shape: one example at batch 1, e.g. `(1, 3, 32, 32)`; None where an input isn't one tensor.
    classes: names in the labels' order, where the data set has them.
    """

    name: str
    train: Split | None
    val: Split
    test: Split | None
    num_classes: int | None
    fingerprint: str
    augment: tuple[str, ...] = ()
    input_shape: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()

    def example(self) -> Any:
        """The inputs of the first example that can be read, at batch 1."""
        try:
            return self.val.batch([0])[0]
        except DataError:
            if len(self.val) < 2:
                raise
            return self.val.batch([1])[0]  # one damaged image must not stop a run


@dataclass(frozen=True)
class Options:
    """How images are read: normalization a channel, size `(height, width)`, and the seed of splits made here."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_size: tuple[int, int] | None = None
    seed: int = 0

    def refuse(self, kind: str, *names: str) -> None:
        """Raises a DataError if any of the options `names` is set, since data of this kind fixes it."""
        for name in names:
            if getattr(self, name) is not None:
                option = "--" + name.replace("_", "-")
                raise DataError(f"{option} can't be given with --data {kind}, which fixes it; leave {option} out")


class Normalize:
    """uint8 images `(N, H, W, C)` to float32 `(N, C, H, W)`: `(x / peak - mean) / std`, a channel each."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], peak: float = 255) -> None:
        self.mean, self.std = tuple(mean), tuple(std)
        self.scale = torch.tensor([1 / (peak * s) for s in std]).view(1, -1, 1, 1)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, -1, 1, 1)

    def __str__(self) -> str:
        return f"mean {' '.join(f'{m:g}' for m in self.mean)}, std {' '.join(f'{s:g}' for s in self.std)}"

    def __call__(self, images: np.ndarray) -> Tensor:
        """The images, ready for a model."""
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        return x.float().mul_(self.scale).add_(self.shift)


def normalization(
    options: Options, channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Normalize:
    """The normalization asked for, else the data set's own, else ImageNet's (0.5 unless there are three channels)."""
    rgb = channels == 3
    mean = options.mean or mean or (IMAGENET_MEAN if rgb else (0.5,))
    std = options.std or std or (IMAGENET_STD if rgb else (0.5,))
    for option, values in (("--mean", mean), ("--std", std)):
        if len(values) not in (1, channels):
            have = f"{channels} channels; give 1 or {channels}" if channels > 1 else "one channel; give 1"
            raise DataError(
                f"{option} has {len(values)} values, but the images have {have} (those of a grey image folder have "
                "one where --mean is one value, else three)"
            )
        if not all(math.isfinite(v) and (v > 0 or option == "--mean") for v in values):
            raise DataError(
                f"{option} {' '.join(map(str, values))} must be finite{'' if option == '--mean' else ' and above 0'}"
            )
    spread = channels if len(mean) == 1 else 1, channels if len(std) == 1 else 1
    return Normalize(tuple(mean) * spread[0], tuple(std) * spread[1])


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images in memory. images: uint8 `(N, H, W, C)`; labels: int64 `(N,)`."""

    images: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    normalize: Normalize = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Normalized images `(N, C, H, W)` and labels `(N,)`."""
        index = np.asarray(indices, dtype=np.int64)
        return self.normalize(self.images[index]), torch.from_numpy(self.labels[index])


def hold_out(labels: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
    """Splits examples into `parts` equal parts with about the same share of each class; sorted indices of each part."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    return [np.sort(order[part::parts]) for part in range(parts)]


SPLITS = ("train", "val", "test")


def warn_of_others(name: str, keys: Collection[str]) -> None:
    """Says which keys name no split (`valid`, perhaps) and are left out."""
    if keys:
        log.warning(
            "--data %s: %s left out; splits are %s", name, ", ".join(sorted(map(repr, keys))), ", ".join(SPLITS)
        )


def without_val(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of what stays of a `train` split, and of the tenth of it that stands in for a missing `val`."""
    val, *rest = hold_out(labels, 10, seed)
    return np.sort(np.concatenate(rest)), val


def suitable_augmentations(height: int, width: int) -> tuple[str, ...]:
    """The augmentations of `amc.finetune` that suit images of this size."""
    return ("crop", "flip") if min(height, width) >= 16 else ("crop",)


def load_data(
    spec: str | Data | Mapping[str, Any],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: Sequence[int] | None = None,
    seed: int = 0,
) -> Data:
    """The data set that `spec` names (as `--data` takes it), or a mapping of the user's own data sets.

    mean, std: a value for each channel, or one for all, of images in [0, 1]. With one mean, a folder of images
        that are mostly grey is read with one channel; otherwise with three.
    input_size: (height, width) to which the images of a folder are scaled; they cover it and are cut at the centre.
    seed: of the split where `val` is taken out of `train`.

    Raises:
        DataError: it can't be read, or an option doesn't suit it.
    """
    if isinstance(spec, Data):
        return spec
    if input_size is not None and (len(input_size) not in (1, 2) or not all(0 < int(s) <= 16384 for s in input_size)):
        raise DataError(f"--input-size {' '.join(map(str, input_size))} must be a height and a width in pixels")
    options = Options(
        mean=tuple(mean) if mean else None,
        std=tuple(std) if std else None,
        input_size=(int(input_size[0]), int(input_size[-1])) if input_size else None,
        seed=seed,
    )
    from amc import own_data  # it needs what is above

    if not isinstance(spec, str):
        return own_data.own(spec, options)
    kind, _, where = spec.partition(":")
    if kind in DATASETS:
        if bool(where) == (kind == "digits"):
            raise DataError(f"--data {spec!r}: write {kind if kind == 'digits' else kind + ':PATH'}")
        return resolve(DATASETS, kind, "--data")(where, options)
    if ":" in spec and (kind.endswith(".py") or "." in kind or ".py:" in spec):
        return own_data.factory(spec, options)
    raise DataError(f"--data {spec!r} is unknown; {suggest(kind, DATASETS)}, or FILE.py:FACTORY for data of your own")
