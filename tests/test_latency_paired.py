"""Ratios and intervals from given times, where the answer is known; of the timing loop on models, only its form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from amc.errors import DeviceError, ModelError, UsageError
from latency import measure, paired, worker
from tests.test_latency_session import GOOD, model


def passes(
    factor: float, *, noise: float = 0.02, speed: tuple[float, ...] = (1.0, 1.0, 1.0), rounds: int = 60, seed: int = 0
):
    """Times of a baseline of 2 ms and a model of `factor` of that, on a machine that slows both to `speed`."""
    rng = np.random.default_rng(seed)
    made = []
    for slow in speed:
        shared = slow * np.exp(0.1 * rng.standard_normal(rounds))  # what slows one slows the other
        own = np.exp(noise * rng.standard_normal((rounds, 2)))
        made.append([[2 * s * a, 2 * factor * s * b] for s, (a, b) in zip(shared, own, strict=True)])
    return made


def test_the_ratio_survives_what_slows_both():
    reading = paired.summarize(passes(0.6, speed=(1.0,) * 5))
    assert reading.ratio == pytest.approx(0.6, rel=0.01)
    low, high = reading.ratio_ci95
    assert low <= reading.ratio <= high
    assert high - low < 0.02
    assert reading.speedup == pytest.approx(1 / reading.ratio)
    assert reading.speedup_ci95 == (pytest.approx(1 / high), pytest.approx(1 / low))
    assert reading.min_ms <= reading.median_ms <= reading.p95_ms
    assert 60 < reading.rounds <= 300


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        low, high = paired.summarize(passes(0.8, noise=0.05, rounds=30, seed=seed)).ratio_ci95
        covered += low <= 0.8 <= high
    assert covered >= 88


def test_the_interval_is_of_the_ratio_where_passes_differ_in_length():
    rng = np.random.default_rng(0)
    lengths = [(400, 0.61), *[(20, 0.58)] * 8]
    times = [np.exp(rng.normal(0, 0.01, (count, 2))) * [1.0, ratio] for count, ratio in lengths]
    reading = paired.summarize(times)
    assert reading.ratio_ci95[0] <= reading.ratio <= reading.ratio_ci95[1]


def test_the_interval_knows_that_rounds_of_one_pass_share_its_luck():
    covered = 0
    for seed in range(100):
        luck = np.exp(0.01 * np.random.default_rng(1000 + seed).standard_normal(5))
        times = [passes(0.8 * shift, speed=(1.0,), seed=seed * 10 + i)[0] for i, shift in enumerate(luck)]
        low, high = paired.summarize(times).ratio_ci95
        covered += low <= 0.8 <= high
    assert covered >= 88


def test_outliers_do_not_move_the_ratio():
    times = passes(0.5)
    for rounds in times:
        for pair in rounds[::7]:
            pair[1] *= 20
    assert paired.summarize(times).ratio == pytest.approx(0.5, rel=0.02)


def test_a_reading_whose_baseline_drifted_is_taken_again_and_the_steadier_one_counts():
    calls = []
    steady, drifting = passes(0.5, noise=0.005), passes(0.7, speed=(1.0, 1.5, 2.2, 3.3))

    def take(models):
        calls.append(sorted(models))
        return (
            {"dense": passes(1.0), "a": drifting if len(calls) == 1 else steady, "b": steady}
            if len(calls) == 1
            else {"dense": passes(1.0), "a": steady}
        )

    found = paired.readings({"dense": b"", "a": b"", "b": b""}, "dense", take, tries=3)
    assert calls == [["a", "b", "dense"], ["a", "dense"]]
    assert found["a"].ratio == pytest.approx(0.5, rel=0.02)


def test_drift_that_does_not_end_is_reported_not_waited_for():
    calls = itertools.count()

    def take(models):
        next(calls)
        return {name: passes(0.7, speed=(1.0, 1.5, 2.2, 3.3)) for name in models}

    found = paired.readings({"dense": b"", "a": b""}, "dense", take, tries=3)
    assert next(calls) == 3
    assert found["a"].drift > paired.DRIFT


def test_baseline_against_itself_is_one():
    found = paired.readings({"dense": b""}, "dense", lambda models: {"dense": passes(1.02)}, tries=1)
    assert (found["dense"].ratio, found["dense"].ratio_ci95) == (1.0, (1.0, 1.0))


def test_rounds_stop_when_tight_and_swap_their_order(monkeypatch):
    now = itertools.count(step=0.001)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(now))
    order: list[str] = []

    def run(name: str, ms: float):
        def once() -> float:
            order.append(name)
            return ms

        return once

    pairs = worker._rounds(run("base", 2.0), run("other", 1.0), seconds=1.0, tightness=0.01)
    assert pairs == [[2.0, 1.0]] * 12
    bursts = [order[i] for i in range(len(order) - 72, len(order), worker.BURST)]
    assert bursts == ["base", "other", "other", "base"] * 6


def test_rounds_stop_at_the_limit(monkeypatch):
    now = itertools.count(step=0.01)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(now))
    noisy = itertools.cycle([1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 0.5, 0.5, 0.5])
    pairs = worker._rounds(lambda: 2.0, lambda: next(noisy), seconds=0.5, tightness=0.001)
    assert 12 < len(pairs) < 60


def test_measures_models_in_their_order_with_progress(tmp_path):
    (tmp_path / "a.onnx").write_bytes(GOOD)
    seen = []
    found = measure(
        {"dense": GOOD, "b": tmp_path / "a.onnx"},
        seconds=0.05,
        batch=2,
        threads=2,
        tries=1,
        progress=lambda *step: seen.append(step),
    )
    assert list(found) == ["dense", "b"]
    assert 0 < found["b"].min_ms <= found["b"].median_ms
    assert found["b"].rounds >= 4
    assert [step[:2] for step in seen] == [(i, 10) for i in range(1, 11)]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"baseline": "other"}, UsageError, "`other` is not among the models: dense"),
        ({"batch": 0}, UsageError, "at least 1"),
        ({"threads": -1}, UsageError, "at least 1"),
        ({"seconds": 0}, UsageError, "above 0 s"),
        ({"optimization": "fast"}, UsageError, "none, basic, extended, all"),
        ({"providers": ["quantum"]}, DeviceError, "no provider"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, error, says):
    with pytest.raises(error, match=says):
        measure({"dense": GOOD}, **options)


def test_a_model_that_fails_while_it_runs_is_named_as_such():
    proto = model()
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.node[1].op_type = "Reshape"  # the weight as a shape: of the wrong type, or refused when it runs
    with pytest.raises(ModelError):
        measure({"dense": proto.SerializeToString()}, seconds=0.05)


def test_waiting_for_the_core_is_left_out_of_the_time(monkeypatch):
    waited = [0]
    monkeypatch.setattr(worker.os, "open", lambda *_: 99)
    monkeypatch.setattr(worker.os, "close", lambda _: None)
    monkeypatch.setattr(worker.os, "pread", lambda *_: b"123 %d 7" % waited[0])
    monkeypatch.setattr(worker.time, "perf_counter_ns", lambda: 10_000)
    with worker._clock(alone=True) as clock:
        start = clock()
        waited[0] += 400
        assert clock() - start == -400
    with worker._clock(alone=False) as clock:
        assert clock() == 10_000


def test_where_the_kernel_does_not_count_waiting_the_clock_is_plain(monkeypatch):
    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr(worker.os, "open", missing)
    with worker._clock(alone=True) as clock:
        assert clock is worker.time.perf_counter_ns


def test_rounds_at_full_speed_count_alone_where_there_are_enough():
    times = passes(0.5, rounds=200, speed=(1.0,))
    slowed = [[1.5 * ours, 1.3 * theirs] for ours, theirs in passes(0.5, rounds=300, speed=(1.0,), seed=1)[0]]
    quiet = [[2 + 0.01 * (i % 7), 1 + 0.01 * (i % 5)] for i, _ in enumerate(times[0])]
    reading = paired.summarize([quiet, slowed])
    assert reading.ratio == pytest.approx(0.5, rel=0.02)
    assert reading.median_ms / reading.baseline_ms == pytest.approx(reading.ratio, rel=0.02)


def test_a_machine_that_is_busy_throughout_is_still_measured():
    rng = np.random.default_rng(0)
    times = [[ours, 0.5 * ours] for ours in np.exp(rng.standard_normal(100))]
    assert paired.summarize([times]).ratio == pytest.approx(0.5)


def test_a_wide_interval_gets_more_passes_until_it_is_narrow():
    calls = itertools.count()

    def take(models):
        seed = next(calls)
        return {name: passes(0.7, noise=0.04, seed=seed) for name in models}

    found = paired.readings({"dense": b"", "a": b""}, "dense", take, tries=9)["a"]
    assert 1 < next(calls) < 9
    low, high = found.ratio_ci95
    assert (high - low) / found.ratio <= paired.WIDE
    assert found.rounds > 60
