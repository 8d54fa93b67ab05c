"""Every source gives the same kind of splits, the same ones each time; what is wrong with data is said at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from amc.catalog import DATASETS
from amc.data import Data, hold_out, load_data
from tests.splits import everything, refused

RNG = np.random.default_rng(0)


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
