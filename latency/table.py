"""A latency table: what a device takes for policies of one model, measured once, used anywhere.

`latency.sampling` builds one. It holds the measured policies themselves, raw; the predictor is fitted to them when it
is loaded (`latency.predict`), so a better predictor makes old tables better. It knows the device it was measured on,
and its own error, from policies that the fit never saw. It is plain JSON: built on the device, copied, used elsewhere.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from amc.documents import read_document
from amc.errors import DeviceError
from amc.files import dump_json, write_atomic
from amc.groups import Structure
from latency.predict import Predictor, Shapes, fit

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
