"""Every source gives the same kind of splits, the same ones each time; what is wrong with data is said at once."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from amc import cifar, folders
from amc.catalog import DATASETS
from amc.data import Data, hold_out, load_data
from amc.errors import DataError

RNG = np.random.default_rng(0)


def everything(split):
    return split.batch(np.arange(len(split)))


def refused(spec, *words, **options):
    with pytest.raises(DataError) as caught:
        everything(load_data(spec, **options).train)
    for word in words:
        assert word in str(caught.value), str(caught.value)


# ---- splits


def test_hold_out_parts_are_disjoint_and_keep_the_classes_shares():
    labels = np.repeat(np.arange(4), [50, 100, 150, 200])
    parts = hold_out(labels, 5, seed=1)
    assert sorted(np.concatenate(parts)) == list(range(500))
    for part in parts:
        assert np.bincount(labels[part]).tolist() == [10, 20, 30, 40]
    assert [p.tolist() for p in parts] == [p.tolist() for p in hold_out(labels, 5, seed=1)]
    assert parts[0].tolist() != hold_out(labels, 5, seed=2)[0].tolist()


def test_digits_are_real_normalized_and_always_split_alike():
    data = load_data("digits", seed=0)
    assert (len(data.train), len(data.val), len(data.test)) == (1077, 360, 360)
    images, labels = everything(data.train)
    assert images.shape == (1077, 1, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.01
    seen = {image.tobytes() for split in (data.train, data.val, data.test) for image in split.images}
    assert len(seen) == 1797
    again = load_data("digits", seed=5)
    assert torch.equal(everything(again.val)[0], everything(data.val)[0])
    assert data.fingerprint == again.fingerprint
    assert data.example().shape == data.input_shape == (1, 1, 8, 8)
    assert load_data(data) is data


def test_batches_are_what_was_asked_for_in_that_order():
    split = load_data("digits").val
    images, labels = split.batch([5, 0, 5])
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1:2], split.batch([0])[0])
    assert labels.tolist() == split.labels[[5, 0, 5]].tolist()


# ---- npz


def arrays(count=40, shape=(6, 5, 3), classes=4):
    return {
        "x_train": RNG.integers(0, 256, (count, *shape), dtype=np.uint8),
        "y_train": np.arange(count) % classes,
        "x_test": RNG.integers(0, 256, (10, *shape), dtype=np.uint8),
        "y_test": np.arange(10) % classes,
    }


def saved(path: Path, content) -> str:
    np.savez(path, **content)
    return f"npz:{path}"


def test_npz_takes_a_missing_val_out_of_train(tmp_path):
    content = arrays()
    data = load_data(saved(tmp_path / "a.npz", content))
    assert (len(data.train), len(data.val), len(data.test)) == (36, 4, 10)
    assert data.num_classes == 4
    both = np.concatenate([data.train.images, data.val.images])
    assert {x.tobytes() for x in both} == {x.tobytes() for x in content["x_train"]}
    assert load_data(f"npz:{tmp_path / 'a.npz'}", seed=1).val.images.tobytes() != data.val.images.tobytes()


def test_npz_normalizes_each_channel(tmp_path):
    content = {**arrays(), "x_val": arrays()["x_train"], "y_val": arrays()["y_train"]}
    spec = saved(tmp_path / "a.npz", content)
    images, _ = everything(load_data(spec, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).val)
    expected = (content["x_val"] / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(images.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)
    default, _ = everything(load_data(spec).val)
    expected = (content["x_val"] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(default.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)


def test_npz_without_a_channel_axis_has_one_channel_and_no_test(tmp_path):
    content = arrays(shape=(28, 28))
    data = load_data(saved(tmp_path / "grey.npz", {key: content[key] for key in ("x_train", "y_train")}))
    assert data.input_shape == (1, 1, 28, 28)
    assert data.test is None
    images, _ = everything(data.train)
    assert images.min() >= -1
    assert images.max() <= 1


BROKEN = {
    "float32": (lambda c: {**c, "x_train": c["x_train"].astype(np.float32)}, ["x_train is float32", "uint8"]),
    "lacks y_train": (lambda c: {"x_train": c["x_train"]}, ["lacks y_train"]),
    "lacks x_train": (lambda c: {"images": c["x_train"]}, ["lacks x_train"]),
    "short": (lambda c: {**c, "y_train": c["y_train"][:-1]}, ["y_train", "40 integers"]),
    "one-hot": (lambda c: {**c, "y_train": np.eye(4)[c["y_train"]]}, ["y_train is float64 (40, 4)"]),
    "negative": (lambda c: {**c, "y_train": c["y_train"] - 1}, ["labels from -1 to 2"]),
    "beyond": (lambda c: {**c, "y_test": c["y_test"] + 1}, ["y_test holds the label 4", "end at 3"]),
    "flat": (lambda c: {**c, "x_train": c["x_train"].reshape(40, -1)}, ["shape (40, 90)"]),
    "channels first": (lambda c: {**c, "x_train": c["x_train"].transpose(0, 3, 1, 2)}, ["transpose"]),
    "sizes": (lambda c: {**c, "x_test": c["x_test"][:, :4]}, ["(4, 5, 3)", "(6, 5, 3)"]),
    "empty": (lambda c: {**c, "x_train": c["x_train"][:0], "y_train": c["y_train"][:0]}, ["shape (0, 6, 5, 3)"]),
    "pickled": (lambda c: {**c, "y_train": np.array([None] * 40)}, ["without pickles"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_npz_says_what_is_wrong(tmp_path, name):
    change, words = BROKEN[name]
    refused(saved(tmp_path / "a.npz", change(arrays())), str(tmp_path / "a.npz"), *words)


def test_npz_that_is_none(tmp_path):
    refused(f"npz:{tmp_path / 'none.npz'}", "no such file")
    (tmp_path / "text.npz").write_text("hello")
    refused(f"npz:{tmp_path / 'text.npz'}", "can't be read")


# ---- folders of images


def folder(
    root: Path, splits=("train", "val", "test"), classes=("ant", "bee"), count=6, size=(8, 6), mode="RGB"
) -> Path:
    """PNG files whose pixels are all 20 times the number of the class, plus the number of the file."""
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                value = 20 * label + i
                Image.new(mode, size, value if mode == "L" else (value,) * 3).save(root / split / name / f"{i:02}.png")
    return root


def test_folder_sorts_classes_and_ignores_other_folders(tmp_path):
    root = folder(tmp_path, classes=("bee", "ant"))
    (root / "extra" / "cow").mkdir(parents=True)
    (root / "train" / ".hidden").mkdir()
    shutil.copytree(root / "train" / "ant", root / "train" / "bee" / ".ipynb_checkpoints")
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    (root / "train" / "loose.png").write_bytes(b"in no class")
    data = load_data(f"imagefolder:{root}", mean=(0, 0, 0), std=(1, 1, 1))
    assert data.classes == ("ant", "bee")
    assert [len(s) for s in (data.train, data.val, data.test)] == [12, 12, 12]
    images, labels = everything(data.train)
    assert data.input_shape == (1, 3, 6, 8)
    values = (images[:, 0, 0, 0] * 255).round().int().tolist()
    assert values == [20, 21, 22, 23, 24, 25, 0, 1, 2, 3, 4, 5]
    assert labels.tolist() == [0] * 6 + [1] * 6


@pytest.mark.parametrize("limit", [0, 2**30])
def test_folder_gives_the_same_with_and_without_memory(tmp_path, monkeypatch, limit):
    root = folder(tmp_path)
    monkeypatch.setattr(folders, "CACHE_LIMIT", limit)
    split = load_data(f"imagefolder:{root}", mean=(0, 0, 0), std=(1, 1, 1)).train
    for _ in range(2):
        images, labels = split.batch([7, 1, 7])
        assert (images[:, 1, 2, 3] * 255).round().tolist() == [21, 1, 21]
        assert labels.tolist() == [1, 0, 1]


def test_folder_takes_a_missing_val_out_of_train(tmp_path):
    root = folder(tmp_path, splits=("train",), count=20)
    data = load_data(f"imagefolder:{root}")
    assert (len(data.train), len(data.val), data.test) == (36, 4, None)
    assert not set(data.train.paths) & set(data.val.paths)
    assert np.bincount(data.val.labels).tolist() == [2, 2]


def test_folder_fingerprint_sees_names_and_sizes(tmp_path):
    root = folder(tmp_path)
    spec = f"imagefolder:{root}"
    before = load_data(spec).fingerprint
    assert load_data(spec).fingerprint == before
    (root / "val" / "ant" / "00.png").rename(root / "val" / "ant" / "99.png")
    assert load_data(spec).fingerprint != before


def test_one_mean_reads_grey_images_with_one_channel_and_holds_for_all_channels_of_others(tmp_path):
    grey, colour = folder(tmp_path / "grey", mode="L"), folder(tmp_path / "colour")
    assert load_data(f"imagefolder:{grey}", mean=(0.5,), std=(0.5,)).input_shape == (1, 1, 6, 8)
    assert load_data(f"imagefolder:{grey}").input_shape == (1, 3, 6, 8)
    data = load_data(f"imagefolder:{colour}", mean=(0.5,), std=(0.25,))
    assert data.input_shape == (1, 3, 6, 8)
    assert (data.val.normalize.mean, data.val.normalize.std) == ((0.5,) * 3, (0.25,) * 3)
    with pytest.raises(DataError, match=r"--std has 3 values.*one where --mean is one value"):
        load_data(f"imagefolder:{grey}", mean=(0.5,), std=(0.5,) * 3)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_what_most_images_are_decides_whether_a_folder_is_grey(tmp_path, mode, channels):
    root = folder(tmp_path, mode=mode)
    Image.new("RGB" if mode == "L" else "L", (8, 6)).save(root / "train" / "ant" / "00.png")
    assert load_data(f"imagefolder:{root}", mean=(0.5,), std=(0.5,)).input_shape == (1, channels, 6, 8)


def test_images_of_16_bits_are_read_as_the_same_ones_of_8(tmp_path):
    root = folder(tmp_path, mode="L")
    expected, _ = everything(load_data(f"imagefolder:{root}").train)
    for path in root.rglob("*.png"):
        with Image.open(path) as image:
            wide = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        wide.save(path)
    assert wide.mode == "I;16"
    assert torch.equal(everything(load_data(f"imagefolder:{root}").train)[0], expected)
    for path in root.rglob("*.png"):
        Image.fromarray(np.ones((6, 8), np.float32)).save(path.with_suffix(".tiff"))
        path.unlink()
    refused(f"imagefolder:{root}", "32-bit numbers of unknown range", "8 or 16 bits")


def test_names_in_no_encoding_are_read_and_links_to_nothing_left_out(tmp_path, caplog):
    root = folder(tmp_path, count=100)
    (root / "train" / "ant" / "00.png").rename(root / "train" / "ant" / os.fsdecode(b"caf\xe9.png"))
    (root / "train" / "ant" / "01.png").unlink()
    (root / "train" / "ant" / "01.png").symlink_to("/nonexistent/image.png")
    assert len(everything(load_data(f"imagefolder:{root}").train)[0]) == 199
    assert "left out an image that can't be read" in caplog.text


def test_folder_reads_jfif_and_linked_folders_once_and_names_what_it_leaves_out(tmp_path, caplog):
    root = folder(tmp_path)
    ant = root / "train" / "ant"
    Image.new("RGB", (8, 6)).save(ant / "06.jfif", format="JPEG")
    more = folder(tmp_path / "elsewhere", splits=("train",)) / "train" / "bee"
    (ant / "more").symlink_to(more)
    (ant / "circle").symlink_to(ant)
    assert load_data(f"imagefolder:{root}").train.labels.tolist() == [0] * 13 + [1] * 6
    assert not caplog.text
    (ant / "phone.heic").write_bytes(b"of a kind that is not read")
    assert len(load_data(f"imagefolder:{root}").train) == 19
    assert "left out 1 of 20 files" in caplog.text
    assert "phone.heic" in caplog.text


def test_images_of_different_sizes_need_an_input_size(tmp_path):
    root = folder(tmp_path)
    Image.new("RGB", (20, 10), (9, 9, 9)).save(root / "train" / "ant" / "odd.png")
    refused(f"imagefolder:{root}", "odd.png is 10x20", "6x8", "--input-size")
    with pytest.raises(DataError, match=r"odd.png is 10x20.*--input-size"):
        load_data(f"imagefolder:{root}").train.check_sizes()
    load_data(f"imagefolder:{root}", input_size=(4, 5)).train.check_sizes()
    data = load_data(f"imagefolder:{root}", input_size=(4, 5), mean=(0, 0, 0), std=(1, 1, 1))
    images, _ = everything(data.train)
    assert images.shape == (13, 3, 4, 5)
    assert (images[6] * 255).round().unique().tolist() == [9]


def test_damaged_images_are_named_and_left_out_up_to_one_in_a_hundred(tmp_path, caplog):
    root = folder(tmp_path, count=50)
    (root / "train" / "ant" / "07.png").write_bytes(b"\x89PNG damaged")
    data = load_data(f"imagefolder:{root}")
    images, labels = data.train.batch([5, 7, 8])
    assert len(images) == len(labels) == 2
    assert "07.png" in caplog.text
    assert len(everything(data.train)[0]) == 99
    with pytest.raises(DataError, match=r"none of the images.*07\.png"):
        data.train.batch([7])
    (root / "val" / "ant" / "00.png").write_bytes(b"")
    assert load_data(f"imagefolder:{root}").example().shape == (1, 3, 6, 8)
    whole = (root / "train" / "bee" / "03.png").read_bytes()
    (root / "train" / "bee" / "03.png").write_bytes(whole[: len(whole) // 2])
    refused(f"imagefolder:{root}", "2 of 100 images", "07.png", "03.png")


def test_folder_says_what_is_wrong(tmp_path):
    refused(f"imagefolder:{tmp_path / 'none'}", "no such folder")
    (tmp_path / "images.zip").write_bytes(b"PK")
    refused(f"imagefolder:{tmp_path / 'images.zip'}", "is a file", "unpack")
    refused(f"imagefolder:{tmp_path}", "no folder `train`")
    (tmp_path / "train" / "ant").mkdir(parents=True)
    refused(f"imagefolder:{tmp_path}", "no images", ".png")
    root = folder(tmp_path / "b")
    (root / "val" / "ant").rename(root / "val" / "ape")
    refused(f"imagefolder:{root}", "different class folders", "extra ape", "missing ant")


# ---- cifar


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


# ---- data sets of the user's own

OWN = """
import torch
from torch.utils.data import TensorDataset

def splits():
    x = torch.randn(40, 3, 4, 4)
    y = torch.arange(40) % 5
    return {"train": TensorDataset(x, y), "test": TensorDataset(x[:7], y[:7])}

def texts():
    return {"val": [({"ids": torch.tensor([i, i])}, i) for i in range(4)]}

def fails():
    raise RuntimeError("no disk")

def odd():
    return {"train": [1, 2, 3], "val": [1]}

def needs(path):
    return path

NUMBER = 3
"""


class Endless(Dataset):
    """Examples without end, as a stream's."""

    def __len__(self) -> int:
        raise TypeError

    def __getitem__(self, index):
        return torch.zeros(3), index % 2


def test_own_data_is_used_as_it_is(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    before = torch.get_rng_state()
    data = load_data(f"{file}:splits")
    assert torch.equal(torch.get_rng_state(), before)
    assert (len(data.train), len(data.val), len(data.test)) == (36, 4, 7)
    assert (data.num_classes, data.input_shape, data.augment) == (5, (1, 3, 4, 4), ())
    assert torch.equal(everything(load_data(f"{file}:splits").train)[0], everything(data.train)[0])
    assert not torch.equal(everything(load_data(f"{file}:splits", seed=1).test)[0], everything(data.test)[0])
    texts = load_data(f"{file}:texts")
    inputs, labels = texts.val.batch([2, 1])
    assert inputs["ids"].tolist() == [[2, 2], [1, 1]]
    assert labels.tolist() == [2, 1]
    assert (texts.train, texts.num_classes, texts.input_shape) == (None, None, None)


def test_a_mapping_of_data_sets_is_data():
    data = load_data({"train": [(torch.zeros(3), i % 2) for i in range(20)]})
    assert isinstance(data, Data)
    assert (len(data.train), len(data.val)) == (18, 2)


class Parity(Dataset):
    """Numbers below ten; a `target_transform`, as of torchvision's data sets, makes two classes of them."""

    def __init__(self, target_transform) -> None:
        self.targets, self.classes = torch.arange(40) % 10, [str(i) for i in range(10)]
        self.target_transform = target_transform

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index):
        return torch.zeros(3), self.target_transform(self.targets[index])


@pytest.mark.parametrize(
    ("transform", "classes"), [(lambda y: y, 10), (lambda y: y % 2, None), (lambda y: y / 9, None)]
)
def test_classes_are_counted_only_where_the_data_set_answers_with_the_labels_that_it_holds(transform, classes):
    assert load_data({"train": Parity(transform)}).num_classes == classes


def test_what_no_split_is_called_is_left_out_and_said(tmp_path, caplog):
    part = [(torch.zeros(3), i % 2) for i in range(20)]
    data = load_data({"train": part, "valid": part, 3: part})
    assert (len(data.train), len(data.val)) == (18, 2)
    assert "--data own: 'valid', 3 left out; splits are train, val, test" in caplog.text
    spec = saved(tmp_path / "a.npz", {**arrays(), "x_valid": np.zeros(3), "mean": np.zeros(3)})
    load_data(spec)
    assert f"--data {spec}: 'x_valid' left out" in caplog.text


def test_own_data_says_what_is_wrong(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    refused(f"{file}:fails", "fails raised RuntimeError: no disk")
    refused(f"{file}:odd", "example 0 is a int", "(input, label)")
    refused(f"{file}:needs", "raised TypeError", "path")
    refused(f"{file}:NUMBER", "is a int, not a function")
    refused(f"{file}:split", "has no 'split'", "did you mean 'splits'")
    refused(f"{tmp_path / 'none.py'}:splits", "there is no file")
    file.write_text("import nothing_like_this\n")
    refused(f"{file}:splits", "raised while it was loaded", "nothing_like_this")
    refused({"training": []}, "'training'", '{"train"')
    refused({"train": [], "val": None}, "is empty")
    refused({"train": None, "test": [1]}, "'train', 'test'", '{"train"')
    refused({"train": Endless()}, "`train`", "its length raised TypeError", "map-style")
    refused(
        {"train": [(torch.zeros(3), torch.zeros(i)) for i in range(9)]}, "can't be put into one batch", "inputs alone"
    )


def test_every_source_is_registered_and_specs_are_checked():
    assert set(DATASETS) == {"digits", "imagefolder", "cifar10", "cifar100", "npz"}
    refused("cifar", "'cifar' is unknown", "cifar10")
    refused("imagefoldr:x", "did you mean 'imagefolder'")
    refused("imagefolder", "imagefolder:PATH")
    refused("digits:x", "write digits")
    refused("digits", "--mean", "fixes it", mean=(0.5,))
    refused("digits", "--input-size", input_size=(0, 3))


def test_normalization_is_checked(tmp_path):
    spec = saved(tmp_path / "a.npz", arrays())
    refused(spec, "--mean has 2 values", "3 channels", mean=(0.1, 0.2))
    refused(spec, "--std", "above 0", std=(0.0,))
    refused(spec, "--mean", "finite", mean=(float("nan"),))
