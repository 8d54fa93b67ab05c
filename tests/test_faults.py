"""What goes wrong, goes wrong for itself: memory, a hung or crashed evaluation, a diverged fine-tune, hostile files."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from amc import evaluate as evaluate_module
from amc import finetune as finetune_module
from amc.errors import DataError, UsageError
from amc.files import disk_trouble, read_json
from amc.finetune import Diverged
from amc.memory import split
from amc.weights import save_weights
from benchmarks.faults import hostile
from benchmarks.faults.soak import soak
from benchmarks.faults.tiny import data, net
from search import finish as finish_module
from search.child import Isolated, settings_of_worker
from search.compose import check_device, compose
from search.display import Display
from search.executor import EvaluationFailed
from search.finish import recover
from search.job import run
from search.run_directory import owned
from search.settings import Settings
from search.strategies import make_sampler
from search.study import open_study, search

TINY = Path(__file__).parent.parent / "benchmarks" / "faults" / "tiny.py"
SETTINGS = Settings(
    model=f"{TINY}:net", data=f"{TINY}:data", budget=("flops=0.5",), score_steps=1, finetune_epochs=1, threads=1
)


@pytest.fixture(scope="module")
def setup():
    return compose(SETTINGS)


@pytest.fixture(scope="module")
def weights(setup, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    save_weights(setup.loaded.model, path)
    return path


def middle(setup) -> dict[str, int]:
    return setup.problem.named(setup.problem.admit([group.channels // 2 for group in setup.problem.groups]))


# ---- memory


def test_where_memory_runs_out_the_batch_is_halved(setup, monkeypatch, caplog):
    sizes = []
    real = evaluate_module.train

    def train(model, batches, **more):
        sizes.append(len(batches[0][1]))
        if sizes[-1] > 40:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 PB")
        return real(model, batches, **more)

    monkeypatch.setattr(evaluate_module, "train", train)
    assert 0 <= setup.evaluator(middle(setup)).accuracy <= 1
    assert sizes == [128, 64, 32]
    assert "out of memory at 1/2 of the batch size" in caplog.text


def test_where_memory_runs_out_anchors_and_the_result_take_smaller_batches_too(setup, tmp_path, monkeypatch):
    sizes = []
    real = finetune_module.train

    def train(model, batches, *, steps, **more):
        first = next(iter(batches))
        sizes.append((len(first[1]), steps))
        if sizes[-1][0] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, [first], steps=1, **more)

    monkeypatch.setattr(evaluate_module, "train", train)
    monkeypatch.setattr(finetune_module, "train", train)
    assert 0 <= setup.evaluator.recovered(middle(setup), 3).accuracy <= 1
    assert sizes == [(128, 3), (64, 6), (32, 12)]
    sizes.clear()
    slim = recover(setup, "search", middle(setup), tmp_path, Display(quiet=True))
    assert [size for size, _ in sizes] == [128, 64, 32]
    assert sizes[2][1] == 4 * sizes[0][1]
    assert 0 <= slim.accuracy <= 1


def test_where_even_small_batches_are_too_much_the_trial_fails(setup, monkeypatch):
    def train(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluate_module, "train", train)
    study = open_study(None, "x", make_sampler("random", setup.problem, trials=2, seed=0))
    found = search(setup.problem, study, trials=2)
    assert (found.trials, found.failed) == (0, 2)
    assert study.trials[0].user_attrs["error"] == "OutOfMemoryError: CUDA out of memory"


def test_another_runtime_error_is_not_taken_for_a_lack_of_memory(setup, monkeypatch):
    calls = []

    def train(*_, **__):
        calls.append(1)
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(evaluate_module, "train", train)
    with pytest.raises(RuntimeError, match="shapes differ"):
        setup.evaluator(middle(setup))
    assert len(calls) == 1


def test_parts_of_a_batch_hold_all_of_it_whatever_the_inputs_are():
    x, y = torch.arange(10.0).view(10, 1), torch.arange(10)
    for inputs in (x, {"a": x, "b": x}, (x, [x, x])):
        parts = split([(inputs, y)], 4)
        assert torch.equal(torch.cat([labels for _, labels in parts]), y)
        assert len(parts) == 4
    assert torch.equal(torch.cat([inputs["b"] for inputs, _ in split([({"a": x, "b": x}, y)], 2)]), x)
    assert len(split([(x, y)], 8)) == 1  # a batch norm needs two examples


# ---- evaluation in a child


def test_a_child_scores_a_policy_as_this_process_does(setup, weights):
    isolated = Isolated(SETTINGS, weights)
    try:
        assert isolated(middle(setup)) == setup.evaluator(middle(setup))
        os.kill(isolated._child.pid, 11)  # a segfault in some kernel, say
        with pytest.raises(EvaluationFailed, match="was killed by SIGSEGV"):
            isolated(middle(setup))
        with pytest.raises(EvaluationFailed, match="KeyError"):
            isolated({"nothing": 1})
        isolated.start()
        os.kill(isolated._child.pid, signal.SIGSTOP)  # a score that never comes, however busy this process is
        isolated._timeout = 1e-6
        with pytest.raises(EvaluationFailed, match="longer than --trial-timeout"):
            isolated(middle(setup))
        assert isolated._child is None
    finally:
        isolated.close()


def test_a_child_asks_for_no_device(setup):
    """It may be away, and a child only scores."""
    away = settings_of_worker(replace(SETTINGS, device="ssh://nobody@127.0.0.1:9", latency_providers=("cuda",)))
    check_device(away)
    assert away.model == SETTINGS.model


def test_a_child_ends_with_its_parent(weights):
    code = (
        "import sys; from pathlib import Path; from tests.test_faults import SETTINGS; "
        "from search.child import Isolated; i = Isolated(SETTINGS, Path(sys.argv[1])); i.start(); "
        "print(i._child.pid, flush=True); import os; os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, weights], cwd=root, capture_output=True, text=True, check=False)
    while lives(int(done.stdout)):
        time.sleep(0.02)


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_objects_can_not_be_evaluated_in_a_child(tmp_path):
    with pytest.raises(UsageError, match="--isolate"):
        run(model=net(), data=data(), budget="flops=0.5", isolate=True, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---- fine-tuning


def test_a_diverged_fine_tune_is_repeated_at_a_lower_rate_and_then_left_out(setup, tmp_path, monkeypatch, caplog):
    rates = []

    def finetune(model, *_, lr, **__):
        rates.append(lr)
        nn.init.constant_(next(model.parameters()), float("nan"))
        raise Diverged("the training loss became nan")

    monkeypatch.setattr(finish_module, "finetune", finetune)
    candidate = recover(setup, "search", middle(setup), tmp_path, Display(quiet=True))
    assert rates == [0.02, 0.002]
    assert all(torch.isfinite(tensor).all() for tensor in candidate.model.state_dict().values())
    assert "is not fine-tuned" in caplog.text


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_beyond_the_models_classes_ends_the_run_by_name(tmp_path, label):
    splits = {name: list(zip(*part.tensors, strict=True)) for name, part in data().items()}
    splits["train"][40] = (splits["train"][40][0], torch.tensor(label))  # the first few are looked at before
    with pytest.raises(DataError, match=f"the label {label} is none of the model's 4 classes, which are 0 to 3"):
        run(model=net(), data=splits, budget="flops=0.5", trials=3, score_steps=2, out=tmp_path / "run")


# ---- many trials


def test_memory_stays_level_over_many_trials(tmp_path):
    """A small form of `benchmarks/faults/soak.py`."""
    found = soak(tmp_path, "random", 60)
    assert found["trials"] == 60
    assert found["grew_mb"] < 50


# ---- files


def test_a_hundred_mutated_files_are_read_or_refused(tmp_path):
    """A small form of `benchmarks/faults/hostile.py`, which also holds each to a second."""
    originals, work = tmp_path / "originals", tmp_path / "work"
    originals.mkdir()
    work.mkdir()
    hostile.make_originals(originals)
    found = hostile.campaign(originals, work, count=104, seed=1, most_seconds=60)
    assert found["kinds"] == len(hostile.readers())
    assert found["refused"] > 52


def test_json_is_refused_where_readers_disagree(tmp_path):
    path = tmp_path / "x.json"
    for text, says in [
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "Infinity"),
        ("[1e999]", "out of range"),
        ("[" * 10**5, "nested too deeply"),
        ('"' + "x" * 100 + '"', "larger than 64"),
        ("\udc80", "utf-8"),
        ("", "Expecting value"),
    ]:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=says):
            read_json(path, limit=64 if len(text) == 102 else 2**20)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path / "pipe.json")


def test_trouble_with_the_disk_is_known_by_its_cause():
    error = RuntimeError("could not export")
    error.__cause__ = OSError(28, "No space left on device")
    assert disk_trouble(error) == "the disk is full"
    assert disk_trouble(sqlite3.OperationalError("database or disk is full")) == "the disk is full"
    assert disk_trouble(ValueError("something else")) is None


def test_a_log_that_can_not_be_written_says_nothing(tmp_path, capsys):
    with owned(tmp_path / "run", resume=False):
        handler = logging.getLogger("amc").handlers[-1]
        assert isinstance(handler, logging.FileHandler)
        handler.stream.close()
        handler.stream = Path("/dev/full").open("w")  # noqa: SIM115
        logging.getLogger("amc").info("lost")
    assert capsys.readouterr().err == ""


def test_cma_es_proposes_whole_widths(setup):
    problem = setup.problem
    study = open_study(None, "x", make_sampler("cmaes", problem, trials=12, seed=0))
    search(problem, study, trials=12)
    assert all(isinstance(width, int) for trial in study.trials for width in trial.params.values())
    assert np.isfinite([trial.value for trial in study.trials]).all()
