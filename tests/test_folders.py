"""Folders of images, a class each: what is read, what is left out, and what is said of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amc import folders
from amc.data import load_data
from amc.errors import DataError
from tests.splits import everything, refused


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
