"""A latency budget is met as measured: on a made-up device that the table misjudges, or that is busy at the end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import search
from amc.budget import Budget
from amc.errors import DeviceError, ModelError
from amc.export import export_onnx
from amc.policy import load_policy
from latency import build_table
from latency.device import LocalDevice
from latency.paired import pooled, summarize
from latency.session import read_model
from search.conclude import _winner
from search.finish import Candidate, measure_latency
from search.rounds import _Rounds
from search.settings import Settings
from search.settle import FINALISTS, ranked, settle, within
from search.strategies.moves import starts
from search.study import SearchResult, open_study
from search.study import search as search_loop
from tests.synthetic import staged

QUICK = {
    "strategy": "random",
    "trials": 6,
    "score_steps": 0,
    "finetune_epochs": 0,
    "calibration_images": 16,
    "score_images": 0,
}


class MadeUp(LocalDevice):
    """Takes the time that the model's convolutions need, all of them in proportion to their weights.

    whole: power of the relative time of a model that is measured for longer than a table's sample. busy: calls that
    measure files on disk, the last of a run, and are disturbed.
    """

    name = "made up"

    def __init__(self, *, whole: float = 1.0, busy: int = 0) -> None:
        self.whole, self.busy, self.rng, self.finals = whole, busy, np.random.default_rng(0), 0

    def measure(self, models, **options):
        final = isinstance(models["dense"], Path)
        self.finals += final
        disturbed = final and self.finals <= self.busy
        dense, found = self.work(models["dense"]), {}
        for name, model in models.items():
            ratio = (self.work(model) / dense) ** (self.whole if "passes" not in options else 1.0)
            noise = np.exp(self.rng.normal(0, 0.003, (5, 40, 2)))
            if disturbed and name != "dense":
                noise[..., 1] *= 1.3
            found[name] = summarize(noise * [1.0, ratio])
        return found

    def profile(self, model, **options):
        return []

    @staticmethod
    def work(model) -> float:
        tensors = onnx.load_from_string(read_model(model)).graph.initializer
        return 100 + sum(math.prod(tensor.dims) for tensor in tensors if len(tensor.dims) == 4)


def net() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for into, out in ((3, 16), (16, 24), (24, 24), (24, 16)):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def test_a_limit_that_the_table_misjudges_is_met_as_measured(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    few = {"samples": 40, "held_out": 4}
    monkeypatch.setattr("search.bench.build_table", lambda *a, **o: build_table(*a, **{**o, **few}))
    device = MadeUp(whole=0.8)
    for module in ("search.bench", "search.finish"):
        monkeypatch.setattr(f"{module}.open_device", lambda text: device)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 3, 8, 8, generator=generator), torch.randint(0, 4, (64,), generator=generator))
    result = search.run(model=net(), data={"train": data, "val": data}, budget="latency=0.6", **QUICK)
    summary = result.summary
    [limit] = summary["budget"]
    assert limit["met"]
    assert limit["achieved"] <= limit["limit"]
    assert summary["search"]["trials"] > QUICK["trials"], "the search went on under the corrected table"
    assert 1 / summary["best"]["speedup"] > 0.5, "and did not give away more than it had to"
    assert device.finals == 1
    [written] = load_policy(result.path / "policy.json").budget
    assert (written.fraction, written.limit, written.achieved) == (0.6, None, None), "nothing measured"


@pytest.mark.parametrize(("alone", "wins"), [(False, "uniform"), (True, "search")])
def test_a_uniform_policy_that_was_not_measured_within_the_limit_does_not_win(alone, wins):
    best, uniform = (Candidate(source, {}, nn.Identity(), worth, None) for source, worth in SCORES_AT_THE_END)
    found = SearchResult(None, 1, 0, 0.0, 0.0, alone=alone)
    assert _winner(Settings(), found, best, uniform).source == wins


SCORES_AT_THE_END = (("search", 0.5), ("uniform", 0.6))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """A dense model's file, and one of about half its latency."""
    folder = tmp_path_factory.mktemp("files")
    paths = folder / "dense.onnx", folder / "best.onnx"
    for path, channels in zip(paths, (32, 23), strict=True):
        export_onnx(
            nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, channels, 3)), (torch.zeros(1, 3, 8, 8),), path
        )
    return paths


def setup_of(device: Any) -> SimpleNamespace:
    limit = SimpleNamespace(cost=SimpleNamespace(name="latency"), fraction=0.6)
    return SimpleNamespace(
        settings=Settings(),
        problem=SimpleNamespace(budget=SimpleNamespace(limits=[limit])),
        bench=SimpleNamespace(device=device),
    )


def measured_at_the_end(device: MadeUp, dense: Path, best: Path):
    setup = setup_of(device)
    return measure_latency(setup, dense, {"best": best})["best"], setup.problem.budget.limits[0]


def test_a_device_that_is_busy_at_the_end_is_measured_again(files):
    device = MadeUp(busy=1)
    reading, limit = measured_at_the_end(device, *files)
    assert device.finals == 2
    assert within(reading, limit)


def test_a_device_that_stays_busy_is_believed(files, caplog):
    device = MadeUp(busy=10)
    reading, limit = measured_at_the_end(device, *files)
    assert device.finals == 3
    assert not within(reading, limit)
    assert reading.rounds == 3 * 200, "all that was timed counts"
    assert "still above the limit" in caplog.text


def test_what_the_device_cannot_run_is_not_measured_and_the_rest_is_kept(files, caplog):
    def measure(models, **options):
        raise ModelError("ONNX Runtime has no kernel for it")

    assert measure_latency(setup_of(SimpleNamespace(measure=measure)), files[0], {"best": files[1]}) == {}
    assert "latency was not measured: ONNX Runtime has no kernel" in caplog.text


def test_a_further_round_takes_a_fifth_of_the_first_ones_trials(monkeypatch):
    """However many were planned: of a search that its time limit ended there are fewer."""
    asked = []
    reading = SimpleNamespace(ratio=0.7, ratio_ci95=(0.69, 0.71))
    setup = setup_of(SimpleNamespace())
    setup.bench.measures, setup.bench.measure = True, lambda policies: dict.fromkeys(policies, reading)
    setup.bench.corrected = lambda readings: setup.bench
    setup.problem.widths = tuple
    for name, value in (("finalists", []), ("uniform_policy", (3,)), ("with_bench", setup)):
        monkeypatch.setattr(f"search.settle.{name}", lambda *_, value=value: value)

    def search_round(setup, trials, seconds):
        asked.append((trials, seconds))
        return SimpleNamespace(trials=10 if trials is None else trials - 1, failed=1, best=SimpleNamespace(widths=(2,)))

    setup.settings = Settings(time_limit=60.0)
    settle(setup, None, search_round)
    assert asked == [(None, 60.0), *((11 + 2 * i, None) for i in range(1, 7))]


def test_a_further_round_starts_from_the_best_policies_as_far_as_the_corrected_budget_lets_them():
    problem, _ = staged(2)
    state = SimpleNamespace(
        _settings=Settings(strategy="evolution", trials=20), _planned=problem, _front=None, study=None
    )
    first = _Rounds._sampler(state, problem)
    state.study = open_study(None, "test", first)
    search_loop(problem, state.study, trials=12)
    limits = [replace(limit, value=0.9 * limit.value) for limit in problem.budget.limits]
    corrected = problem.under(Budget(problem.groups, limits), problem.costs)

    further = _Rounds._sampler(state, corrected)
    best = [corrected.admit(corrected.widths(one.widths)) for one in ranked(problem, state.study)[:FINALISTS]]
    assert not {*best} & {*starts(corrected)}, "the uniform and the tilted policies are not what is begun with"
    state.study.sampler = further
    search_loop(corrected, state.study, trials=12 + FINALISTS)
    assert [corrected.widths(trial.params) for trial in state.study.trials[12:]] == best


@pytest.mark.parametrize(
    ("slow", "rewards", "rounds", "chosen"),
    [
        ((), {}, 1, 3),
        ((3,), {}, 1, 2),
        ((3, 2, 1), {}, 2, 9),
        ((3,), {3: 0.1}, 2, 9),  # much better than what is within the limit: worth another round
        ((3,), {3: 0.1, 2: 0.08}, 2, 2),  # which found nothing better than what was
        ((3, 9), {3: 0.1, 9: 0.05}, 7, 2),  # and what is within the limit is not lost in the end
        (("uniform",), {}, 1, 3),
        ((), {3: 0.1, 2: 0.15}, 1, 3),  # what was chosen by longer fine-tunes gives way to no luckier score
    ],
)
def test_the_best_finalist_that_is_within_the_limit_is_what_was_found(monkeypatch, slow, rewards, rounds, chosen):
    """Where the uniform policy alone is above it, nothing is searched for again."""
    asked, corrections = [], []

    def reading(widths):
        above = "uniform" in slow and not corrections if widths == (5,) else widths[0] in slow
        return SimpleNamespace(ratio=0.7 if above else 0.55, ratio_ci95=(0.5, 0.71 if above else 0.56))

    def corrected(readings):
        corrections.append(readings)
        return setup.bench

    def search_round(setup, trials, seconds):
        asked.append(trials)
        return SearchResult(outcome(3 if len(asked) == 1 else 9), 10, 0, 1.0, 1.0)

    def outcome(width):
        return SimpleNamespace(widths=(width,), reward=1 + rewards.get(width, width / 1000))

    setup = setup_of(None)
    setup.bench = SimpleNamespace(
        measures=True, measure=lambda policies: {widths: reading(widths) for widths in policies}, corrected=corrected
    )
    setup.problem.widths, setup.problem.budget.met = tuple, lambda widths: not corrections or widths[0] > 4
    monkeypatch.setattr("search.settle.outcomes", lambda *_: [outcome(width) for width in (1, 2, 3)])
    monkeypatch.setattr("search.settle.uniform_policy", lambda *_: (5,))
    monkeypatch.setattr("search.settle.with_bench", lambda *_: setup)
    _, found = settle(setup, None, search_round)
    assert found.best.widths == (chosen,)
    assert len(asked) == rounds
    assert bool(corrections) == (rounds > 1 or "uniform" in slow)


def test_what_was_within_the_limit_is_kept_where_the_device_fails_later(monkeypatch):
    setup, calls = setup_of(None), []

    def measure(policies):
        calls.append(policies)
        if len(calls) > 1:
            raise DeviceError("gone")
        return {
            widths: SimpleNamespace(ratio=0.6, ratio_ci95=(0.5, 0.7 if widths == (2,) else 0.6)) for widths in policies
        }

    best, other = SimpleNamespace(widths=(2,), reward=0.9), SimpleNamespace(widths=(1,), reward=0.5)
    setup.bench = SimpleNamespace(measures=True, measure=measure, corrected=lambda readings: setup.bench)
    setup.problem.widths = tuple
    for name, value in (("finalists", [other]), ("uniform_policy", (3,)), ("with_bench", setup)):
        monkeypatch.setattr(f"search.settle.{name}", lambda *_, value=value: value)
    _, found = settle(setup, None, lambda *_: SearchResult(best, 10, 0, 1.0, 1.0))
    assert found.best is other
    assert found.alone, "the uniform policy was not measured within the limit"
    assert len(calls) == 2


def test_readings_of_the_same_model_are_pooled():
    rng = np.random.default_rng(0)
    one, other = (summarize(np.exp(rng.normal(0, 0.01, (5, 40, 2))) * [1.0, 0.7]) for _ in range(2))
    both = pooled([one, other])
    assert both.rounds == one.rounds + other.rounds
    assert min(one.ratio, other.ratio) <= both.ratio <= max(one.ratio, other.ratio)
    low, high = both.ratio_ci95
    assert high - low < max(reading.ratio_ci95[1] - reading.ratio_ci95[0] for reading in (one, other))
