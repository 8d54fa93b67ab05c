"""Where the work goes, layer by layer, before and after: multiply-accumulates as counted, time as profiled.

Both files are profiled by ONNX Runtime on the device (`latency.profile`). Profiling slows a model down a little, and
what is fused is timed together, so that these times say where the time goes; totals are measured in pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amc.cost import layer_flops
from amc.errors import DeviceError, ModelError
from amc.problem import WidthsByName
from latency.device import TableDevice, open_device
from latency.profile import profile_layers
from search.compose import Setup

log = logging.getLogger("amc")


def layer_figures(setup: Setup, best: WidthsByName, files: Mapping[str, Path]) -> list[dict[str, Any]]:
    """A row for each layer, in forward order: `name`, `dense_flops`, `best_flops`, `dense_ms`, `best_ms`.

    files: the ONNX files of `dense` and `best`. The FLOPs of all rows add up to the model's. What has no weights has
    time alone; a time that was not measured is None.
    """
    structure, budget = setup.structure, setup.problem.budget
    dense_flops = layer_flops(structure, budget.dense)
    best_flops = layer_flops(structure, setup.problem.widths(best))
    times = _times(setup, files)
    return [
        {
            "name": name,
            "dense_flops": dense_flops.get(name),
            "best_flops": best_flops.get(name),
            "dense_ms": times.get(name, {}).get("dense"),
            "best_ms": times.get(name, {}).get("best"),
        }
        for name in dict.fromkeys([*dense_flops, *times])
    ]


def _times(setup: Setup, files: Mapping[str, Path]) -> dict[str, Mapping[str, float]]:
    """Milliseconds by layer and model; empty where the device can't profile."""
    settings = setup.settings
    device = setup.bench.device if setup.bench else open_device(settings.device)
    if isinstance(device, TableDevice):
        return {}
    options = {
        "batch": settings.latency_batch,
        "threads": settings.latency_threads,
        "providers": settings.latency_providers,
    }
    try:
        found = profile_layers(device, {name: path.read_bytes() for name, path in files.items()}, **options)
    except (DeviceError, ModelError) as error:
        log.warning("the time of each layer was not measured: %s", error)
        return {}
    return {row.layer: row.ms for row in found}
