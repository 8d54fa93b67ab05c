"""Tables and the cost built on them, on a made-up device whose staircase is known."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amc.errors import DeviceError
from amc.groups import Group, Layer, Slice, Structure, TensorInfo
from latency import LatencyCost, LatencyTable, build_table, open_device
from latency.cost import _wider
from latency.sampling import SLOWED, draw, steady, table_error
from latency.table import Conditions

CHANNELS = (16, 32, 32, 48)
SAMPLE = '{"widths": [1, 1, 1, 1], "ratio": 1.0},'


def plain(channels=CHANNELS) -> Structure:
    """A chain of convolutions; each group is one's outputs and the next one's inputs."""
    names = [f"conv{i}" for i in range(len(channels) + 1)]
    shapes = [(out, into, 3, 3) for out, into in zip((*channels, 10), (3, *channels), strict=True)]
    tensors = {f"{name}.weight": TensorInfo(shape, "float32", True) for name, shape in zip(names, shapes, strict=True)}
    positions = {f"{name}.weight": 1024 >> i for i, name in enumerate(names)}
    groups = []
    for i, width in enumerate(channels):
        index = np.arange(width)
        parts = (Slice(f"conv{i}.weight", 0, index, index), Slice(f"conv{i + 1}.weight", 1, index, index))
        groups.append(Group(names[i], width, tuple(range(1, width + 1)), slices=parts, layer=Layer(names[i])))
    return Structure(tuple(groups), (), tensors, positions)


def up(width: float) -> float:
    return 16 * math.ceil(width / 16)


def staircase(widths) -> float:
    """Milliseconds: blocks of 16 channels, and a penalty where a count isn't a multiple of 4."""
    total, into = 0.2, 3.0
    for i, out in enumerate((*widths, 10)):
        total += (1024 >> i) * up(out) * (into if i == 0 else up(into)) * (1.1 if out % 4 else 1.0) * 2e-6
        into = out
    return total


def separable(channels=CHANNELS) -> Structure:
    """Pairs of a depthwise and a pointwise convolution; a group is one pair's outputs and the next pair's inputs."""
    tensors, positions, groups = {"stem.weight": TensorInfo((channels[0], 3, 3, 3), "float32", True)}, {}, []
    for i, (into, out) in enumerate(zip(channels, (*channels[1:], 10), strict=True)):
        tensors[f"deep{i}.weight"] = TensorInfo((into, 1, 3, 3), "float32", True)
        tensors[f"point{i}.weight"] = TensorInfo((out, into, 1, 1), "float32", True)
        index = np.arange(into)
        before = "stem" if i == 0 else f"point{i - 1}"
        parts = ((before, 0), (f"deep{i}", 0), (f"point{i}", 1))
        slices = tuple(Slice(f"{name}.weight", axis, index, index) for name, axis in parts)
        groups.append(Group(before, into, tuple(range(1, into + 1)), slices=slices, layer=Layer(before)))
    positions = {name: 1024 >> 2 * (int(name[-8]) if name[-8].isdigit() else 0) for name in tensors}
    return Structure(tuple(groups), (), tensors, positions)


def uneven(widths) -> float:
    """Milliseconds of `separable`: a depthwise layer of a count that 4 does not divide pays more, by the channel."""
    total = 0.02 + 1024 * up(widths[0]) * 27 * 4e-8
    for i, (into, out) in enumerate(zip(widths, (*widths[1:], 10), strict=True)):
        positions = 1024 >> 2 * i
        total += into * (positions * 8e-6 + 5e-4) if into % 4 else positions * up(into) * 2e-6
        total += positions * up(out) * (into if into < 16 else up(into)) * 4e-8
    return total


class FakeDevice:
    """Measures a file, which holds the policy's widths as JSON, by the closed form, with noise and disturbances."""

    name = "fake"

    def __init__(
        self,
        *,
        noise: float = 0.005,
        slow=lambda call: 1.0,
        fail_after: int = 10**9,
        lie=lambda call: 1.0,
        milliseconds=staircase,
    ):
        self.rng, self.calls, self.noise = np.random.default_rng(0), 0, noise
        self.slow, self.fail_after, self.lie, self.milliseconds = slow, fail_after, lie, milliseconds

    def measure(self, models, **options):
        self.calls += 1
        if self.calls > self.fail_after:
            raise DeviceError("gone")
        dense = self.milliseconds(json.loads(models["dense"]))
        found = {}
        for name, data in models.items():
            ratio = self.milliseconds(json.loads(data)) / dense * math.exp(self.noise * self.rng.standard_normal())
            ratio *= self.lie(self.calls)
            found[name] = SimpleNamespace(ratio=ratio, baseline_ms=dense * self.slow(self.calls))
        return found

    def fingerprint(self):
        return {"cpu": "made up", "cores": 2, "machine": "x", "system": "y", "onnxruntime": "1", "available": ["cpu"]}


def files(widths) -> bytes:
    return json.dumps([int(w) for w in widths]).encode()


def built(device=None, structure=None, **options) -> LatencyTable:
    options = {"samples": 120, "held_out": 20, "limit": math.inf, **options}
    return build_table(structure or plain(), files, files(CHANNELS), device or FakeDevice(), model="plain", **options)


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return built()


@pytest.fixture(scope="module")
def cost(table) -> LatencyCost:
    return LatencyCost.of(table, plain())


def test_policies_that_are_all_alike_have_no_rank_correlation(table):
    """They are, where a group has two widths and few policies are held out."""
    assert table_error(table.predictor(plain()), table.held_out[:1] * 3).spearman is None


def test_predicts_policies_it_never_saw(table):
    assert table.error is not None
    assert table.error.mean < 0.03
    assert table.error.spearman > 0.97
    assert table.error.policies == 20
    rng = np.random.default_rng(5)
    policies = np.array([draw(plain(), rng) for _ in range(200)])
    truth = np.array([staircase(policy) for policy in policies]) / staircase(CHANNELS)
    off = np.abs(table.predictor(plain())(policies) / truth - 1)
    assert off.mean() < 0.03
    assert (off < 0.1).mean() >= 0.98


def test_predicts_a_depthwise_network():
    """Its latency is uneven: policies of equal FLOPs differ by several times."""
    table = built(FakeDevice(milliseconds=uneven), separable())
    rng = np.random.default_rng(5)
    policies = np.array([draw(separable(), rng) for _ in range(200)])
    truth = np.array([uneven(policy) for policy in policies]) / uneven(CHANNELS)
    assert truth.max() > 2
    off = np.abs(table.predictor(separable())(policies) / truth - 1)
    assert off.mean() < 0.02
    assert (off < 0.1).mean() >= 0.99


def test_finds_most_of_the_free_channels_and_only_those(cost):
    wide = cost.widen((16, 17, 17, 33))
    assert wide[0] == 16
    assert min(wide[1:3]) >= 28
    assert wide[3] >= 44
    assert cost.widen((16, 16, 16, 16)) == (16, 16, 16, 16)
    assert staircase(wide) <= staircase((16, 17, 17, 33))


widths = st.tuples(*(st.integers(1, channels) for channels in CHANNELS))


@settings(max_examples=200, deadline=None)
@given(widths, widths)
def test_cost_never_falls_as_a_width_grows(cost, one, other):
    low, high = tuple(map(min, one, other)), tuple(map(max, one, other))
    assert cost(low) <= cost(one) <= cost(high)


@settings(max_examples=100, deadline=None)
@given(widths)
def test_widening_is_free_and_final(cost, policy):
    wide = cost.widen(policy)
    assert all(w >= p for w, p in zip(wide, policy, strict=True))
    assert cost(wide) == cost(policy)
    assert cost.widen(wide) == wide


def test_cost_is_milliseconds_and_true_for_widened_policies(cost):
    assert cost(CHANNELS) == pytest.approx(cost.dense)
    assert cost.dense == pytest.approx(staircase(CHANNELS), rel=0.02)
    rng = np.random.default_rng(1)
    policies = [cost.widen(draw(plain(), rng)) for _ in range(100)]
    off = [abs(cost(policy) / staircase(policy) - 1) for policy in policies]
    assert np.mean(off) < 0.05
    assert (cost.name, cost.unit) == ("latency", "ms")


def test_a_width_that_is_free_beside_wide_layers_only_is_not_free():
    """8 channels cost what 16 do where the others have 16, and half of it where they have 8 as well."""

    def joint(rows: np.ndarray) -> np.ndarray:
        return 1 + np.where(np.maximum(rows[:, 1:], rows[:, :-1]) <= 8, 1, 2).sum(axis=1)

    wider = _wider(plain(), joint, 0)
    assert wider[8] == 8
    assert (wider[9:] == 16).all()


def test_shares_name_the_layers_that_pay(cost):
    shares = cost.shares()
    truth = []
    for g in range(len(CHANNELS)):
        narrow = [1 if i == g else channels for i, channels in enumerate(CHANNELS)]
        truth.append(1 - staircase(narrow) / staircase(CHANNELS))
    assert np.argsort(shares).tolist() == np.argsort(truth).tolist()


def test_a_finalist_that_measured_slower_makes_predictions_rise(table, cost):
    policy = cost.widen((16, 16, 16, 16))
    wrong = cost.ratio(policy) * 1.08
    again = LatencyCost.of(table.corrected([(policy, wrong)] * 3), plain())
    assert abs(again.ratio(policy) / wrong - 1) < 0.01
    assert again(CHANNELS) == pytest.approx(table.dense_ms)
    assert again.ratio((1, 1, 1, 1)) <= again.ratio(policy)


def test_liars_among_the_samples_lose_their_weight():
    """Every ninth reading is off by a factor: something else ran on the model's turn only."""
    table = built(FakeDevice(lie=lambda call: 2.5 if call % 9 == 4 else 1.0), held_out=3)
    rng = np.random.default_rng(5)
    policies = np.array([draw(plain(), rng) for _ in range(200)])
    truth = np.array([staircase(policy) for policy in policies]) / staircase(CHANNELS)
    assert np.median(np.abs(table.predictor(plain())(policies) / truth - 1)) < 0.04


@pytest.mark.parametrize("slow", [range(3, 6), range(1, 6), range(7, 12)])
def test_samples_at_another_speed_of_the_machine_do_not_count(slow):
    """At half speed each kernel is slowed by another factor; here, every ratio is off by a third."""
    busy = set(slow)
    device = FakeDevice(slow=lambda call: 1.5 if call in busy else 1.0, lie=lambda call: 1.3 if call in busy else 1.0)
    table = built(device, samples=80)
    assert len(table.samples) >= 40
    assert table.dense_ms == pytest.approx(staircase(CHANNELS), rel=0.02)
    assert table.error is not None
    assert table.error.policies == 20
    off = [abs(sample.ratio * staircase(CHANNELS) / staircase(sample.widths) - 1) for sample in table.samples]
    assert max(off) < 0.1


def test_the_fastest_speed_that_enough_samples_saw_counts():
    assert steady([1.0, 1.5, 1.6, 1.7, 1.5, 1.6]) == (1.5, pytest.approx(1.5 * SLOWED))
    assert steady([1.0, 1.1, 1.6, 1.7, 1.5, 1.6])[0] == 1.0
    assert steady([1.0, 2.0, 4.0, 8.0])[0] == 1.0


def test_a_build_cut_short_goes_on_where_it_was(tmp_path):
    path = tmp_path / "table.json"
    with pytest.raises(DeviceError, match="gone"):
        built(FakeDevice(fail_after=8), path=path)
    part = LatencyTable.load(path)
    assert 40 <= len(part.samples) < 120
    assert part.error is None
    device, steps = FakeDevice(), []
    whole = built(device, path=path, progress=lambda *step: steps.append(step))
    assert whole.samples[: len(part.samples)] == part.samples
    assert LatencyTable.load(path) == whole
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    calls = device.calls
    assert built(device, path=path) == whole
    assert device.calls == calls


def test_refuses_another_model_device_or_condition(table):
    mine = FakeDevice().fingerprint()
    table.check(plain(), Conditions(), mine)
    with pytest.raises(DeviceError, match="of another model"):
        table.check(plain((16, 32, 32, 32)), Conditions())
    with pytest.raises(DeviceError, match="its cpu is made up, not other"):
        table.check(plain(), Conditions(), {**mine, "cpu": "other"})
    with pytest.raises(DeviceError, match="measured with threads 1, but 2 is asked"):
        table.check(plain(), Conditions(threads=2))


def test_a_table_stands_for_a_device_that_is_not_there(table, tmp_path):
    table.save(tmp_path / "t.json")
    device = open_device(str(tmp_path / "t.json"))
    assert device.fingerprint() == FakeDevice().fingerprint()
    with pytest.raises(DeviceError, match="nothing can be measured"):
        device.measure({"dense": b""})


def test_a_table_that_was_cut_short_stands_for_no_device(tmp_path):
    path = tmp_path / "table.json"
    with pytest.raises(DeviceError, match="gone"):
        built(FakeDevice(fail_after=8), path=path)
    with pytest.raises(DeviceError, match=r"was cut short.*finish it by `amc latency"):
        open_device(str(path))
    built(FakeDevice(), path=path)
    assert open_device(str(path)).fingerprint() == FakeDevice().fingerprint()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[: len(text) // 2], "not whole, valid JSON"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "version"),
        (lambda text: text.replace('"version": 1', '"version": 1, "extra": 0'), "extra"),
        (lambda text: text.replace('"version": 1', '"version": 1, "version": 1'), "duplicate key"),
        (lambda text: text.replace('"dense_ms": ', '"dense_ms": NaN, "x": '), "not a number"),
        (lambda text: text.replace('"dense_ms": ', '"dense_ms": -'), "dense_ms"),
        (lambda text: text.replace('"ratio": ', '"ratio": 1e999, "x": ', 1), "out of range"),
        (lambda text: text.replace('"samples": [', '"samples": [], "x": ['), "at least 1 item"),
        (lambda text: text.replace('"samples": [', '"samples": [' + 1000 * SAMPLE), "at most 1000 items"),
        (
            lambda text: text.replace('"corrections": [', '"corrections": [' + 1000 * SAMPLE + SAMPLE[:-1]),
            "at most 1000",
        ),
        (lambda text: text.replace('"channels": 48', '"channels": 3'), "does not fit its groups"),
        (lambda text: "[" * 10**5, "nested too deeply"),
        (lambda text: "[]", "not a latency table"),
    ],
)
def test_a_table_that_is_not_one_is_refused(table, tmp_path, change, says):
    table.save(tmp_path / "t.json")
    text = (tmp_path / "t.json").read_text()
    assert change(text) != text
    (tmp_path / "t.json").write_text(change(text))
    with pytest.raises(DeviceError, match=says):
        LatencyTable.load(tmp_path / "t.json")


def test_a_missing_table_is_said(tmp_path):
    with pytest.raises(DeviceError, match="can't be read"):
        LatencyTable.load(tmp_path / "none.json")
