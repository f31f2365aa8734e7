from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from imagemill.worker.hardware.device import Device
from imagemill.worker.models import batch_axis, single_precision
from imagemill.worker.models.files import Kind, model_file, record_variant, variant
from imagemill.worker.models.single_precision import make
from imagemill.worker.models.trials import Make, tried
from imagemill.worker.operations.remove_background.rembg import Rembg
from tests.models import in_half_precision, u2net_onnx

SIZE = 64


def outputs(path: Path, tensor: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    kind = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    found: list[np.ndarray] = session.run(None, {session.get_inputs()[0].name: tensor.astype(kind)})
    return found


def elements(path: Path) -> set[int]:
    """The types of all tensors in a file."""
    graph = onnx.load(path).graph
    tensors = [*graph.initializer, *(a.t for node in graph.node for a in node.attribute if a.HasField("t"))]
    values = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)]
    casts = [a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute]
    return {*(tensor.data_type for tensor in tensors), *values, *casts}


@pytest.mark.parametrize("keep_io", [True, False], ids=["weights", "input too"])
def test_model_in_half_precision_gets_a_variant_for_cpus_with_the_same_output(tmp_path: Path, keep_io: bool) -> None:
    full = u2net_onnx(tmp_path / "full.onnx", size=SIZE, dynamic=False)
    original = in_half_precision(full, tmp_path / "rembg" / "u2net.onnx", keep_io=keep_io)
    assert tried(original, "fp32", make) == "made"
    made = variant(original, "fp32")
    assert model_file(tmp_path, "rembg", "u2net") == made
    assert model_file(tmp_path, "rembg", "u2net", cpu=False) == original
    assert TensorProto.FLOAT16 in elements(original)
    assert TensorProto.FLOAT16 not in elements(made)
    picture = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)
    (found,), expected = outputs(made, picture), outputs(full, picture)
    assert len(expected) == 7
    np.testing.assert_allclose(found, expected[0], atol=0.03)


def test_only_gpus_use_the_variant_that_takes_batches_of_a_model_in_half_precision(tmp_path: Path) -> None:
    full = u2net_onnx(tmp_path / "full.onnx", size=SIZE, dynamic=False)
    original = in_half_precision(full, tmp_path / "rembg" / "u2net.onnx")
    makers: dict[Kind, Make] = {"fp32": single_precision.make, "dynamic": batch_axis.make}
    for kind, maker in makers.items():
        outcome, reason = maker(original, variant(original, kind))
        assert outcome == "made", reason
        record_variant(original, kind, accepted=True, details={})
    assert model_file(tmp_path, "rembg", "u2net") == variant(original, "fp32")
    assert model_file(tmp_path, "rembg", "u2net", cpu=False) == variant(original, "dynamic")
    assert TensorProto.FLOAT16 in elements(variant(original, "dynamic"))


def test_model_in_single_precision_is_used_as_it_is(tmp_path: Path) -> None:
    original = u2net_onnx(tmp_path / "rembg" / "u2net.onnx", size=SIZE)
    assert make(original, variant(original, "fp32")) == ("needless", "the model is in single precision")
    assert not variant(original, "fp32").exists()


def test_branches_of_a_graph_are_converted_too(tmp_path: Path) -> None:
    def branch(factor: float) -> onnx.GraphProto:
        value = numpy_helper.from_array(np.array(factor, np.float16), "factor")
        nodes = [
            helper.make_node("Constant", [], ["factor"], value=value),
            helper.make_node("Mul", ["half", "factor"], ["out"]),
        ]
        return helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info("out", TensorProto.FLOAT16, None)])

    yes = numpy_helper.from_array(np.array(True), "yes")
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("If", ["yes"], ["y"], then_branch=branch(2), else_branch=branch(3)),
    ]
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    graph = helper.make_graph(nodes, "net", [source], [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)], [yes])
    original = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), original)
    outcome, reason = make(original, variant(original, "fp32"))
    assert outcome == "made", reason
    (found,) = outputs(variant(original, "fp32"), np.full((1, 3, 8, 8), 0.25, np.float32))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.full_like(found, 0.5))


def test_model_whose_output_would_change_keeps_its_precision(tmp_path: Path) -> None:
    """A billionth is 0 in half precision."""
    tiny = numpy_helper.from_array(np.array(1e-9, np.float32), "tiny")
    nodes = [
        helper.make_node("Mul", ["x", "tiny"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["y"], to=TensorProto.FLOAT),
    ]
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    graph = helper.make_graph(nodes, "net", [source], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [tiny])
    original = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), original)
    outcome, reason = make(original, variant(original, "fp32"))
    assert outcome == "refused"
    assert "the output differs by" in reason


def test_file_that_is_not_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"not a model")
    assert make(tmp_path / "net.onnx", tmp_path / "new.onnx")[0] == "refused"


@pytest.mark.parametrize(("provider", "warned"), [("cpu", ["isnet-general-use"]), ("cuda", [])])
def test_node_on_a_cpu_says_which_files_would_run_slowly(
    provider: Any, warned: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rembg").mkdir()
    for name, size in (("u2netp", 4_570_000), ("isnet-general-use", 90_000_000)):
        with (tmp_path / "rembg" / f"{name}.onnx").open("wb") as file:
            file.truncate(size)  # sparse
    Rembg().load(Device(threads=1, weights=tmp_path, provider=provider))
    assert [record.__dict__["model"] for record in caplog.records] == warned
    record_variant(tmp_path / "rembg" / "isnet-general-use.onnx", "fp32", accepted=False, details={"outcome": "refused"})
    caplog.clear()
    Rembg().load(Device(threads=1, weights=tmp_path, provider=provider))
    assert not caplog.records
