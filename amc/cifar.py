"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their published archives, unpacked: the binary or the Python version.

The Python version is a pickle, and a pickle can run code. Ours names the handful of constructors that an array needs,
and everything else a pickle asks for is refused.
"""

from __future__ import annotations

import codecs
import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from amc.data import Data, Options
from amc.datasets import image_data
from amc.errors import DataError
from amc.userfile import describe

IMAGE = 3 * 32 * 32
SIZE_LIMIT = 2**30
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
MEAN100, STD100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def cifar10(where: str, options: Options) -> Data:
    """60,000 images of 32x32 in 10 classes; `val` is taken out of the 50,000 for training."""
    files = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    folders = ("cifar-10-batches-bin", "cifar-10-batches-py")
    return _load("cifar10", where, options, files, folders, 10, b"labels", 0, MEAN, STD)


def cifar100(where: str, options: Options) -> Data:
    """60,000 images of 32x32 in 100 classes; `val` is taken out of the 50,000 for training."""
    files = {"train": ["train"], "test": ["test"]}
    folders = ("cifar-100-binary", "cifar-100-python")
    return _load("cifar100", where, options, files, folders, 100, b"fine_labels", 1, MEAN100, STD100)


def _load(
    kind: str,
    where: str,
    options: Options,
    files: dict[str, list[str]],
    folders: tuple[str, str],
    classes: int,
    key: bytes,
    label_at: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Data:
    options.refuse(kind, "input_size")
    root = Path(where).expanduser()
    if not root.is_dir():
        said = "is a file; unpack it and give the folder" if root.exists() else "there is no such folder"
        raise DataError(f"--data {kind}:{where}: {said}")
    names = [name for part in files.values() for name in part]
    for folder in (root, *(root / inner for inner in folders)):
        for suffix in (".bin", ""):
            if all((folder / (name + suffix)).is_file() for name in names):
                arrays = {}
                for split, parts in files.items():
                    read = [
                        _binary(folder / (name + suffix), label_at) if suffix else _python(folder / name, key)
                        for name in parts
                    ]
                    arrays[split] = _joined(folder, read, classes)
                return image_data(f"{kind}:{where}", arrays, options, num_classes=classes, mean=mean, std=std)
    raise DataError(f"{root} lacks files of the archive: {', '.join(names)} (or the same with .bin); unpack it there")


def _joined(folder: Path, parts: list[tuple[np.ndarray, np.ndarray]], classes: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts]).astype(np.int64)
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"{folder} holds labels outside 0..{classes - 1}; is it the archive of another data set?")
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels


def _binary(path: Path, label_at: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one label byte (two in CIFAR-100, the second of which is the fine one) and the pixels."""
    row = label_at + 1 + IMAGE
    size = path.stat().st_size
    if size > SIZE_LIMIT or size == 0 or size % row:
        raise DataError(f"{path} has {size} bytes, not a multiple of {row}; is it cut short?")
    rows = np.fromfile(path, dtype=np.uint8).reshape(-1, row)
    return rows[:, label_at + 1 :], rows[:, label_at]


def _python(path: Path, key: bytes) -> tuple[np.ndarray, np.ndarray]:
    if path.stat().st_size > SIZE_LIMIT:
        raise DataError(f"{path} has {path.stat().st_size} bytes, more than any file of the archive")
    try:
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        content = {k.encode() if isinstance(k, str) else k: v for k, v in content.items()}
        pixels, labels = content[b"data"], np.asarray(content[key])
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), IMAGE) or labels.dtype.kind not in "iu":
            raise ValueError(f"data {pixels.dtype} {pixels.shape} and labels {labels.dtype} {labels.shape} don't fit")
    except (Exception, MemoryError) as problem:
        raise DataError(f"{path} is not a file of the archive: {describe(problem)}") from problem
    return pixels, labels


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> np.ndarray:
    """An empty array, which the pickle then fills."""
    if kind is not np.ndarray or tuple(shape) != (0,):
        raise pickle.UnpicklingError("an array of an unusual kind")
    return np.ndarray.__new__(np.ndarray, (0,), np.uint8 if typecode in (b"b", "b") else typecode)


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> np.ndarray:
    if order not in ("C", "F", "K"):
        raise pickle.UnpicklingError("an array of an unusual order")
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"an unusual encoding {encoding!r}")
    return codecs.encode(text, encoding)


class _ArrayUnpickler(pickle.Unpickler):
    """Plain containers and numpy arrays; nothing else is ever imported or called."""

    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode,
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    }

    def find_class(self, module: str, name: str) -> Any:
        """The allowed constructor of that name."""
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs") from None
