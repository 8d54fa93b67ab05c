"""Latency of each policy as measured, for rewards: the policy's own ONNX file, timed beside the dense one.

A number in milliseconds would wander with the machine's speed from trial to trial. So each policy is paired with the
dense model, and its latency is their ratio times the dense model's first reading: comparable throughout a run, whose
study keeps that reading for those who resume or share it (`search.rounds`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

from torch import nn

from amc.cost import Widths
from amc.export import export_bytes
from amc.groups import Structure
from latency.files import policy_files
from latency.paired import measure

SECONDS = 0.5
"""Time spent on each policy."""


class MeasuredLatency:
    """The cost `latency`, ms, by measurement on this machine. Not monotone, so no budget can rest on it.

    Not of use to a remote device: each trial is measured here.
    """

    name, unit = "latency", "ms"

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        structure: Structure,
        *,
        batch: int = 1,
        threads: int = 1,
        providers: Sequence[str] = ("cpu",),
    ) -> None:
        self._model, self._inputs, self._structure = model, inputs, structure
        self._measure = partial(measure, seconds=SECONDS, batch=batch, threads=threads, providers=providers)
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, widths: Widths) -> float:
        """Median latency, ms; measured once for each policy."""
        key = tuple(int(width) for width in widths)
        if key not in self._known:
            models = {"dense": self._dense, "slim": self._file(key)}
            self._known[key] = self._measure(models)["slim"].ratio
        return self._known[key] * self.dense_ms

    @cached_property
    def _dense(self) -> bytes:
        return export_bytes(self._model, self._inputs)

    @cached_property
    def dense_ms(self) -> float:
        """The unit of all others: the dense model's latency, ms, measured when first asked for unless it was set."""
        return self._measure({"dense": self._dense})["dense"].median_ms

    @cached_property
    def _file(self) -> Callable[[Sequence[int]], bytes]:
        return policy_files(self._model, self._structure, self._inputs, self._dense)
