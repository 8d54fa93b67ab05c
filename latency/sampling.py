"""Builds a latency table: random policies are measured until it predicts well, then some that the fit never sees."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from amc.groups import Structure
from latency.device import Device
from latency.paired import Progress, Reading
from latency.predict import Predictor
from latency.table import MOST, Conditions, DeviceInfo, GroupWidths, LatencyTable, Sample, TableError, structure_key

BATCH = 8
"""Policies sent to the device at a time."""
ENOUGH = 0.015
"""Leave-one-out error at which more samples are not worth their time."""
CHECK = 64
"""A fit after so many samples finds out; it takes as long as a few of them."""
SLOWED = 1.15
"""Samples during which the dense model's times differ by no more than this factor were taken at one speed."""
SEEN = 1 / 3
"""At least this share must have been taken at the speed that counts: a machine that stays busy is measured as it is."""
FEWEST = 40
"""Samples that are taken whatever the time."""


def build_table(
    structure: Structure,
    files: Callable[[Sequence[int]], bytes],
    dense: bytes,
    device: Device,
    *,
    model: str,
    path: str | os.PathLike[str] | None = None,
    conditions: Conditions | None = None,
    samples: int = 320,
    held_out: int = 24,
    seconds: float = 0.2,
    limit: float = 90.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure random policies until the leave-one-out error is small, `samples` are taken, or `limit` seconds passed.

    files: widths -> ONNX file of that policy (`latency.policy_files`). dense: the dense model's.
    path: where the table is written as it grows. One that was cut short is gone on with.
    samples: at most `MOST`. seconds: time for each policy.

    Raises:
        DeviceError: the device fails, or the table at `path` is of another model or device.
    """
    builder = Builder(structure, files, dense, device, model=model, conditions=conditions, seed=seed)
    table = _started(path, structure, builder.conditions, builder.fingerprint)
    if table is not None and table.error is not None:
        return table
    if table is not None:
        builder.go_on(table)
    samples = min(samples, MOST)

    def keep(table: LatencyTable, done: int, what: str) -> None:
        if path is not None:
            table.save(path)
        if progress:
            progress(done, samples + held_out, what)

    _sample(builder, samples, seconds, limit, lambda table: keep(table, len(table.samples), "policies measured"))
    table = _hold_out(builder, held_out, 3 * seconds)
    keep(table, samples + held_out, "held-out policies measured")
    return table


class Builder:
    """A table that grows. What the device takes for policies is measured beside the dense model.

    Only what was taken at one speed of the machine counts; see `steady`.

    Raises:
        DeviceError: the device does not answer.
    """

    def __init__(
        self,
        structure: Structure,
        files: Callable[[Sequence[int]], bytes],
        dense: bytes,
        device: Device,
        *,
        model: str,
        conditions: Conditions | None = None,
        seed: int = 0,
    ) -> None:
        self.structure, self.conditions, self.seed = structure, conditions or Conditions(), seed
        self.fingerprint = device.fingerprint()
        self._files, self._dense, self._device, self._model = files, dense, device, model
        self._taken: list[tuple[Sample, float]] = []

    def go_on(self, table: LatencyTable) -> None:
        """Takes over the samples of a table that was cut short."""
        self._taken = [(sample, table.dense_ms) for sample in table.samples]

    def __len__(self) -> int:
        """Samples so far, of whatever speed."""
        return len(self._taken)

    def take(self, policies: Sequence[Sequence[int]], seconds: float) -> None:
        """Samples these policies."""
        self._taken += self.measure(policies, seconds)

    def table(self, held_out: Sequence[Sample] = (), error: TableError | None = None) -> LatencyTable:
        """The table so far, of one sample at least."""
        low, high = self._speed()
        return LatencyTable(
            model=self._model,
            structure=structure_key(self.structure),
            groups=[GroupWidths(name=group.name, channels=group.channels) for group in self.structure.groups],
            device=DeviceInfo.model_validate(self.fingerprint),
            conditions=self.conditions,
            dense_ms=round(float(np.median([ms for _, ms in self._taken if low <= ms <= high])), 6),
            samples=self.at_speed(self._taken),
            held_out=list(held_out),
            error=error,
        )

    def measure(self, policies: Sequence[Sequence[int]], seconds: float) -> list[tuple[Sample, float]]:
        """A sample of each policy, and the dense model's time, ms, beside it."""
        found = []
        for at in range(0, len(policies), BATCH):
            batch = policies[at : at + BATCH]
            for widths, reading in zip(batch, self.readings(batch, seconds), strict=True):
                sample = Sample(widths=[int(width) for width in widths], ratio=round(reading.ratio, 5))
                found.append((sample, reading.baseline_ms))
        return found

    def readings(self, policies: Sequence[Sequence[int]], seconds: float, passes: int = 1) -> list[Reading]:
        """What each policy takes, all interleaved with the dense model."""
        models = {"dense": self._dense, **{str(i): self._files(widths) for i, widths in enumerate(policies)}}
        options = self.conditions.model_dump()
        found = self._device.measure(
            models, seconds=seconds, tightness=0.006, passes=passes, tries=1, seed=self.seed, **options
        )
        return [found[str(i)] for i in range(len(policies))]

    def at_speed(self, taken: Sequence[tuple[Sample, float]]) -> list[Sample]:
        """Those that were taken at the speed at which the table's samples were."""
        low, high = self._speed()
        return [sample for sample, ms in taken if low <= ms <= high]

    def _speed(self) -> tuple[float, float]:
        return steady([ms for _, ms in self._taken])


def draw(structure: Structure, rng: np.random.Generator) -> list[int]:
    """A random policy: a level for all groups, scatter round it, and often an alignment that kernels like."""
    level, scatter = rng.uniform(0.1, 1.0), rng.uniform(0.0, 0.6)
    align = int(rng.choice([1, 1, 4, 8, 16]))
    widths = []
    for group in structure.groups:
        wanted = group.channels * (level + scatter * rng.uniform(-1, 1))
        if rng.random() < 0.8:
            wanted = round(wanted / align) * align
        widths.append(group.snap(min(max(wanted, group.floor), group.channels)))
    return widths


def steady(times: Sequence[float]) -> tuple[float, float]:
    """The dense model's times, ms, at one speed of the machine: at the fastest that enough samples saw.

    A busy neighbour on the same core slows each kernel by another factor, so that a ratio at half speed is another
    ratio, and a table of both would predict neither.
    """
    ordered = np.sort(times)
    counts = np.searchsorted(ordered, SLOWED * ordered, "right") - np.arange(len(ordered))
    low = float(ordered[np.argmax(counts >= min(SEEN * len(ordered), counts.max()))])
    return low, SLOWED * low


def _sample(
    builder: Builder, samples: int, seconds: float, limit: float, grown: Callable[[LatencyTable], None]
) -> None:
    """Fills the table: with the dense and the smallest policy, then with random ones. `grown` sees each few."""
    structure, start, used, checked = builder.structure, time.monotonic(), len(builder), 0
    corners = [[group.channels for group in structure.groups], [group.floor for group in structure.groups]]
    rng = np.random.default_rng([builder.seed, used])
    while used < samples and (used < FEWEST or time.monotonic() - start <= limit):
        policies = [draw(structure, rng) for _ in range(min(2 * BATCH, samples - used))]
        builder.take(policies if used else corners + policies, seconds)
        table = builder.table()
        used = len(table.samples)
        grown(table)
        if used >= 80 and used // CHECK > checked:
            checked = used // CHECK
            if table.predictor(structure).spread < ENOUGH:
                return


def _hold_out(builder: Builder, policies: int, seconds: float) -> LatencyTable:
    """The table with its error, from random policies that are measured for longer and that no fit sees."""
    rng = np.random.default_rng([builder.seed, 2**31])
    held = builder.measure([draw(builder.structure, rng) for _ in range(policies)], seconds)
    apart = builder.at_speed(held)
    if len(apart) <= 2:
        apart = [sample for sample, _ in held]
    table = builder.table(apart)
    if len(apart) <= 2:
        return table
    return table.model_copy(update={"error": table_error(table.predictor(builder.structure), apart)})


def _started(
    path: str | os.PathLike[str] | None, structure: Structure, conditions: Conditions, fingerprint: Mapping[str, Any]
) -> LatencyTable | None:
    if path is None or not Path(path).exists():
        return None
    table = LatencyTable.load(path)
    table.check(structure, conditions, fingerprint)
    return table


def table_error(predictor: Predictor, held: Sequence[Sample]) -> TableError:
    """Predicted against measured, on policies that the fit did not see."""
    measured = np.array([sample.ratio for sample in held])
    predicted = predictor(np.array([sample.widths for sample in held]))
    off = np.abs(predicted / measured - 1)
    ranked = np.ptp(predicted.round(5)) > 0 and np.ptp(measured) > 0  # ratios are kept to five digits
    return TableError(
        mean=round(float(off.mean()), 4),
        p99=round(float(np.quantile(off, 0.99)), 4),
        within_10_percent=round(float((off <= 0.1).mean()), 4),
        spearman=round(float(spearmanr(predicted, measured)[0]), 4) if ranked else None,
        policies=len(held),
    )
