"""The final fine-tune: no less than what the search scored, whatever the data's size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import search

TINY = Path(__file__).parent.parent / "benchmarks" / "faults" / "tiny.py"


@pytest.fixture
def here(momentary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_final_fine_tune_as_short_as_a_score_comes_to_the_score_and_says_that_it_is_short(here, caplog):
    """Batch norm's running averages would be those of the dense model still."""
    named = {"model": f"{TINY}:net", "data": f"{TINY}:data", "threads": 1, "budget": "flops=0.5"}
    result = search.run(**named, strategy="uniform", score_steps=6, finetune_epochs=2, out="run")
    (trial,) = search_trials(Path("run"))
    assert result.summary["best"]["accuracy"] == pytest.approx(trial)
    assert "the final fine-tune is short: 6 steps, from 256 examples in batches of 128" in caplog.text
    assert json.loads(Path("run/result.json").read_text())["best"]["accuracy"] == result.summary["best"]["accuracy"]


def search_trials(run: Path) -> list[float]:
    from search.finished import read_trials

    return [trial.accuracy for trial in read_trials(run / "study.db")]
