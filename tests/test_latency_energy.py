"""Energy comes from a counter, or not at all."""

from __future__ import annotations

import itertools

import pytest

from amc.errors import DeviceError
from latency import energy
from tests.test_latency_session import GOOD


def packages(folder, **microjoules: int) -> None:
    for name, value in microjoules.items():
        path = folder / name.replace("_", ":").replace("rapl", "intel-rapl")
        path.mkdir(exist_ok=True)
        (path / "energy_uj").write_text(f"{value}\n")
        (path / "max_energy_range_uj").write_text("10000000\n")


def test_packages_add_up_and_a_counter_that_starts_again_is_followed(tmp_path):
    packages(tmp_path, rapl_0=3_000_000, rapl_1=9_500_000, rapl_0_0=1)
    counter = energy.Rapl(tmp_path)
    assert counter() == 0
    packages(tmp_path, rapl_0=3_500_000, rapl_1=1_500_000, rapl_0_0=9)
    assert counter() == pytest.approx(0.5 + 2.0)


def test_a_machine_without_counters_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path / "none")
    with pytest.raises(DeviceError, match="exposes no RAPL counters"):
        energy.energy_of({"a": GOOD})
    with pytest.raises(DeviceError, match="nothing is known that counts what openvino uses"):
        energy.open_counter(["OpenVINOExecutionProvider"])


def test_a_counter_that_can_not_be_read_says_so(tmp_path):
    packages(tmp_path, rapl_0=1)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("")
    with pytest.raises(DeviceError, match="can't be read"):
        energy.Rapl(tmp_path)()


def test_a_run_takes_its_share_of_a_turn(monkeypatch):
    monkeypatch.setattr(energy, "TURN", 0.0)  # a turn is one run
    joules = itertools.count(step=3)
    found = energy.energy_of({"a": GOOD, "b": GOOD}, turns=3, counter=lambda: float(next(joules)))
    assert found == {"a": 3.0, "b": 3.0}
