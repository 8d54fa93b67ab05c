"""The profile's time lands on the layers that take it; memory and energy say what they can."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amc.errors import DeviceError
from amc.export import export_onnx
from latency import open_device, resources
from latency.profile import profile_layers
from tests.test_latency_table import plain


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


def test_memory_is_the_largest_pair_of_activations():
    cost = resources.activation_memory(plain())
    assert cost((16, 32, 32, 48)) == 4 * (16 * 1024 + 32 * 512)
    assert cost((8, 32, 32, 48)) == 4 * (32 * 512 + 32 * 256)
    assert cost((8, 1, 1, 1)) == 4 * (3 * 1024 + 8 * 1024)
    assert (cost.name, cost.unit) == ("memory", "B")


def test_energy_comes_from_the_packages_counters_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "RAPL", tmp_path / "none")
    with pytest.raises(DeviceError, match="exposes no RAPL counters"):
        resources.energy_joules()
    for name, value in (("intel-rapl:0", 3_000_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 1_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
    monkeypatch.setattr(resources, "RAPL", tmp_path)
    assert resources.energy_joules() == 3.5
