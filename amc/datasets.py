"""Where images come from: the embedded digits, arrays, and folders."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from amc.data import (
    SPLITS,
    VAL_PARTS,
    Data,
    ImageSplit,
    Indices,
    Normalize,
    Options,
    Split,
    hold_out,
    normalization,
    warn_of_others,
)
from amc.errors import DataError
from amc.userfile import describe

logger = logging.getLogger("amc")

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
GREY_MODES = {"1", "L", "LA", "La", "I", "F"}
"""Pillow's, with one channel beside transparency; `I;16` has several forms."""
CACHE_LIMIT = 2**30
"""Decoded images are kept in memory while a whole folder's would take less than this many bytes."""
UNREADABLE_SHARE = 0.01
"""Unreadable images are left out up to this share of a split; beyond it the folder is refused."""
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
        val, *rest = hold_out(labels, VAL_PARTS, options.seed)
        train = np.sort(np.concatenate(rest))
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
        augment=("crop", "flip") if min(size) >= 16 else ("crop",),
        input_shape=(1, channels, *size),
        classes=classes,
    )


# ---- npz


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


# ---- folders of images


def imagefolder(where: str, options: Options) -> Data:
    """`DIR/train`, `DIR/val` and `DIR/test` of one folder a class; the sorted folders of `train` are the classes."""
    root = Path(where).expanduser()
    if not root.exists():
        raise DataError(f"--data imagefolder:{where}: there is no such folder")
    if not root.is_dir():
        raise DataError(f"--data imagefolder:{where} is a file; unpack it and give the folder that holds `train`")
    if not (root / "train").is_dir():
        raise DataError(f"{root} has no folder `train`; put one folder a class into {root / 'train'}")
    classes = _class_folders(root / "train")
    files = {name: _images(root / name, classes) for name in SPLITS if (root / name).is_dir()}
    digest = hashlib.sha256("\0".join(classes).encode())
    for name, entries in files.items():
        for path, _, size in entries:
            line = f"{name}\0{path.relative_to(root / name).as_posix()}\0{size}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))

    first = next(iter(files["train"]))[0]
    own_size, grey = _look(entry[0] for entry in files["train"])
    height, width = options.input_size or own_size
    if "val" not in files:
        labels = np.array([label for _, label, _ in files["train"]])
        val, *rest = hold_out(labels, VAL_PARTS, options.seed)
        entries = files["train"]
        files["train"] = [entries[i] for i in np.sort(np.concatenate(rest))]
        files["val"] = [entries[i] for i in val]
        if not files["train"]:
            raise DataError(f"{root / 'train'} has one image ({first}), too few to take a `val` from")
    # Grey images are read as such where one mean says that the model takes them so; most models take three channels.
    channels = 1 if grey and options.mean is not None and len(options.mean) == 1 else 3
    normalize = normalization(options, channels)
    keep = sum(map(len, files.values())) * height * width * channels <= CACHE_LIMIT
    resize = options.input_size is not None
    splits = {
        name: FolderSplit(
            [path for path, _, _ in entries],
            np.array([label for _, label, _ in entries], dtype=np.int64),
            (height, width, channels),
            normalize,
            resize=resize,
            keep=keep,
        )
        for name, entries in files.items()
    }
    return Data(
        f"imagefolder:{where}",
        splits["train"],
        splits["val"],
        splits.get("test"),
        len(classes),
        digest.hexdigest(),
        augment=("crop", "flip") if min(height, width) >= 16 else ("crop",),
        input_shape=(1, channels, height, width),
        classes=classes,
    )


def _class_folders(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))


def _images(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int, int]]:
    """Path, label and bytes of every image, in sorted order."""
    own = _class_folders(folder)
    if own != classes:
        extra, absent = sorted(set(own) - set(classes)), sorted(set(classes) - set(own))
        said = "; ".join(
            f"{word} {', '.join(names[:5])}" for word, names in (("extra", extra), ("missing", absent)) if names
        )
        raise DataError(
            f"{folder} and `train` have different class folders ({said}); rename them, "
            "or make an empty folder for a class without images there"
        )
    found = []
    for label, name in enumerate(classes):
        for parent, inner, names in os.walk(folder / name):
            inner[:] = [each for each in inner if not each.startswith(".")]  # .ipynb_checkpoints holds copies
            for file in names:
                path = os.path.join(parent, file)
                if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and not file.startswith("."):
                    size = os.stat(path).st_size if os.path.exists(path) else 0  # a link to nothing can't be read
                    found.append((Path(path), label, size))
    if not found:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{folder} has no images in folders of one class each (of the kinds {kinds})")
    return sorted(found, key=lambda entry: (entry[1], entry[0]))


def _look(paths: Any) -> tuple[tuple[int, int], bool]:
    """(height, width) of the first image that can be opened, and whether it is grey."""
    first = None
    for path in paths:
        first = first or path
        try:
            with Image.open(path) as image:
                return (image.height, image.width), image.mode in GREY_MODES or image.mode.startswith("I;16")
        except Exception:
            continue
    raise DataError(f"no image can be read, {first} for one; are they damaged?")


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel; Pillow's own conversion would clip what is above 255.

    Raises:
        ValueError: its range is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # before Pillow 10.3
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers of unknown range; save it with 8 or 16 bits a channel")
    return image


class FolderSplit:
    """Images decoded when they are first asked for. An unreadable one is named once and left out of its batch.

    shape: (height, width, channels). resize: scale to cover that size and cut at the centre; else another size is an
    error. keep: hold decoded images in memory.
    """

    def __init__(
        self,
        paths: list[Path],
        labels: np.ndarray,
        shape: tuple[int, int, int],
        normalize: Normalize,
        *,
        resize: bool,
        keep: bool,
    ) -> None:
        self.paths = paths
        self.labels = labels
        self.shape = shape
        self.normalize = normalize
        self.resize = resize
        self.unreadable: dict[int, str] = {}
        # Pages that are never written take no memory.
        self._kept = np.empty((len(paths), *shape), dtype=np.uint8) if keep else None
        self._known = np.zeros(len(paths), dtype=bool)

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Normalized images `(N, C, H, W)` and labels `(N,)`, without those that can't be read."""
        index = np.asarray(indices, dtype=np.int64)
        if self._kept is None:
            decoded = [(i, image) for i in index.tolist() if (image := self._decode(i)) is not None]
            index = np.array([i for i, _ in decoded], dtype=np.int64)
            images = np.stack([image for _, image in decoded]) if decoded else None
        else:
            for i in dict.fromkeys(index[~self._known[index]].tolist()):
                image = self._decode(i)
                if image is not None:
                    self._kept[i], self._known[i] = image, True
            index = index[self._known[index]]
            images = self._kept[index] if len(index) else None
        if images is None:
            raise DataError(
                f"none of the images asked for can be read: {next(iter(self.unreadable.values()), 'no index')}"
            )
        return self.normalize(images), torch.from_numpy(self.labels[index])

    def _decode(self, index: int) -> np.ndarray | None:
        """uint8 `(H, W, C)`, or None for an unreadable image."""
        if index in self.unreadable:
            return None
        height, width, channels = self.shape
        try:
            with Image.open(self.paths[index]) as opened:
                image = _eight_bit(opened).convert("RGB" if channels == 3 else "L")
        except Exception as problem:
            self._leave_out(index, problem)
            return None
        self._check_size(index, image.size)
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(self.shape)

    def check_sizes(self) -> None:
        """Raises a DataError if an image that is not scaled has another size than the rest: known from its header."""
        for index in range(0 if self.resize else len(self)):
            if self._known[index] or index in self.unreadable:
                continue
            try:
                with Image.open(self.paths[index]) as image:
                    size = image.size
            except Exception as problem:
                self._leave_out(index, problem)
            else:
                self._check_size(index, size)

    def _check_size(self, index: int, size: tuple[int, int]) -> None:
        height, width, _ = self.shape
        if not self.resize and size != (width, height):
            raise DataError(
                f"{self.paths[index]} is {size[1]}x{size[0]}, but other images are {height}x{width}; "
                "give --input-size HEIGHT WIDTH"
            )

    def _leave_out(self, index: int, problem: Exception) -> None:
        self.unreadable[index] = f"{self.paths[index]} ({describe(problem)})"
        logger.warning("left out an image that can't be read: %s", self.unreadable[index])
        if len(self.unreadable) > UNREADABLE_SHARE * len(self):
            raise DataError(
                f"{len(self.unreadable)} of {len(self)} images can't be read, more than {UNREADABLE_SHARE:.0%}: "
                f"{'; '.join(list(self.unreadable.values())[:3])}. Delete or mend them"
            )
