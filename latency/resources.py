"""Memory and energy, as far as they can be had honestly.

`memory` is analytic: the most that inputs and outputs of any one layer take together at batch 1, which no order of
execution can undercut. Energy is read from the machine's own counters (RAPL) where it exposes them; it is not monotone
in the widths, so it is reported and no budget can rest on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from amc.cost import Cost, FunctionCost
from amc.errors import DeviceError
from amc.groups import Structure
from latency.predict import Shapes

RAPL = Path("/sys/class/powercap")
FLOAT = 4


def activation_memory(structure: Structure) -> Cost:
    """The cost `memory`, bytes: the largest output of a multiplying layer, and what it was computed from.

    A layer's input has as many positions as the layer before it put out; a lower bound of the true peak, exact for
    chains whose elementwise operations run in place. Never falls as a width grows.
    """
    shapes = Shapes.of(structure)
    names = [name for name in structure.positions if len(structure.tensors[name].shape) > 1]
    positions = np.array([structure.positions[name] for name in names], dtype=float)
    before = np.concatenate([positions[:1], positions[:-1]])

    def peak(widths: Sequence[int] | np.ndarray) -> float:
        gone = shapes.channels - np.asarray(widths)
        outputs = (shapes.outputs - gone @ shapes.lost_outputs) * positions
        inputs = (shapes.inputs - gone @ shapes.lost_inputs) * before
        inputs = np.where(shapes.inputs == 1, outputs, inputs)  # a depthwise layer reads as many channels as it writes
        return FLOAT * float((outputs + inputs).max(initial=0.0))

    return FunctionCost("memory", "B", peak)


def energy_joules() -> float:
    """The processor's energy counter, J, since some point in time. Raises DeviceError where there is none to read."""
    counters = sorted(RAPL.glob("intel-rapl:[0-9]*/energy_uj")) if RAPL.is_dir() else []
    counters = [path for path in counters if path.parent.name.count(":") == 1]  # packages; their parts are within them
    try:
        values = [int(path.read_text()) for path in counters]
    except OSError as error:
        raise DeviceError(
            f"energy can't be measured here: the RAPL counters can't be read ({error.strerror})"
        ) from error
    if not values:
        raise DeviceError(
            "energy can't be measured here: this machine exposes no RAPL counters (virtual machines don't)"
        )
    return sum(values) / 1e6
