"""Latency to trust: each model is timed next to a baseline, and what counts is the ratio.

A machine's speed wanders by tens of percent (clock, neighbours, temperature); the ratio of two runs side by side does
not. A reading is the median of such paired ratios with a bootstrap interval (Efron, 1979), and the time in
milliseconds is for reading. When the baseline itself wandered while a model was timed, the reading is taken again, and
the tightest one counts.

Two hardware threads of one core slow each other by half, and each kernel by another factor, so that a ratio under load
is another ratio. Where enough rounds ran at full speed, they alone count.

Rounds of one pass share what the pass was dealt (where memory landed, who else ran), so they are not independent: the
bootstrap draws passes first, then rounds within each. Of few passes it would come out too narrow; its quantiles are
moved out as far as Student's t lies outside of the normal (Hesterberg, "What Teachers Should Know About the
Bootstrap", 2015, section 5.3, the expanded percentile interval).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.stats import norm, t

from amc.errors import UsageError
from latency import worker
from latency.session import as_error, read_model

RESAMPLES = 2000
CHUNK = 1_000_000
"""Ratios drawn at a time: bounds the memory."""
DRIFT = 0.15
"""The baseline's medians of two passes may differ by this much before a reading is taken again."""

CALM = 1.15
"""A round counts as calm when neither model took longer than this times its fastest (5th percentile)."""
ENOUGH_CALM = 0.2
"""Where fewer of the rounds than this are calm, all count: the machine is busy throughout."""

WIDE = 0.04
"""An interval is wide when its ends are this far apart, as a fraction of the ratio."""

Model = str | os.PathLike[str] | bytes
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Reading:
    """What one model takes, beside the baseline.

    median_ms, min_ms, p95_ms: of the model alone, ms a run.
    baseline_ms: the baseline's median in the same rounds.
    ratio, ratio_ci95: its latency over the baseline's, the median of paired rounds; below 1 is faster.
    speedup, speedup_ci95: the inverse.
    rounds: how many pairs it rests on.
    drift: how far the baseline's own median wandered meanwhile, as a fraction.
    passes: what was timed: of each pass `(rounds, 2)` milliseconds, baseline and model.
    """

    median_ms: float
    min_ms: float
    p95_ms: float
    baseline_ms: float
    ratio: float
    ratio_ci95: tuple[float, float]
    rounds: int
    drift: float
    passes: tuple[np.ndarray, ...] = field(default=(), repr=False, compare=False)

    @property
    def speedup(self) -> float:
        """How many times faster than the baseline."""
        return 1 / self.ratio

    @property
    def speedup_ci95(self) -> tuple[float, float]:
        """The 95 % interval of the speed-up."""
        low, high = self.ratio_ci95
        return 1 / high, 1 / low


def measure(
    models: Mapping[str, Model],
    *,
    baseline: str = "dense",
    batch: int = 1,
    threads: int = 1,
    providers: Sequence[str] | None = None,
    optimization: str = "all",
    seconds: float = 4.0,
    tightness: float = 0.005,
    passes: int = 5,
    tries: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Reading]:
    """Time ONNX models (paths or bytes) in this process, each paired and interleaved with the baseline.

    Rounds go on until the ratio's standard error is under `tightness` or a model has taken `seconds`, in `passes` that
    open the sessions anew. Readings whose baseline drifted between passes are taken again, and those whose interval is
    wide still (a busy machine lets few rounds through) go on, up to `tries` times in all.

    Raises:
        UsageError: the baseline is not among the models, or a setting is out of range.
        ModelError: a model can't be read, loaded or run.
        DeviceError: a provider is missing or does not start.
    """
    check_settings(baseline, models, batch, threads, optimization, seconds)
    data = {name: read_model(model) for name, model in models.items()}

    def take(chosen: Mapping[str, bytes]) -> Mapping[str, list[list[list[float]]]]:
        try:
            return worker.time_models(
                chosen,
                baseline=baseline,
                batch=batch,
                threads=threads,
                providers=None if providers is None else list(providers),
                optimization=optimization,
                seconds=seconds,
                tightness=tightness,
                passes=passes,
                seed=seed,
                progress=progress,
            )
        except worker.WorkerError as error:
            raise as_error(error) from error

    return readings(data, baseline, take, tries)


def check_settings(
    baseline: str, models: Iterable[str], batch: int, threads: int, optimization: str, seconds: float
) -> None:
    """Refuse what no device could measure, before anything is sent to one. Raises UsageError."""
    if baseline not in models:
        raise UsageError(f"the baseline `{baseline}` is not among the models: {', '.join(models) or 'there are none'}")
    if batch < 1 or threads < 1:
        raise UsageError(f"batch and threads must be at least 1, not {batch} and {threads}")
    if optimization not in worker.OPTIMIZATION:
        raise UsageError(f"graph optimization `{optimization}` must be one of {', '.join(worker.OPTIMIZATION)}")
    if not seconds > 0:
        raise UsageError(f"the time for a model must be above 0 s, not {seconds}")


def readings(
    models: Mapping[str, bytes],
    baseline: str,
    take: Callable[[Mapping[str, bytes]], Mapping[str, list[list[list[float]]]]],
    tries: int,
) -> dict[str, Reading]:
    """Readings of all models through `take`, up to `tries` times.

    One that saw the baseline drift is taken again, and the steadier counts; one whose interval is wide goes on.
    """
    passes = {name: list(taken) for name, taken in take(models).items()}
    found = {name: summarize(taken) for name, taken in passes.items()}
    for _ in range(tries - 1):
        again = {name for name, reading in found.items() if reading.drift > DRIFT or _spread(reading) > WIDE}
        if not again - {baseline}:
            break
        chosen = {name: models[name] for name in models if name in again or name == baseline}
        for name, taken in take(chosen).items():
            if found[name].drift <= DRIFT:
                passes[name] += taken
                found[name] = summarize(passes[name])
            elif summarize(taken).drift < found[name].drift:
                passes[name], found[name] = list(taken), summarize(taken)
    # The baseline against itself is 1 by definition; its rounds serve its own times.
    found[baseline] = replace(found[baseline], ratio=1.0, ratio_ci95=(1.0, 1.0))
    return {name: found[name] for name in models}


def summarize(passes: Sequence[Sequence[Sequence[float]] | np.ndarray]) -> Reading:
    """A reading from `[baseline, model]` milliseconds, passes of rounds of pairs."""
    everything = [np.asarray(rounds, dtype=float).reshape(-1, 2) for rounds in passes]
    calm = _calm(everything)
    pairs = np.concatenate(calm)
    bases = [float(np.median(rounds[:, 0])) for rounds in calm]
    ratios = [rounds[:, 1] / rounds[:, 0] for rounds in calm]
    return Reading(
        median_ms=float(np.median(pairs[:, 1])),
        min_ms=float(pairs[:, 1].min()),
        p95_ms=float(np.quantile(np.concatenate(everything)[:, 1], 0.95)),
        baseline_ms=float(np.median(pairs[:, 0])),
        ratio=float(np.median(np.concatenate(ratios))),
        ratio_ci95=_interval(ratios),
        rounds=len(pairs),
        drift=max(bases) / min(bases) - 1,
        passes=tuple(everything),
    )


def pooled(readings: Iterable[Reading]) -> Reading:
    """One reading from all that was timed for several of the same model and baseline."""
    return summarize([rounds for reading in readings for rounds in reading.passes])


def _calm(passes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The calm rounds, `(rounds, 2)` each pass that has any; or all of them."""
    pairs = np.concatenate(passes)
    limits = CALM * np.quantile(pairs, 0.05, axis=0)
    if (pairs <= limits).all(axis=1).mean() < ENOUGH_CALM:
        return list(passes)
    calm = [rounds[(rounds <= limits).all(axis=1)] for rounds in passes]
    return [rounds for rounds in calm if len(rounds)]


def _interval(passes: Sequence[np.ndarray]) -> tuple[float, float]:
    """95 % interval of the median of ratios: passes are drawn anew, and rounds within each.

    A pass is drawn as often as it has rounds, since that is how much it counts in the median of all.
    """
    rng, count = np.random.default_rng(0), len(passes)
    lengths = np.array([len(rounds) for rounds in passes])
    ratios = np.ones((count, lengths.max()))
    for row, rounds in zip(ratios, passes, strict=True):
        row[: len(rounds)] = rounds
    each = round(float(lengths.mean()))
    medians = np.zeros(RESAMPLES)
    for at in range(0, RESAMPLES, step := max(CHUNK // (count * each), 1)):
        size = min(step, RESAMPLES - at)
        chosen = rng.choice(count, (size, count, 1), p=lengths / lengths.sum())
        drawn = ratios[chosen, rng.integers(0, lengths[chosen], (size, count, each))]
        medians[at : at + size] = np.median(drawn.reshape(size, -1), axis=1)
    outside = norm.cdf(-((count / (count - 1)) ** 0.5) * t.ppf(0.975, count - 1)) if count > 1 else 0.025
    low, high = np.quantile(medians, [outside, 1 - outside])
    return float(low), float(high)


def _spread(reading: Reading) -> float:
    low, high = reading.ratio_ci95
    return (high - low) / reading.ratio
