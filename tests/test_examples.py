"""Every example runs, in a small form, in a folder of its own, and comes to what it says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import optuna
import pytest
import torch

from amc.weights import save_weights
from search.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_here():
    here = Path(__file__).read_text() + (Path(__file__).parent / "test_importance.py").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in here or path.name in here, f"{path.name} has no test"


def test_own_model_gives_a_smaller_model_that_deploys_with_numpy_and_onnxruntime_alone():
    result = example("own_model").main(epochs=1, trials=2, score_steps=2, finetune_epochs=2)
    assert result.summary["best"]["params"] <= 0.5 * result.summary["dense"]["params"]
    model = result.path / "model.onnx"
    deploy = EXAMPLES / "deploy.py"
    done = subprocess.run([sys.executable, deploy, model], capture_output=True, text=True, check=True)
    session = onnxruntime.InferenceSession(str(model))
    expected = session.run(None, {"input": np.zeros((2, 1, 8, 8), np.float32)})[0].argmax(1)
    assert done.stdout == f"{expected}\n"


def test_deploy_needs_ten_lines_numpy_and_onnxruntime_alone():
    lines = [line for line in (EXAMPLES / "deploy.py").read_text().splitlines() if line.strip()]
    imports = {line.split()[1] for line in lines if line.startswith(("import", "from"))}
    assert len(lines) <= 10
    assert imports == {"sys", "numpy", "onnxruntime"}


def test_own_models_commands_work_as_its_docstring_writes_them(monkeypatch, capsys):
    own = example("own_model")
    torch.manual_seed(0)
    save_weights(own.net(), Path("own_model.safetensors"))
    monkeypatch.syspath_prepend(str(EXAMPLES.parent))
    Path("examples").symlink_to(EXAMPLES)
    spec = ["--model", "examples/own_model.py:net", "--data", "examples/own_model.py:data"]
    assert main(["groups", *spec, "--json"]) == 0
    assert [group["name"] for group in json.loads(capsys.readouterr().out)["groups"]] == ["0.0", "1.0", "2.0"]
    more = ["--weights", "own_model.safetensors", "--budget", "params=0.5", "--out", "runs/own-model"]
    quick = ["--trials", "1", "--score-steps", "1", "--finetune-epochs", "0", "--quiet"]
    assert main(["search", *spec, *more, *quick]) == 0


def test_own_metric_is_what_the_search_maximizes_and_the_result_reports():
    own = example("own_metric")
    result = own.main(steps=30, trials=2)
    best = result.summary["best"]
    assert best["flops"] <= 0.4 * result.summary["dense"]["flops"]
    assert best["accuracy"] == pytest.approx(own.iou(result.model, own.discs(128, seed=2)))
    assert best["test_accuracy"] is None
    assert "mask_iou, search split" in (result.path / "report.html").read_text()


def test_own_training_recovers_candidates_that_no_labels_could():
    result = example("own_training").main(steps=60, trials=3)
    dense, best = result.summary["dense"], result.summary["best"]
    assert best["flops"] <= 0.5 * dense["flops"]
    images = example("own_training").images()
    bilinear = torch.nn.functional.interpolate(images[0][1400:], scale_factor=2, mode="bilinear")
    plain = -10 * torch.log10(torch.nn.functional.mse_loss(bilinear, images[1][1400:])).item()
    assert best["accuracy"] > plain, "better than no network"
    assert result.summary["search"]["metric"] == "psnr"


def test_a_perfect_and_an_empty_mask_score_one_and_zero():
    own = example("own_metric")
    split = own.discs(4, seed=0)
    masks = split.tensors[1]
    perfect = torch.stack([1 - masks, masks], 1).float()
    assert own.iou(lambda images: perfect, split) == 1
    assert own.iou(lambda images: 1 - perfect, split) == 0


def test_another_agent_walks_our_environment_within_the_budget():
    best = example("another_agent").main(episodes=2)
    assert 0 <= best["accuracy"] <= 1
    assert best["costs"]["flops"] <= 316920  # half of the embedded default's


def test_our_sampler_drives_a_study_of_ones_own():
    study = example("own_study").main(trials=3)
    assert [trial.state for trial in study.trials] == [optuna.trial.TrialState.COMPLETE] * 3
    assert study.best_value == max(trial.value for trial in study.trials)
