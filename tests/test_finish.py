"""The final fine-tune: no less than what the search scored, whatever the data's size."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import search
from amc.data import Data
from amc.errors import DataError, SearchFailed, UsageError
from amc.finetune import rounded_to
from benchmarks.faults.tiny import net
from search.recovery import check_recovery
from search.settings import Settings
from tests.test_display import OWN

TINY = Path(__file__).parent.parent / "benchmarks" / "faults" / "tiny.py"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_final_fine_tune_as_short_as_a_score_comes_to_the_score_and_says_that_it_is_short(here, caplog):
    """Batch norm's running averages would be those of the dense model still."""
    named = {"model": f"{TINY}:net", "data": f"{TINY}:data", "threads": 1, "budget": "flops=0.5"}
    result = search.run(**named, strategy="uniform", score_steps=6, finetune_epochs=2, out="run")
    (trial,) = search_trials(Path("run"))
    assert result.summary["best"]["accuracy"] == pytest.approx(trial)
    assert "the final fine-tune is short: 6 steps, from 256 examples in batches of 128" in caplog.text
    assert json.loads(Path("run/result.json").read_text())["best"]["accuracy"] == result.summary["best"]["accuracy"]


def test_a_run_s_precision_is_that_of_both_fine_tunings(here, monkeypatch):
    seen = []

    def noted(precision, device):
        seen.append(precision)
        return rounded_to(precision, device)

    monkeypatch.setattr("amc.finetune.rounded_to", noted)
    named = {"model": f"{TINY}:net", "data": f"{TINY}:data", "threads": 1, "budget": "flops=0.5", "strategy": "uniform"}
    result = search.run(**named, precision="bfloat16", score_steps=3, finetune_epochs=2, out="run")
    assert seen == [torch.bfloat16] * (3 + 2 * 2)  # a policy's score, and 256 examples in batches of 128
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("worths", [[float("nan")], [0.5, 0.5, float("nan")]])
def test_a_metric_that_is_no_number_at_the_start_or_the_end_is_told(here, worths):
    """At the end the run is kept: what was searched can be gone on with."""
    at_the_start, told = len(worths) == 1, iter(worths)
    named = {"model": f"{TINY}:net", "data": f"{TINY}:data", "threads": 1, "budget": "flops=0.5", "strategy": "uniform"}
    with pytest.raises(UsageError if at_the_start else SearchFailed, match="is nan; it must be a number"):
        search.run(**named, score_steps=0, finetune_epochs=0, metric=lambda model: next(told, worths[-1]), out="run")
    assert Path("run").exists() == (not at_the_start)


@pytest.mark.parametrize("odd", ["test", "train"])
def test_a_split_that_cannot_be_read_is_known_before_the_search(here, odd):
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label in "ab":
            Path("images", split, label).mkdir(parents=True)
            for i in range(8):
                size = 9 if (split, label, i) == (odd, "b", 7) else 8
                image = Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8))
                image.save(Path("images", split, label, f"{i}.png"))
    Path("own.py").write_text(OWN)
    with pytest.raises(DataError, match=f"{odd}/b/7.png is 9x9, but other images are 8x8; give --input-size"):
        search.run(model="own.py:net", data="imagefolder:images", budget="flops=0.5", calibration_images=1, out="run")
    assert not Path("run").exists()


@pytest.mark.parametrize("guesses", [True, False])
def test_a_dense_model_that_guesses_is_told(here, caplog, guesses):
    model, images = net().eval(), torch.randn(200, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 4 if guesses else model(images).argmax(1)
    data = {split: TensorDataset(images, labels) for split in ("train", "val")}
    search.run(model=model, data=data, threads=1, budget="flops=0.5", strategy="uniform", score_steps=0, out="run")
    assert ("the dense model guesses" in caplog.text) == guesses


def test_a_damaged_first_image_does_not_hide_that_there_are_labels():
    split = SimpleNamespace(labels=np.zeros(3, np.int64), batch=None)
    data = Data("x", split, split, None, 2, "")
    check_recovery(Settings(), data, None, None)


def search_trials(run: Path) -> list[float]:
    from search.finished import read_trials

    return [trial.accuracy for trial in read_trials(run / "study.db")]
