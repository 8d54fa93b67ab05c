"""A model from anyone opens, or ends in one clear error: external, truncated, malformed, for another provider."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from amc.errors import AmcError, DeviceError, ModelError
from latency import open_session, random_feeds, session


def model(rows: int | str = "batch", kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "weight")
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["f", "weight"], ["y"]),
        ],
        "net",
        [helper.make_tensor_value_info("x", kind, [rows, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, 3])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


GOOD = model().SerializeToString()


def test_opens_from_bytes_and_from_a_file(tmp_path):
    (tmp_path / "a.onnx").write_bytes(GOOD)
    x = np.ones((2, 4), dtype=np.float32)
    expected = x @ np.arange(12, dtype=np.float32).reshape(4, 3)
    for source in (GOOD, tmp_path / "a.onnx", str(tmp_path / "a.onnx")):
        assert np.array_equal(open_session(source).run(None, {"x": x})[0], expected)


def test_threads_are_fixed_and_do_not_spin():
    options = open_session(GOOD, threads=2).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT16])
def test_feeds_fit_and_depend_on_the_seed_alone(kind):
    opened = open_session(model(kind=kind).SerializeToString())
    one, same, other = (random_feeds(opened, 5, seed)["x"] for seed in (1, 1, 2))
    assert one.shape == (5, 4)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    opened.run(None, {"x": one})


def test_a_fixed_batch_is_said():
    opened = open_session(model(rows=1).SerializeToString())
    assert random_feeds(opened, 1, 0)["x"].shape == (1, 4)
    with pytest.raises(ModelError, match="fixed to a batch of 1, but 8 is asked"):
        random_feeds(opened, 8, 0)


def test_feeds_are_capped():
    with pytest.raises(ModelError, match="take more than"):
        random_feeds(open_session(GOOD), 10**9, 0)


def test_external_data_is_refused(tmp_path):
    proto = model()
    onnx.external_data_helper.convert_model_to_external_data(proto, location="weights.bin", size_threshold=0)
    onnx.save(proto, tmp_path / "outside.onnx")
    proto = onnx.load(tmp_path / "outside.onnx", load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = "../../../../etc/passwd"
    for source in (tmp_path / "outside.onnx", proto.SerializeToString()):
        with pytest.raises(ModelError, match="keeps weights in other files"):
            open_session(source)


def test_external_data_is_found_in_subgraphs():
    hidden = model().graph.initializer[0]
    hidden.data_location = TensorProto.EXTERNAL
    constant = helper.make_node("Constant", [], ["c"], value=hidden)
    inner = helper.make_graph([constant], "inner", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [4, 3])])
    proto = model()
    proto.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner))
    with pytest.raises(ModelError, match="keeps weights in other files"):
        open_session(proto.SerializeToString())


def test_a_missing_file_a_folder_and_other_files_are_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("not a model at all, but long enough to be parsed as one")
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name in ("missing.onnx", "text.onnx", "empty.onnx", "."):
        with pytest.raises(ModelError):
            open_session(tmp_path / name)


def test_a_file_over_the_cap_is_refused_unread(tmp_path, monkeypatch):
    (tmp_path / "a.onnx").write_bytes(GOOD)
    monkeypatch.setattr(session, "MAX_BYTES", len(GOOD) - 1)
    with pytest.raises(ModelError, match="larger than"):
        open_session(tmp_path / "a.onnx")


@pytest.mark.parametrize("dims", [(4, 4), (400, 300), (2**40, 2**40), (-4, 3)])
def test_a_weight_of_the_wrong_size_is_refused(dims):
    proto = model()
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend(dims)
    with pytest.raises(ModelError):
        open_session(proto.SerializeToString())


def test_an_absent_provider_names_those_there_are():
    with pytest.raises(DeviceError, match=r"no provider `quantum`; it has: .*cpu"):
        open_session(GOOD, providers=["quantum"])
    assert open_session(GOOD, providers=["CPU"]).get_providers() == ["CPUExecutionProvider"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.data())
def test_mutated_files_open_or_end_in_our_error(data):
    broken = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(broken)) | st.just(len(broken)))
    try:
        opened = open_session(bytes(broken[:cut]))
        random_feeds(opened, 1, 0)
    except AmcError as error:
        assert str(error)  # noqa: PT017  (either outcome is right; any other exception fails the test)


def test_a_provider_that_the_device_lacks_is_refused_before_anything_is_measured():
    from latency import open_device
    from latency.device import check_providers

    check_providers(open_device("local"), ["cpu", "CPUExecutionProvider"])
    with pytest.raises(
        DeviceError, match="--latency-providers tpu: the ONNX Runtime of local has no such provider; it"
    ):
        check_providers(open_device("local"), ["cpu", "tpu"])
