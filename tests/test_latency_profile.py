"""The profile's time lands on the layers that take it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amc.errors import DeviceError, ModelError
from amc.export import export_onnx
from latency import open_device
from latency.profile import profile_layers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.big = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.big(self.norm(self.small(x)).relu()).relu().mean((2, 3)))


def test_every_layer_with_weights_has_its_time(tmp_path):
    export_onnx(Net(), (torch.zeros(1, 3, 16, 16),), tmp_path / "a.onnx")
    dense = (tmp_path / "a.onnx").read_bytes()
    rows = profile_layers(open_device("local"), {"dense": dense, "slim": dense}, threads=1)
    layers = {row.layer: row for row in rows}
    assert {"small", "big", "head"} <= set(layers)
    assert all(set(layers[name].ms) == {"dense", "slim"} for name in ("small", "big", "head"))
    assert all(ms >= 0 for row in rows for ms in row.ms.values())


def test_a_profile_that_is_none_is_refused():
    class Odd:
        def profile(self, *_, **__):
            return [{"name": 3}]

    from tests.test_latency_session import GOOD

    with pytest.raises(DeviceError, match="not ONNX Runtime's"):
        profile_layers(Odd(), {"dense": GOOD})


def test_a_run_that_was_interrupted_does_not_move_a_layers_time():
    from latency.profile import RUNS, Layers, _times
    from tests.test_latency_session import GOOD

    def event(microseconds):
        return {"name": "x_kernel_time", "dur": microseconds, "args": {"op_name": "Odd"}}

    events = [event(20)] * (RUNS - 2) + [event(40_000)] * 2
    assert _times(events, Layers(GOOD)) == {"[Odd]": pytest.approx(0.02)}


def test_a_file_that_does_not_run_is_named(tmp_path):
    """It opens, but one row makes two ranks meet."""

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x.mean((2, 3), keepdim=True).squeeze(), x.mean((2, 3))], dim=1)

    export_onnx(Odd(), (torch.zeros(2, 3, 4, 4),), tmp_path / "odd.onnx")
    with pytest.raises(ModelError, match="can't run the model"):
        profile_layers(open_device("local"), {"odd": (tmp_path / "odd.onnx").read_bytes()})
