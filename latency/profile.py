"""Where the time goes, by torch layer: ONNX Runtime's own profile, mapped back.

ONNX Runtime times each kernel; it fuses nodes, and names the result after one of them. A kernel belongs to the layer
whose weight its node reads, else to the module that the exporter noted on the node. What ONNX Runtime put in itself
(layout changes) goes under its operator's name in brackets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import onnx

from amc.errors import DeviceError
from latency.device import Device
from latency.origin import module_of
from latency.session import read_model

RUNS = 50


@dataclass(frozen=True)
class LayerTime:
    """One layer's time in each model.

    ms: model name -> milliseconds a run, of all its kernels together; of each the median, so that an interrupted run
        does not move it. Profiling itself slows a model by a few microseconds a kernel: compare, and measure totals
        with `latency.measure`.
    """

    layer: str
    ms: Mapping[str, float]


def profile_layers(device: Device, models: Mapping[str, bytes], **options: Any) -> list[LayerTime]:
    """Time of each layer in each model (`dense` beside `slim`, say), in the order of the first.

    options: `batch`, `threads`, `providers`, `optimization`.

    Raises:
        DeviceError: the device can't profile, or its profile is not one.
        ModelError: a model can't be read or run.
    """
    found: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        data = read_model(model)
        layers = Layers(data)
        for layer, ms in _times(device.profile(data, runs=RUNS, **options), layers).items():
            found.setdefault(layer, {})[name] = ms
    return [LayerTime(layer, times) for layer, times in found.items()]


class Layers:
    """Which torch layer a kernel of a model belongs to."""

    def __init__(self, model: bytes) -> None:
        graph = onnx.load_model_from_string(model).graph
        self._weights = {tensor.name for tensor in graph.initializer}
        self._nodes = {node.name: node for node in graph.node}
        self._producers = {output: node for node in graph.node for output in node.output}

    def of(self, kernel: str, operator: str) -> str:
        """The layer of a kernel by its name in the profile: that of a node, or of the value that it puts out."""
        name = kernel.removesuffix("_kernel_time").removesuffix("_nchwc")
        node = self._nodes.get(name) or self._producers.get(name)
        plain = operator.removeprefix("Fused")  # a convolution that takes in an activation becomes a `FusedConv`
        while node is not None and node.op_type != plain:  # what was fused into the kernel comes after its operator
            node = self._producers.get(node.input[0]) if node.input else None
        return f"[{operator}]" if node is None else self._layer(node)

    def _layer(self, node: onnx.NodeProto) -> str:
        owned = [name for name in node.input if name in self._weights and name.endswith(".weight")]
        return owned[0].removesuffix(".weight") if owned else module_of(node) or f"[{node.op_type}]"


def _times(events: list[Any], layers: Layers) -> dict[str, float]:
    kernels: dict[tuple[str, str], list[float]] = defaultdict(list)
    try:
        for event in events:
            kernels[str(event["name"]), str(event["args"]["op_name"])].append(float(event["dur"]) / 1000)
    except (KeyError, TypeError, ValueError) as error:
        raise DeviceError("the device's profile has a form that is not ONNX Runtime's") from error
    total: dict[str, float] = defaultdict(float)
    for (name, operator), times in kernels.items():
        total[layers.of(name, operator)] += median(times) * len(times) / RUNS
    return dict(total)
