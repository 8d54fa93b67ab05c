"""Every kind of `--model` ends in a module that runs on known inputs, or in one message that names what and why."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from amc.data import load_data
from amc.errors import ModelError
from amc.forward import call
from amc.models import load_model
from amc.weights import save_weights, weights_sha256


def refused(spec, *words, **options):
    with pytest.raises(ModelError) as caught:
        load_model(spec, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)


MODELS = """
import dataclasses
import torch
from torch import nn
import neighbour

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.head = nn.Linear(4, 10)
    def forward(self, image):
        return self.head(self.body(image).mean((2, 3)))

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 4)
        self.example_inputs = (torch.randn(8, 3), torch.randn(8, 5))
    def forward(self, left, right):
        return self.a(left) + self.b(right), left

class Named(Pair):
    def __init__(self):
        super().__init__()
        self.example_inputs = {"right": torch.randn(1, 5), "left": torch.randn(1, 3)}

class Unbatched(nn.Module):
    example_inputs = torch.randn(3, 8)
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 2)
    def forward(self, x):
        return self.mix(x.T)

def fails():
    raise RuntimeError("no such block")

def exits():
    raise SystemExit("usage: train.py")

def nothing():
    return None
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "neighbour.py").write_text("VALUE = 1\n")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('taken for the standard library')\n")
    (tmp_path / "net.py").write_text(MODELS)
    path = list(sys.path)
    yield tmp_path / "net.py"
    sys.path[:] = path
    sys.modules.pop("neighbour", None)


# ---- built-in


def test_built_in_fits_the_data_and_is_the_seeds():
    data = load_data("digits")
    first, again, other = (load_model("digits_resnet", data=data, seed=s) for s in (3, 3, 4))
    assert not first.model.training
    assert [x.shape for x in first.inputs] == [(1, 1, 8, 8)]
    assert first.input_names == ("x",)
    assert weights_sha256(first.model) == weights_sha256(again.model) != weights_sha256(other.model)


def test_built_in_without_data_runs_on_what_it_is_made_for():
    assert load_model("resnet20").inputs[0].shape == (1, 3, 32, 32)
    assert load_model("digits_resnet").inputs[0].shape == (1, 1, 8, 8)
    loaded = load_model("resnet20", input_shape=(1, 2, 16, 24), num_classes=3)
    assert loaded.inputs[0].shape == (1, 2, 16, 24)
    assert call(loaded.model, loaded.inputs).shape == (1, 3)


def test_the_random_numbers_around_it_are_left_alone():
    before = torch.get_rng_state()
    load_model("resnet20")
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_loaded_and_must_fit(tmp_path):
    source = load_model("resnet20", seed=1).model
    save_weights(source, tmp_path / "w.safetensors")
    loaded = load_model("resnet20", weights=tmp_path / "w.safetensors", seed=2)
    assert weights_sha256(loaded.model) == weights_sha256(source)
    refused("resnet20", "conv1.weight (16, 3, 3, 3)", data=load_data("digits"), weights=tmp_path / "w.safetensors")
    refused("resnet56", "lacks layer1.3", weights=tmp_path / "w.safetensors")


def test_unknown_names_are_answered_with_the_nearest():
    refused("resnet21", "'resnet21' is unknown", "did you mean", "'resnet20'", "FILE.py:FACTORY")
    refused("no_such_package.models:net", "there is no module no_such_package.models")


# ---- factories


def test_factory_of_a_file(file):
    loaded = load_model(f"{file}:Net", input_shape=(1, 1, 8, 8), seed=1)
    assert loaded.input_names == ("image",)
    assert weights_sha256(loaded.model) == weights_sha256(
        load_model(f"{file}:Net", data=load_data("digits"), seed=1).model
    )
    module = sys.modules[type(loaded.model).__module__]
    assert module.__name__.startswith("_amc_user_")
    assert sys.path[0] != str(file.parent)
    assert str(file.parent) in sys.path
    sys.modules.pop("colorsys", None)
    importlib.import_module("colorsys")


def test_an_edited_file_is_loaded_anew(file):
    first = type(load_model(f"{file}:Pair").model)
    assert type(load_model(f"{file}:Pair").model) is first
    file.write_text(MODELS + "\n# edited\n")
    assert type(load_model(f"{file}:Pair").model) is not first


def test_files_of_two_folders_each_get_their_own_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for width in (3, 5):
        folder = tmp_path / str(width)
        (folder / "blocks_of_mine").mkdir(parents=True)
        (folder / "blocks_of_mine" / "__init__.py").write_text("from blocks_of_mine.widths import WIDTH\n")
        (folder / "blocks_of_mine" / "widths.py").write_text(f"WIDTH = {width}\n")
        (folder / "late_of_mine.py").write_text(f"WIDTH = {width}\n")
        (folder / "net.py").write_text(
            "from torch import nn\nfrom blocks_of_mine import WIDTH\n"
            "def net():\n    import late_of_mine\n    return nn.Linear(WIDTH, late_of_mine.WIDTH)\n"
        )
    for width in (3, 5, 3):
        weight = load_model(f"{tmp_path / str(width)}/net.py:net", input_shape=(1, width)).model.weight
        assert weight.shape == (width, width)


def test_factory_of_a_module_and_a_module_itself():
    loaded = load_model("amc.architectures:resnet20", input_shape=(1, 3, 32, 32))
    assert loaded.name == "amc.architectures:resnet20"
    own = load_model(nn.Sequential(nn.Linear(4, 2)).train(), input_shape=(1, 4))
    assert own.name == "Sequential"
    assert own.input_names == ("input",)
    assert not own.model.training


def test_a_module_is_found_in_the_current_folder(tmp_path, monkeypatch):
    """An installed command does not have it on its path; a module of Python's comes first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part])
    Path("nets_of_mine.py").write_text("from torch import nn\ndef net(): return nn.Linear(4, 2)\n")
    Path("colorsys.py").write_text("raise ImportError('the wrong one')")
    assert load_model("nets_of_mine:net", input_shape=(1, 4)).name == "nets_of_mine:net"
    sys.modules.pop("colorsys", None)
    importlib.import_module("colorsys")


def test_example_inputs_are_used_at_batch_one(file):
    pair = load_model(f"{file}:Pair")
    assert [x.shape for x in pair.inputs] == [(1, 3), (1, 5)]
    assert pair.input_names == ("left", "right")
    named = load_model(f"{file}:Named")
    assert {key: tuple(x.shape) for key, x in named.inputs.items()} == {"right": (1, 5), "left": (1, 3)}
    assert load_model(f"{file}:Unbatched").inputs[0].shape == (3, 8)


def test_factories_that_fail_are_named(file):
    refused(f"{file}:fails", f"{file}:fails raised RuntimeError: no such block")
    refused(f"{file}:exits", "SystemExit: usage: train.py")
    refused(f"{file}:nothing", "returned a NoneType", "torch.nn.Module")
    refused(f"{file}:Nett", "has no 'Nett'", "did you mean 'Net'")
    refused(f"{file.parent / 'none.py'}:Net", "there is no file")
    refused(f"{file}:Net", "inputs", "unknown", "--input-shape")
    (file.parent / "broken.py").write_text("def net(:\n")
    refused(f"{file.parent / 'broken.py'}:net", "raised while it was loaded", "SyntaxError")


def test_inputs_that_do_not_fit_name_the_innermost_module(file):
    refused(f"{file}:Net", "(1, 3, 32, 32)", "`body.0` (Conv2d)", "to have 1 channels", input_shape=(1, 3, 32, 32))
    refused("vgg16_bn", "`features.", "MaxPool2d", data=load_data("digits"))
    refused("resnet20", "--input-shape 1 0 32 32", input_shape=(1, 0, 32, 32))
    refused("digits_resnet", "contradicts", data=load_data("digits"), input_shape=(1, 3, 32, 32))


def test_a_classifier_must_have_an_output_for_every_class(file, tmp_path):
    import numpy as np

    images = np.zeros((24, 8, 8, 1), dtype=np.uint8)
    for classes in (12, 8):
        np.savez(tmp_path / f"{classes}.npz", x_train=images, y_train=np.arange(24) % classes)
    refused(f"{file}:Net", "10 outputs", "12 classes", data=load_data(f"npz:{tmp_path / '12.npz'}"))
    load_model(f"{file}:Net", data=load_data(f"npz:{tmp_path / '8.npz'}"))  # labels may leave the last classes out
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 100))
    refused(wide, "100 outputs", "10 classes", data=load_data("digits"))


# ---- other libraries


def test_a_library_that_is_missing_or_broken_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    refused("timm:resnet18", "timm", "pip install timm")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    refused("torchvision:resnet18", "torchvision", "pip install torchvision")


@pytest.fixture
def stand_in(monkeypatch):
    def tiny(*, weights, num_classes=1000):
        assert weights is None
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

    def create_model(name, *, pretrained, num_classes=1000, in_chans=3):
        if name != "tiny" or pretrained:
            raise RuntimeError(f"Unknown model ({name})")
        return nn.Sequential(
            nn.Conv2d(in_chans, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
        )

    package, models, timm = (types.ModuleType(n) for n in ("torchvision", "torchvision.models", "timm"))
    package.models, models.tiny, timm.create_model = models, tiny, create_model
    for module in (package, models, timm):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("stand_in")
def test_models_of_torchvision_and_timm():
    data = load_data("digits")
    loaded = load_model("timm:tiny", data=data)
    assert call(loaded.model, loaded.inputs).shape == (1, 10)
    loaded = load_model("torchvision:tiny", input_shape=(1, 3, 16, 16))
    assert call(loaded.model, loaded.inputs).shape == (1, 1000)
    refused("torchvision:tini", "no model 'tini'", "did you mean 'tiny'")
    refused("timm:other", "can't be built", "Unknown model")
    refused("torchvision:tiny", "`0` (Conv2d)", data=data)


VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
}


def test_transformers_from_a_local_folder(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(VIT))
    first, again = (load_model(f"hf:{where}", seed=1) for where in (tmp_path, tmp_path / "config.json"))
    assert weights_sha256(first.model) == weights_sha256(again.model)
    assert type(first.model).__name__ == "ViTForImageClassification"
    assert first.input_names == ("pixel_values",)
    assert first.inputs[0].shape == (1, 3, 8, 8)
    fitted = load_model(f"hf:{tmp_path}", data=load_data("digits"))
    assert call(fitted.model, fitted.inputs).logits.shape == (1, 10)

    first.model.save_pretrained(tmp_path / "saved")
    loaded = load_model(f"hf:{tmp_path / 'saved'}", seed=2)
    assert weights_sha256(loaded.model) == weights_sha256(first.model)


def test_transformers_says_what_is_wrong(tmp_path):
    pytest.importorskip("transformers")
    refused(f"hf:{tmp_path}", "there is no", "config.json", "nothing is downloaded")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_kind"}))
    refused(f"hf:{tmp_path}", "can't be read", "no_such_kind")
    remote = {**VIT, "model_type": "custom", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(remote))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    refused(f"hf:{tmp_path}", "can't be read")
    (tmp_path / "config.json").write_text(json.dumps(VIT))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(f"hf:{tmp_path}", "pytorch_model.bin", "safetensors")


def test_weights_that_lack_layers_are_refused(tmp_path):
    pytest.importorskip("transformers")
    import safetensors.torch

    (tmp_path / "config.json").write_text(json.dumps(VIT))
    load_model(f"hf:{tmp_path}").model.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del state["classifier.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(f"hf:{tmp_path}", "lack classifier.weight")
