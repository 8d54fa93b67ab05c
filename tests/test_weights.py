"""Weights come back as they went out; files that are not weights are refused with a reason and run no code."""

from __future__ import annotations

import os
import pickle

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from amc.architectures import resnet20
from amc.errors import ModelError
from amc.weights import (
    _DTYPES,
    load_weights,
    own_tensors,
    safetensors_size,
    save_weights,
    structure_sha256,
    weights_sha256,
)


def net(inputs=3, hidden=4):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


WRAPPINGS = {
    "bare.pt": lambda state: state,
    "nested.pth": lambda state: {"state_dict": state, "epoch": 3},
    "model.th": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "parallel.pt": lambda state: {"state_dict": {f"module.{name}": t for name, t in state.items()}},
    "old.pt": lambda state: {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_every_common_wrapping_loads(tmp_path, name):
    source, target = net(), net()
    torch.save(WRAPPINGS[name](source.state_dict()), tmp_path / name)
    load_weights(target, tmp_path / name)
    assert weights_sha256(target) == weights_sha256(source)


def test_saved_weights_load_and_equal_weights_give_equal_bytes(tmp_path):
    source, target = resnet20(), resnet20()
    save_weights(source, tmp_path / "a.safetensors")
    load_weights(target, tmp_path / "a.safetensors")
    save_weights(target, tmp_path / "b.safetensors")
    assert weights_sha256(source) == weights_sha256(target)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


def test_tied_weights_are_one_tensor(tmp_path):
    source, target = Tied(), Tied()
    assert list(own_tensors(source)) == ["embed.weight"]
    save_weights(source, tmp_path / "tied.safetensors")
    assert list(safetensors.torch.load_file(tmp_path / "tied.safetensors")) == ["embed.weight"]
    load_weights(target, tmp_path / "tied.safetensors")
    assert torch.equal(target.head.weight, source.embed.weight)
    assert target.head.weight is target.embed.weight


def test_views_of_one_storage_are_kept_apart(tmp_path):
    model = nn.Module()
    base = torch.arange(6.0)
    model.register_buffer("whole", base)
    model.register_buffer("part", base[2:4])
    save_weights(model, tmp_path / "views.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "views.safetensors")
    assert torch.equal(stored["whole"], base)
    assert torch.equal(stored["part"], base[2:4])


def refused(model, path, *words):
    before = weights_sha256(model)
    with pytest.raises(ModelError) as caught:
        load_weights(model, path)
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert weights_sha256(model) == before


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".bin", ".safetensors"])
def test_a_pickle_never_runs(tmp_path, suffix):
    target, path = tmp_path / "touched", tmp_path / f"bomb{suffix}"
    path.write_bytes(pickle.dumps({"state_dict": Bomb(str(target))}))
    refused(net(), path, "can't be read")
    if suffix != ".safetensors":
        torch.save({"state_dict": Bomb(str(target))}, path)
        refused(net(), path, "can't be read", "state_dict()")
    assert not target.exists()


def test_a_pickled_model_is_refused_with_the_way_out(tmp_path):
    torch.save(net(), tmp_path / "model.pt")
    refused(net(), tmp_path / "model.pt", "would run code", "torch.save(model.state_dict(), FILE)")


def test_unreadable_files_are_refused(tmp_path):
    refused(net(), tmp_path / "missing.pt", "no such file")
    (tmp_path / "empty.pt").touch()
    refused(net(), tmp_path / "empty.pt", "0 bytes")
    (tmp_path / "weights.onnx").write_bytes(b"x")
    refused(net(), tmp_path / "weights.onnx", "suffix", ".safetensors")
    save_weights(net(), tmp_path / "cut.safetensors")
    content = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-9])
    refused(net(), tmp_path / "cut.safetensors", "can't be read")
    torch.save([1, 2], tmp_path / "list.pt")
    refused(net(), tmp_path / "list.pt", "no state dict", "list")
    torch.save({"epoch": 3, "weights": net().state_dict()}, tmp_path / "keys.pt")
    refused(net(), tmp_path / "keys.pt", "no state dict", "'epoch', 'weights'")


def test_weights_of_another_model_are_refused_by_name(tmp_path):
    state = net(inputs=5).state_dict()
    del state["3.bias"]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pt")
    refused(net(), tmp_path / "other.pt", "lacks 3.bias", "beside them extra", "0.weight (4, 5), not (4, 3)", "--model")


def test_nan_is_refused(tmp_path):
    state = net().state_dict()
    state["3.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    refused(net(), tmp_path / "nan.pt", "NaN", "3.weight")


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 12), max_size=4)


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(
        NAMES.filter(lambda n: n != "__metadata__"), st.tuples(SHAPES, st.sampled_from(list(_DTYPES))), max_size=8
    )
)
def test_size_is_that_of_the_real_file(tensors):
    real = {name: torch.zeros(shape).to(getattr(torch, dtype)) for name, (shape, dtype) in tensors.items()}
    assert safetensors_size(tensors) == len(safetensors.torch.save(real))


def test_size_of_a_saved_model(tmp_path):
    model = resnet20()
    save_weights(model, tmp_path / "m.safetensors")
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in own_tensors(model).items()}
    assert safetensors_size(shapes) == (tmp_path / "m.safetensors").stat().st_size


@settings(deadline=None)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=6), st.data())
def test_size_never_falls_as_an_axis_grows(lengths, data):
    at = data.draw(st.integers(0, len(lengths) - 1))
    wider = [n + (i == at) for i, n in enumerate(lengths)]
    small, large = ({f"t{i}": ((n, 3), "float32") for i, n in enumerate(ns)} for ns in (lengths, wider))
    assert safetensors_size(small) <= safetensors_size(large)


def test_structure_hash_sees_names_shapes_and_kinds_and_not_values():
    assert structure_sha256(net()) == structure_sha256(net())
    named = nn.Sequential()
    for key, module in zip("abcd", net(), strict=True):
        named.add_module(key, module)
    activated = net()
    activated[2] = nn.GELU()
    hashes = {structure_sha256(model) for model in (net(), net(hidden=5), named, activated)}
    assert len(hashes) == 4


def test_weights_hash_sees_every_value():
    model = net()
    before = weights_sha256(model)
    model[1].running_mean[0] += 1e-6
    assert weights_sha256(model) != before
