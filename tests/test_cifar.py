"""The published archives of CIFAR, in every form that is around; none of them runs code."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from amc import cifar
from amc.data import load_data
from tests.splits import everything, refused


def cifar_row(label_bytes, value):
    return bytes(label_bytes) + bytes([value]) * 1024 + bytes([value + 1]) * 1024 + bytes([value + 2]) * 1024


def binary10(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        (root / f"{name}.bin").write_bytes(b"".join(cifar_row([(n + i) % 10], 10 * n + i) for i in range(10)))
    return root


def python10(root: Path, protocol=2, keys=bytes) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = np.frombuffer(b"".join(cifar_row([], 10 * n + i) for i in range(10)), np.uint8).reshape(10, 3072)
        labels = [(n + i) % 10 for i in range(10)]
        content = {b"data": rows.copy(), b"labels": labels, b"filenames": [b"a.png"] * 10}
        content = content if keys is bytes else {k.decode(): v for k, v in content.items()}
        (root / name).write_bytes(pickle.dumps(content, protocol=protocol))
    return root


def test_cifar10_binary(tmp_path):
    data = load_data(f"cifar10:{binary10(tmp_path)}", mean=(0, 0, 0), std=(1, 1, 1))
    assert (len(data.train), len(data.val), len(data.test)) == (45, 5, 10)
    images, labels = everything(data.test)
    assert (images[3, :, 5, 6] * 255).round().tolist() == [53, 54, 55]
    assert labels.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("keys", [bytes, str])
def test_cifar10_python_equals_binary(tmp_path, protocol, keys):
    plain = load_data(f"cifar10:{binary10(tmp_path / 'bin')}")
    data = load_data(f"cifar10:{python10(tmp_path / 'up' / 'cifar-10-batches-py', protocol, keys).parent}")
    assert data.fingerprint == plain.fingerprint


def python2_pickle(pixels: bytes, labels: list[int], key: bytes) -> bytes:
    """One image as Python 2 and its numpy wrote it, opcode by opcode: byte strings, and numpy under its old name."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNN"
        + 2 * b"J\xff\xff\xff\xff"
        + b"K\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    state = b"(K\x01K\x01M\x00\x0c\x86" + dtype + b"\x89T" + len(pixels).to_bytes(4, "little") + pixels + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + state + text(key) + listed + b"u."


def test_cifar100_as_python_2_wrote_it(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(python2_pickle(cifar_row([], 7), [42], b"fine_labels"))
    refused(f"cifar100:{tmp_path}", "`train` has 1 image")  # both were read
    images, labels = cifar._python(tmp_path / "test", b"fine_labels")
    assert images.tobytes() == cifar_row([], 7)
    assert labels.tolist() == [42]


def test_cifar100_reads_the_fine_label(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.bin").write_bytes(b"".join(cifar_row([i % 20, 99 - i], i) for i in range(20)))
    data = load_data(f"cifar100:{tmp_path}")
    assert data.num_classes == 100
    assert everything(data.test)[1].tolist() == [99 - i for i in range(20)]


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


def test_a_pickle_never_runs(tmp_path):
    root, target = python10(tmp_path / "py"), tmp_path / "touched"
    (root / "test_batch").write_bytes(pickle.dumps({b"data": Bomb(str(target)), b"labels": []}))
    refused(f"cifar10:{root}", "test_batch", "io.open", "no array needs")
    assert not target.exists()


def test_cifar_says_what_is_wrong(tmp_path):
    refused(f"cifar10:{tmp_path / 'none'}", "no such folder")
    refused(f"cifar10:{tmp_path}", "lacks files", "data_batch_1")
    root = binary10(tmp_path)
    content = (root / "test_batch.bin").read_bytes()
    (root / "test_batch.bin").write_bytes(content[:-1])
    refused(f"cifar10:{root}", "test_batch.bin", "cut short")
    (root / "test_batch.bin").write_bytes(b"\x0b" + content[1:])
    refused(f"cifar10:{root}", "labels outside 0..9")
