"""A latency table: what a device takes for policies of one model, measured once, used anywhere.

It holds the measured policies themselves, raw; the predictor is fitted to them on loading (`latency.predict`), so a
better predictor makes old tables better. It knows the device it was measured on, and its own error, from policies that
the fit never saw. It is plain JSON: built on the device, copied, and used elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import spearmanr

from amc.documents import read_document
from amc.errors import DeviceError
from amc.files import dump_json, write_atomic
from amc.groups import Structure
from latency.device import Device
from latency.paired import Progress, Reading
from latency.predict import Predictor, Shapes, fit

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
MOST = 1000
"""Samples that a table may have, and corrections: a fit's work grows with the third power of both."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=500)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class DeviceInfo(_Strict):
    """The fingerprint of a device."""

    cpu: Name
    cores: Annotated[int, Field(ge=1)]
    machine: Name
    system: Name
    onnxruntime: Name
    available: Annotated[list[Name], Field(max_length=50)]


class Conditions(_Strict):
    """How latency was measured."""

    batch: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1)] = 1
    providers: list[Name] = ["cpu"]
    optimization: Name = "all"


class GroupWidths(_Strict):
    """A group of the model."""

    name: Name
    channels: Annotated[int, Field(ge=1)]


class Sample(_Strict):
    """A policy, and its latency over the dense model's, measured side by side."""

    widths: Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=100_000)]
    ratio: Positive


class TableError(_Strict):
    """How far predictions were from policies that were held out, as fractions of the measured latency.

    spearman: None where all of them are predicted, or were measured, to take the same.
    """

    mean: float
    p99: float
    within_10_percent: float
    spearman: float | None
    policies: int


class LatencyTable(_Strict):
    """See the module. `structure` is `structure_key` of the traced model; widths are in the order of `groups`."""

    format: Literal["amc/latency-table"] = "amc/latency-table"
    version: Literal[1] = 1
    model: Name
    structure: Name
    groups: Annotated[list[GroupWidths], Field(max_length=100_000)]
    device: DeviceInfo
    conditions: Conditions
    dense_ms: Positive
    samples: Annotated[list[Sample], Field(min_length=1, max_length=MOST)]
    held_out: Annotated[list[Sample], Field(max_length=100_000)]
    corrections: Annotated[list[Sample], Field(max_length=MOST)] = []
    error: TableError | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table. Raises DeviceError: it can't be read, is no table, or contradicts itself."""
        table = read_document(path, cls, "latency table", DeviceError)
        channels = [group.channels for group in table.groups]
        for sample in (*table.samples, *table.held_out, *table.corrections):
            if len(sample.widths) != len(channels) or any(w > c for w, c in zip(sample.widths, channels, strict=True)):
                raise DeviceError(f"the latency table {path} is invalid: a policy in it does not fit its groups")
        return table

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table, whole or not at all."""
        write_atomic(path, dump_json(self.model_dump()))

    def check(self, structure: Structure, conditions: Conditions, device: Mapping[str, Any] | None = None) -> None:
        """Refuse another model, other conditions, or (where `device` is a fingerprint) another device.

        Raises DeviceError that names what differs.
        """
        again = "build one with `amc latency --model … --table FILE`"
        if self.structure != structure_key(structure):
            raise DeviceError(
                f"the latency table is of another model ({self.model}): its groups or shapes differ; {again}"
            )
        for name, mine in self.conditions.model_dump().items():
            theirs = getattr(conditions, name)
            if mine != theirs:
                raise DeviceError(f"the latency table was measured with {name} {mine}, but {theirs} is asked; {again}")
        for name, mine in self.device.model_dump().items() if device is not None else ():
            theirs = (device or {}).get(name)
            if mine != theirs:
                raise DeviceError(
                    f"the latency table is of another device: its {name} is {mine}, not {theirs}; {again}"
                )

    def predictor(self, structure: Structure) -> Predictor:
        """Relative latency of any policy, from every sample in the table."""
        known = [*self.samples, *self.corrections]
        widths = np.array([sample.widths for sample in known], dtype=int).reshape(len(known), len(self.groups))
        return fit(Shapes.of(structure), widths, np.array([sample.ratio for sample in known]))

    def corrected(self, measured: Sequence[tuple[Sequence[int], float]]) -> LatencyTable:
        """This table and finalists' measurements: widths, and latency over the dense model's."""
        samples = [Sample(widths=[int(w) for w in widths], ratio=ratio) for widths, ratio in measured]
        return self.model_copy(update={"corrections": [*self.corrections, *samples][-MOST:]})


def structure_key(structure: Structure) -> str:
    """A hash of what latency depends on: the groups, and the shapes that they slice."""
    parts: list[Any] = [(name, info.shape) for name, info in structure.tensors.items()]
    parts += [(group.name, group.channels, group.widths) for group in structure.groups]
    parts += sorted(structure.positions.items())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


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


class _Builder:
    """Asks the device for samples, and knows the dense model's time, ms, during each."""

    def __init__(
        self, device: Device, files: Callable[[Sequence[int]], bytes], dense: bytes, conditions: Conditions, seed: int
    ) -> None:
        self.device, self.files, self.dense, self.conditions, self.seed = device, files, dense, conditions, seed

    def measure(self, policies: Sequence[Sequence[int]], seconds: float, passes: int = 1) -> list[tuple[Sample, float]]:
        """A sample of each policy, and the dense model's time."""
        found = []
        for at in range(0, len(policies), BATCH):
            batch = policies[at : at + BATCH]
            for widths, reading in zip(batch, self.readings(batch, seconds, passes), strict=True):
                sample = Sample(widths=[int(width) for width in widths], ratio=round(reading.ratio, 5))
                found.append((sample, reading.baseline_ms))
        return found

    def readings(self, policies: Sequence[Sequence[int]], seconds: float, passes: int) -> list[Reading]:
        """What each policy takes, all interleaved with the dense model."""
        models = {"dense": self.dense, **{str(i): self.files(widths) for i, widths in enumerate(policies)}}
        options = self.conditions.model_dump()
        found = self.device.measure(
            models, seconds=seconds, tightness=0.006, passes=passes, tries=1, seed=self.seed, **options
        )
        return [found[str(i)] for i in range(len(policies))]


def steady(times: Sequence[float]) -> tuple[float, float]:
    """The dense model's times, ms, at one speed of the machine: at the fastest that enough samples saw.

    A busy neighbour on the same core slows each kernel by another factor, so that a ratio at half speed is another
    ratio, and a table of both would predict neither.
    """
    ordered = np.sort(times)
    counts = np.searchsorted(ordered, SLOWED * ordered, "right") - np.arange(len(ordered))
    low = float(ordered[np.argmax(counts >= min(SEEN * len(ordered), counts.max()))])
    return low, SLOWED * low


def _within(taken: Sequence[tuple[Sample, float]], speed: tuple[float, float]) -> list[Sample]:
    return [sample for sample, time in taken if speed[0] <= time <= speed[1]]


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
    conditions = conditions or Conditions()
    fingerprint = device.fingerprint()
    table = _started(path, structure, conditions, fingerprint)
    if table is not None and table.error is not None:
        return table
    builder = _Builder(device, files, dense, conditions, seed)
    taken = [(sample, table.dense_ms) for sample in table.samples] if table else []
    samples = min(samples, MOST)
    total, start, checked = samples + held_out, time.monotonic(), 0
    rng = np.random.default_rng([seed, len(taken)])

    def current(held: list[Sample], error: TableError | None) -> LatencyTable:
        times = [time for _, time in taken]
        speed = steady(times)
        return LatencyTable(
            model=model,
            structure=structure_key(structure),
            groups=[GroupWidths(name=group.name, channels=group.channels) for group in structure.groups],
            device=DeviceInfo.model_validate(fingerprint),
            conditions=conditions,
            dense_ms=round(float(np.median([time for time in times if speed[0] <= time <= speed[1]])), 6),
            samples=_within(taken, speed),
            held_out=held,
            error=error,
        )

    corners = [[group.channels for group in structure.groups], [group.floor for group in structure.groups]]
    used = len(taken)
    while used < samples and not (time.monotonic() - start > limit and used >= 40):
        policies = [draw(structure, rng) for _ in range(min(2 * BATCH, samples - used))]
        taken += builder.measure(policies if taken else corners + policies, seconds)
        table = current([], None)
        used = len(table.samples)
        if path is not None:
            table.save(path)
        if progress:
            progress(used, total, "policies measured")
        if used >= 80 and used // CHECK > checked:
            checked = used // CHECK
            if table.predictor(structure).spread < ENOUGH:
                break
    rng = np.random.default_rng([seed, 2**31])
    held = builder.measure([draw(structure, rng) for _ in range(held_out)], 3 * seconds)
    speed = steady([time for _, time in taken])
    apart = _within(held, speed)
    if len(apart) <= 2:
        apart = [sample for sample, _ in held]
    error = table_error(current([], None).predictor(structure), apart) if len(apart) > 2 else None
    table = current(apart, error)
    if path is not None:
        table.save(path)
    if progress:
        progress(total, total, "held-out policies measured")
    return table


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
