"""What runs inside a user's own process leaves it as it was, whatever mode that is in."""

from __future__ import annotations

import logging

import optuna
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import amc
import search

RUN = {"budget": "flops=0.5", "trials": 2, "score_steps": 1, "finetune_epochs": 0}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)
    )


@pytest.fixture
def data():
    split = TensorDataset(torch.randn(32, 1, 8, 8), torch.arange(32) % 2)
    return {"train": split, "val": split, "test": split}


@pytest.fixture
def _three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_three_threads")
def test_torchs_threads_are_the_settings_while_a_problem_evaluates_and_else_the_callers(data):
    seen = []

    def metric(_):
        seen.append(torch.get_num_threads())
        return 0.5

    problem = search.build(model=net(), data=data, budget="flops=0.5", threads=2, score_steps=1, metric=metric)
    assert torch.get_num_threads() == 3
    problem.evaluate(problem.admit([4, 4]))
    assert (seen, torch.get_num_threads()) == ([2], 3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_what_one_with_them_gets(data, mode, tmp_path):
    dense = net()

    def figures(name: str):
        problem = search.build(model=dense, data=data, budget="flops=0.5", score_steps=3)
        result = search.run(model=dense, data=data, out=tmp_path / name, **RUN)
        slim = amc.apply(dense, result.policy)
        return problem.evaluate(problem.admit([4, 4])), result.policy.widths, slim(torch.ones(1, 1, 8, 8)).tolist()

    expected = figures("with")
    with mode():
        assert figures("without") == expected
        assert not torch.is_grad_enabled()


def test_a_run_logs_to_its_file_and_shows_the_callers_handlers_no_more_than_before(data, tmp_path):
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    root, level, verbosity = logging.getLogger(), logging.getLogger().level, optuna.logging.get_verbosity()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    try:
        search.run(model=net(), data=data, out=tmp_path / "run", **RUN)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    mine = [record for record in records if record.name == "amc"]
    assert {record.levelno for record in mine} <= {logging.WARNING}
    assert "trial 2:" in (tmp_path / "run" / "run.log").read_text()
    assert (logging.getLogger("amc").level, logging.getLogger("amc").propagate) == (logging.NOTSET, True)
    assert optuna.logging.get_verbosity() == verbosity


@pytest.mark.parametrize("reward", ["soft_accuracy", "accuracy", "amc_flops"])
def test_only_the_soft_reward_counts_what_is_finer_than_the_accuracy(data, reward):
    problem = search.build(model=net(), data=data, budget="flops=0.5", score_steps=3, reward=reward)
    outcome = problem.evaluate(problem.admit([4, 4]))
    assert (outcome.score == outcome.accuracy) == (reward != "soft_accuracy")
    assert (outcome.reward == outcome.score) == (reward != "amc_flops")
