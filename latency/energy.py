"""Energy of a run, from the machine's own counters: RAPL for the processor, NVML for an NVIDIA GPU.

The counters are of the whole package or board, so that what else runs there counts too: models take turns, and the
median of their turns is what a run takes, with everything that it keeps awake. Energy is not monotone in the widths: it
is reported, and no budget can rest on it. Most virtual machines expose no counter; then it is said, and nothing is
made up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from amc.errors import DeviceError
from latency.session import open_session, random_feeds

RAPL = Path("/sys/class/powercap")
GPU = ("cuda", "tensorrt", "nvtensorrtrtx")
TURN = 1.0
"""Seconds that a model runs in one go: counters step every millisecond (RAPL) to every tenth of a second (NVML)."""

Counter = Callable[[], float]
"""Joules since some point in time."""


def energy_of(
    models: Mapping[str, bytes],
    *,
    batch: int = 1,
    threads: int = 1,
    providers: Sequence[str] | None = None,
    optimization: str = "all",
    turns: int = 5,
    counter: Counter | None = None,
) -> dict[str, float]:
    """Joules of a run of each model, the median of its turns.

    counter: another than this machine's own.

    Raises:
        DeviceError: this machine has no counter that can be read.
        ModelError: a model can't be loaded or run.
    """
    counter = counter or open_counter(providers)
    sessions = {
        name: open_session(model, threads=threads, providers=providers, optimization=optimization)
        for name, model in models.items()
    }
    feeds = {name: random_feeds(session, batch, 0) for name, session in sessions.items()}
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(turns):
        for name, session in sessions.items():
            session.run(None, feeds[name])
            before, start, runs = counter(), time.perf_counter(), 0
            while not runs or time.perf_counter() - start < TURN:
                session.run(None, feeds[name])
                runs += 1
            found[name].append((counter() - before) / runs)
    return {name: float(np.median(turn)) for name, turn in found.items()}


def open_counter(providers: Sequence[str] | None = None) -> Counter:
    """The counter of where the models run. Raises DeviceError: there is none, or it can't be read."""
    first = (providers or ["cpu"])[0].removesuffix("ExecutionProvider").lower()
    if first in GPU:
        return _nvml()
    if first != "cpu":
        raise DeviceError(f"energy can't be measured here: nothing is known that counts what {first} uses")
    counter = Rapl(RAPL)
    counter()
    return counter


class Rapl:
    """Joules of all packages since the first reading; a counter that starts again from 0 is followed."""

    def __init__(self, folder: Path) -> None:
        found = sorted(folder.glob("intel-rapl:[0-9]*/energy_uj")) if folder.is_dir() else []
        self._files = [path for path in found if path.parent.name.count(":") == 1]  # a package's parts are within it
        if not self._files:
            raise DeviceError(
                "energy can't be measured here: this machine exposes no RAPL counters (virtual machines don't)"
            )
        self._last: list[int] | None = None
        self._total = 0

    def __call__(self) -> float:
        """Raises DeviceError where the counters can't be read."""
        try:
            now = [int(path.read_text()) for path in self._files]
            for path, new, old in zip(self._files, now, self._last or now, strict=True):
                span = int(path.with_name("max_energy_range_uj").read_text()) if new < old else 0
                self._total += new - old + span
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DeviceError(
                f"energy can't be measured here: the RAPL counters can't be read ({reason}); they are root's on most "
                "systems"
            ) from error
        self._last = now
        return self._total / 1e6


def _nvml() -> Counter:
    """The first GPU's counter."""
    try:
        pynvml: Any = import_module("pynvml")
    except ImportError as error:
        raise DeviceError(
            "energy can't be measured here: a GPU's counter needs NVML: pip install nvidia-ml-py"
        ) from error
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        raise DeviceError(f"energy can't be measured here: NVML says: {error}") from error
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
