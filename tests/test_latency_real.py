"""Small forms of the latency benchmarks: the whole way on this machine, of which no figure decides anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from amc import architectures
from amc.coupling import trace
from amc.export import export_onnx
from benchmarks.latency_null import ratios
from latency import LatencyCost, LatencyTable, build_table, open_device, policy_files
from latency.table import Conditions


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    torch.manual_seed(0)
    model = architectures.digits_resnet().eval()
    inputs = (torch.zeros(1, 1, 8, 8),)
    path = tmp_path_factory.mktemp("real") / "dense.onnx"
    export_onnx(model, inputs, path)
    return model, inputs, trace(model, inputs), path.read_bytes()


def test_a_model_against_itself(subject):
    found = list(ratios(subject[3], runs=2, burners=0, seconds=0.1))
    assert len(found) == 2
    for reading in found:
        low, high = reading.ratio_ci95
        assert 0 < low <= high
        assert reading.ratio > 0


def test_a_table_is_built_saved_and_budgeted(subject, tmp_path):
    model, inputs, structure, dense = subject
    files = policy_files(model, structure, inputs, dense)
    device = open_device("local")
    table = build_table(
        structure, files, dense, device, model="digits", path=tmp_path / "t.json", samples=40, held_out=6, seconds=0.02
    )
    assert table.dense_ms > 0
    assert len(table.samples) >= 20
    LatencyTable.load(tmp_path / "t.json").check(structure, Conditions(), device.fingerprint())
    cost = LatencyCost.of(table, structure)
    dense_widths = [group.channels for group in structure.groups]
    assert cost(dense_widths) == pytest.approx(table.dense_ms)
    rng = np.random.default_rng(0)
    for _ in range(30):
        policy = [int(rng.choice(group.widths)) for group in structure.groups]
        wide = cost.widen(policy)
        assert all(w in group.widths for w, group in zip(wide, structure.groups, strict=True))
        assert 0 < cost(policy) == cost(wide) <= cost(dense_widths)
