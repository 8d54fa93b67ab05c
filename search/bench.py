"""The bench: latency as a hard budget, predicted in the loop and measured before anything is promised.

A table predicts what each policy takes (`latency.table`). When the search has ended, its best policies and the uniform
one are sliced out of the dense ONNX file and measured beside the dense model. Where a measurement breaks the limit, it
corrects the table, and the search goes on under the corrected costs, until the *measured* latency is within the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from amc.export import export_bytes
from amc.groups import Structure
from amc.models import Loaded
from latency.cost import LatencyCost
from latency.device import Device, TableDevice, open_device, short
from latency.files import policy_files
from latency.paired import Reading
from latency.sampling import build_table
from latency.table import Conditions, LatencyTable
from search.display import Display
from search.settings import Settings

Widths = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class OnnxFiles:
    """A model's ONNX files: the dense one, exported once, and that of any policy, cut from it.

    policy: widths in the groups' order -> ONNX file.
    """

    dense: bytes
    policy: Callable[[Sequence[int]], bytes]

    @classmethod
    def of(cls, loaded: Loaded, structure: Structure) -> OnnxFiles:
        """The files of a model."""
        dense = export_bytes(loaded.model, loaded.inputs)
        return cls(dense, policy_files(loaded.model, structure, loaded.inputs, dense))


@dataclass(frozen=True, eq=False)
class Bench:
    """A device, a model's files on it, and what a table predicts of them.

    files: widths in the groups' order -> ONNX file. dense: the dense model's.
    """

    device: Device
    conditions: Conditions
    structure: Structure
    dense: bytes
    files: Callable[[Sequence[int]], bytes]
    table: LatencyTable
    cost: LatencyCost

    @property
    def measures(self) -> bool:
        """Whether the device is there, or known from its table alone."""
        return not isinstance(self.device, TableDevice)

    def measure(self, policies: Sequence[Widths]) -> dict[Widths, Reading]:
        """Each policy's latency beside the dense model's.

        Raises:
            DeviceError: the device fails, or is known from its table alone.
        """
        files = {str(i): self.files(widths) for i, widths in enumerate(policies)}
        settings = self.conditions
        readings = self.device.measure({"dense": self.dense, **files}, **settings.model_dump())
        return {widths: readings[str(i)] for i, widths in enumerate(policies)}

    def corrected(self, readings: Mapping[Widths, Reading]) -> Bench:
        """The same bench with a table that has learned from measurements."""
        table = self.table.corrected([(widths, reading.ratio) for widths, reading in readings.items()])
        return replace(self, table=table, cost=self.cost.corrected(table))


def open_bench(
    settings: Settings, loaded: Loaded, structure: Structure, *, table: Path | None = None, display: Display
) -> Bench:
    """The bench for a model: its table is read (from `--device`, or `table`, that of a resumed run) or measured now.

    Raises:
        DeviceError: the device or the table can't be used.
    """
    device, conditions = open_device(settings.device), conditions_of(settings)
    if isinstance(device, TableDevice):
        device.table.check(structure, conditions)
    files = OnnxFiles.of(loaded, structure)
    if isinstance(device, TableDevice):
        found = device.table
    else:
        found = measure_table(settings, loaded.name, files, structure, device, path=table, display=display)
    return Bench(device, conditions, structure, files.dense, files.policy, found, LatencyCost.of(found, structure))


def measure_table(
    settings: Settings,
    model: str,
    files: OnnxFiles,
    structure: Structure,
    device: Device,
    *,
    path: Path | None,
    display: Display,
) -> LatencyTable:
    """The latency table at `path`, measured (or gone on with) unless it is complete. None keeps it in memory alone.

    Raises:
        DeviceError: the device fails, or the table at `path` is of another model or device.
    """
    with display.bar("measuring a latency table") as report:
        return build_table(
            structure,
            files.policy,
            files.dense,
            device,
            model=model,
            path=path,
            conditions=conditions_of(settings),
            seed=settings.seed,
            progress=report,
        )


def conditions_of(settings: Settings) -> Conditions:
    """How latency is measured."""
    names = [short(name) for name in settings.latency_providers]
    return Conditions(batch=settings.latency_batch, threads=settings.latency_threads, providers=names)
