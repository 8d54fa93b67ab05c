"""The embedded default is trained once, kept, and the same every time."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import search
from amc import pretrain
from amc.data import load_data
from amc.errors import BudgetError, ModelError
from amc.pretrain import Recipe, pretrained
from amc.weights import weights_sha256


@pytest.fixture
def quick(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setitem(pretrain.RECIPES, "digits_resnet", Recipe(epochs=1, lr=0.05, batch=256, weight_decay=1e-4))
    return tmp_path / "cache"


def steps(**options):
    """The weights' hash and how often progress was reported."""
    calls = []
    model = pretrained("digits_resnet", load_data("digits"), progress=lambda *at: calls.append(at), **options)
    assert not model.training
    return weights_sha256(model), len(calls)


@pytest.mark.usefixtures("quick")
def test_it_is_trained_once_and_then_read():
    first, trained = steps()
    assert trained == 4
    assert steps() == (first, 0)
    other, trained = steps(seed=1)
    assert trained == 4
    assert other != first


def test_it_does_not_depend_on_threads_or_on_the_random_numbers_around_it(quick):
    first, _ = steps()
    for file in quick.glob("*.safetensors"):
        file.unlink()
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    torch.rand(7)
    before = torch.get_rng_state()
    try:
        assert steps() == (first, 4)
        assert torch.get_num_threads() == 3 - min(threads, 2)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_recipe_is_another_file(quick, monkeypatch):
    steps()
    monkeypatch.setattr(pretrain.inspect, "getsource", lambda _: "edited")
    assert steps()[1] == 4
    assert len(list(quick.glob("*.safetensors"))) == 2


def test_a_damaged_file_is_written_again(quick):
    first, _ = steps()
    (file,) = quick.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert steps() == (first, 4)
    assert steps() == (first, 0)


def test_without_a_cache_it_still_trains(quick):
    quick.write_text("a file where the folder should be")
    assert steps()[1] == 4


def test_a_model_without_a_recipe_asks_for_weights():
    with pytest.raises(ModelError, match=r"resnet20 has no recipe.*--weights"):
        pretrained("resnet20", load_data("digits"))


RACE = """
import sys
import search
from amc import pretrain
from amc.data import load_data
from amc.weights import weights_sha256
pretrain.RECIPES["digits_resnet"] = pretrain.Recipe(epochs=2, lr=0.05, batch=256, weight_decay=1e-4)
calls = []
model = pretrain.pretrained("digits_resnet", load_data("digits"), progress=lambda *at: calls.append(at))
print(weights_sha256(model), len(calls))
"""


def test_two_processes_at_once_train_once(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", RACE], stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(2)
    ]
    results = [process.communicate()[0].split() for process in processes]
    assert results[0][0] == results[1][0]
    assert sorted(int(count) for _, count in results) == [0, 8]


def test_the_default_is_accurate():
    data = load_data("digits")
    model = pretrained("digits_resnet", data)
    for split in (data.val, data.test):
        images, labels = split.batch(np.arange(len(split)))
        with torch.no_grad():
            assert (model(images).argmax(1) == labels).float().mean() > 0.97


def test_a_budget_out_of_reach_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pretrain, "_train", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(BudgetError, match="lowest reachable: flops="):
        search.build(budget="flops=0.00001")
