"""Folders of images, one a class: listed at once, decoded when they are first asked for."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from amc.data import (
    SPLITS,
    Data,
    Indices,
    Normalize,
    Options,
    normalization,
    suitable_augmentations,
    without_val,
)
from amc.errors import DataError
from amc.userfile import describe

log = logging.getLogger("amc")

IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
GREY_MODES = {"1", "L", "LA", "La", "I", "F"}
"""Pillow's, with one channel beside transparency; `I;16` has several forms."""
LOOKED_AT = 100
"""Images whose headers say, before any is decoded, what the folder holds."""
CACHE_LIMIT = 2**30
"""Decoded images are kept in memory while a whole folder's would take less than this many bytes."""
UNREADABLE_SHARE = 0.01
"""Unreadable images are left out up to this share of a split; beyond it the folder is refused."""

Entry = tuple[Path, int, int]
"""An image: its path, its label, and its bytes."""


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
    digest = _fingerprint(root, classes, files)
    own_size, grey = _look([path for path, _, _ in files["train"]])
    height, width = options.input_size or own_size
    if "val" not in files:
        entries = files["train"]
        train, val = without_val(np.array([label for _, label, _ in entries]), options.seed)
        if not len(train):
            raise DataError(f"{root / 'train'} has one image ({entries[0][0]}), too few to take a `val` from")
        files |= {"train": [entries[i] for i in train], "val": [entries[i] for i in val]}
    # Grey images are read as such where one mean says that the model takes them so; most models take three channels.
    channels = 1 if grey and options.mean is not None and len(options.mean) == 1 else 3
    normalize = normalization(options, channels)
    keep = sum(map(len, files.values())) * height * width * channels <= CACHE_LIMIT
    splits = {
        name: FolderSplit(
            [path for path, _, _ in entries],
            np.array([label for _, label, _ in entries], dtype=np.int64),
            (height, width, channels),
            normalize,
            resize=options.input_size is not None,
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
        digest,
        augment=suitable_augmentations(height, width),
        input_shape=(1, channels, height, width),
        classes=classes,
    )


def _fingerprint(root: Path, classes: tuple[str, ...], files: Mapping[str, list[Entry]]) -> str:
    """sha256 of the names of classes and images, and of the images' sizes."""
    digest = hashlib.sha256("\0".join(classes).encode())
    for name, entries in files.items():
        for path, _, size in entries:
            line = f"{name}\0{path.relative_to(root / name).as_posix()}\0{size}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _class_folders(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))


def _images(folder: Path, classes: tuple[str, ...]) -> list[Entry]:
    """Every image, in sorted order."""
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
    found, others = [], []
    for label, name in enumerate(classes):
        for path in _files(folder / name):
            if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES:
                size = os.stat(path).st_size if os.path.exists(path) else 0  # a link to nothing can't be read
                found.append((Path(path), label, size))
            else:
                others.append(path)
    kinds = ", ".join(sorted(IMAGE_SUFFIXES))
    if not found:
        raise DataError(f"{folder} has no images in folders of one class each (of the kinds {kinds})")
    if others:
        log.warning(
            "left out %d of %d files in %s, which are none of the kinds %s: %s; convert those that are images",
            *(len(others), len(others) + len(found), folder, kinds, ", ".join(sorted(others)[:3])),
        )
    return sorted(found, key=lambda entry: (entry[1], entry[0]))


def _files(folder: Path) -> Iterator[str]:
    """What is in a folder and the folders in it, linked ones too, each once; hidden ones are left out."""
    seen = set()
    for parent, inner, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # links may lead in a circle
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(each for each in inner if not each.startswith("."))  # .ipynb_checkpoints holds copies
        yield from (os.path.join(parent, file) for file in names if not file.startswith("."))


def _look(paths: Sequence[Path]) -> tuple[tuple[int, int], bool]:
    """(height, width) of the first image that can be opened, and whether most are grey, by some spread over them all.

    A photo among scans, or a scan among photos, must not decide for the others because its name comes first.
    """
    sizes, grey = [], []
    for path in paths[:: -(-len(paths) // LOOKED_AT)]:
        try:
            with Image.open(path) as image:
                sizes.append((image.height, image.width))
                grey.append(image.mode in GREY_MODES or image.mode.startswith("I;16"))
        except Exception:
            continue
    if not sizes:
        raise DataError(f"no image can be read, {paths[0]} for one; are they damaged?")
    return sizes[0], 2 * sum(grey) > len(grey)


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
        log.warning("left out an image that can't be read: %s", self.unreadable[index])
        if len(self.unreadable) > UNREADABLE_SHARE * len(self):
            raise DataError(
                f"{len(self.unreadable)} of {len(self)} images can't be read, more than {UNREADABLE_SHARE:.0%}: "
                f"{'; '.join(list(self.unreadable.values())[:3])}. Delete or mend them"
            )
