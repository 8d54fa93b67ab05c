"""Images that are held in memory: the embedded digits, and arrays (`npz`)."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from amc.data import (
    SPLITS,
    Data,
    ImageSplit,
    Normalize,
    Options,
    Split,
    hold_out,
    normalization,
    suitable_augmentations,
    warn_of_others,
    without_val,
)
from amc.errors import DataError
from amc.userfile import describe

ARRAY_LIMIT = 2**36
"""Bytes of arrays, unpacked, that are read into memory at most."""


def digits(_: str, options: Options) -> Data:
    """scikit-learn's handwritten digits (Alpaydin and Kaynak 1998): 1,797 grey images of 8x8.

    The images are always split in the same way: a fifth each are `val` and `test`.
    """
    from sklearn.datasets import load_digits

    options.refuse("digits", "mean", "std", "input_size")
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    labels = labels.astype(np.int64)
    normalize = Normalize((0.305,), (0.376,), peak=16)
    val, test, *rest = hold_out(labels, 5, seed=0)
    train = np.sort(np.concatenate(rest))
    splits = [ImageSplit(images[part], labels[part], normalize) for part in (train, val, test)]
    return Data(
        "digits",
        splits[0],
        splits[1],
        splits[2],
        num_classes=10,
        fingerprint=fingerprint(images, labels),
        augment=("crop",),
        input_shape=(1, 1, 8, 8),
        classes=tuple(map(str, range(10))),
    )


def fingerprint(*arrays: np.ndarray) -> str:
    """sha256 of the arrays' shapes and contents."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def image_data(
    name: str,
    arrays: Mapping[str, tuple[np.ndarray, np.ndarray]],
    options: Options,
    *,
    num_classes: int,
    classes: tuple[str, ...] = (),
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Data:
    """A data set of images `(N, H, W, C)` and labels in memory, by split; a missing `val` is taken out of `train`."""
    *size, channels = arrays["train"][0].shape[1:]
    normalize = normalization(options, channels, mean, std)
    digest = fingerprint(*(array for split in arrays.values() for array in split))
    splits: dict[str, Split] = {key: ImageSplit(*split, normalize) for key, split in arrays.items()}
    if "val" not in arrays:
        images, labels = arrays["train"]
        train, val = without_val(labels, options.seed)
        if not len(train):
            raise DataError(f"--data {name}: `train` has {len(labels)} image, too few to take a `val` from")
        splits["train"] = ImageSplit(images[train], labels[train], normalize)
        splits["val"] = ImageSplit(images[val], labels[val], normalize)
    return Data(
        name,
        splits["train"],
        splits["val"],
        splits.get("test"),
        num_classes,
        digest,
        augment=suitable_augmentations(*size),
        input_shape=(1, channels, *size),
        classes=classes,
    )


def npz(where: str, options: Options) -> Data:
    """Arrays `x_train`, `y_train`, `x_val` … of a numpy archive; images uint8 `(N, H, W, C)` or `(N, H, W)`."""
    options.refuse("npz", "input_size")
    path = Path(where).expanduser()
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > ARRAY_LIMIT:
            raise DataError(f"{path} unpacks to {size} bytes, more than the {ARRAY_LIMIT} that are read into memory")
        with np.load(path, allow_pickle=False) as archive:
            found = {key: archive[key] for key in archive.files if key[:2] in ("x_", "y_")}
    except DataError:
        raise
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"--data npz:{where}: there is no such file") from None
    except (Exception, MemoryError) as problem:
        raise DataError(f"{path} can't be read as a numpy archive without pickles: {describe(problem)}") from problem
    arrays = {}
    for split in SPLITS:
        x, y = f"x_{split}", f"y_{split}"
        if x in found or y in found or split == "train":
            for key in (x, y):
                if key not in found:
                    raise DataError(f"{path} lacks {key}; it holds {', '.join(found) or 'no x_train'}")
            arrays[split] = _checked_images(path, x, found[x]), _checked_labels(path, y, found[y], len(found[x]))
    warn_of_others(f"npz:{where}", found.keys() - {f"{axis}_{split}" for axis in "xy" for split in SPLITS})
    shape = arrays["train"][0].shape[1:]
    classes = int(arrays["train"][1].max()) + 1
    for split, (images, labels) in arrays.items():
        if images.shape[1:] != shape:
            raise DataError(
                f"{path}: images of x_{split} are {images.shape[1:]}, those of x_train {shape}; make them equal"
            )
        if labels.max() >= classes:
            raise DataError(
                f"{path}: y_{split} holds the label {labels.max()}, but those of y_train end at {classes - 1}"
            )
    return image_data(f"npz:{where}", arrays, options, num_classes=classes)


def _checked_images(path: Path, key: str, images: np.ndarray) -> np.ndarray:
    if images.dtype != np.uint8:
        raise DataError(f"{path}: {key} is {images.dtype}, but images must be uint8 in 0..255")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise DataError(f"{path}: {key} has the shape {images.shape}; images must be (N, H, W, C) or (N, H, W)")
    if images.shape[3] > 4 and images.shape[1] <= 4:
        raise DataError(f"{path}: {key} has the shape {images.shape}, channels first; transpose it to (N, H, W, C)")
    return images


def _checked_labels(path: Path, key: str, labels: np.ndarray, count: int) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(
            f"{path}: {key} is {labels.dtype} {labels.shape}; labels must be {count} integers, one an image"
        )
    if labels.min() < 0 or labels.max() >= 2**20:
        raise DataError(f"{path}: {key} holds labels from {labels.min()} to {labels.max()}; they must count from 0")
    return labels.astype(np.int64)
