from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from imagemill.worker.models import batch_axis, own_process, trials
from imagemill.worker.models.batch_axis import TOLERANCE, make
from imagemill.worker.models.checksums import digest
from imagemill.worker.models.files import model_file, variant, variant_record
from imagemill.worker.models.trials import Outcome, difference, tried
from tests.models import birefnet_like_onnx, u2net_onnx

SHAPE = [1, 3, 8, 8]


def graph(path: Path, *nodes: onnx.NodeProto, constants: Sequence[tuple[str, list[float] | list[int]]] = ()) -> Path:
    """A model from `x` [1, 3, 8, 8] to `y`; nodes may name constants."""
    kinds = {int: np.int64, float: np.float32}
    weights = [numpy_helper.from_array(np.array(value, kinds[type(value[0])]), name) for name, value in constants]
    model = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights,
    )
    onnx.save(helper.make_model(model, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def batch_of(path: Path) -> int | str:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()[0].shape[0]


def free(original: Path) -> Outcome:
    return tried(original, "dynamic", make)


def outcome_of(original: Path) -> tuple[str, str]:
    return make(original, variant(original, "dynamic"))


def test_free_makes_a_variant_that_takes_batches_with_the_same_output(tmp_path: Path) -> None:
    original = birefnet_like_onnx(tmp_path / "rembg" / "birefnet-general.onnx", size=64)
    before = digest(original)
    assert free(original) == "made"
    chosen = model_file(tmp_path, "rembg", "birefnet-general")
    assert chosen == variant(original, "dynamic")
    assert (batch_of(original), batch_of(chosen)) == (1, "batch")
    images = np.random.default_rng(0).standard_normal((3, 3, 64, 64)).astype(np.float32)
    fixed, freed = (onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (original, chosen))
    singles = [fixed.run(None, {"input_image": image[None]})[0] for image in images]
    np.testing.assert_allclose(freed.run(None, {"input_image": images})[0], np.concatenate(singles), atol=1e-3)
    assert digest(original) == before
    assert variant_record(original, "dynamic")["sha256"] == digest(chosen)
    assert not list(original.parent.glob("*.part"))


def test_free_does_not_repeat_a_recorded_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = u2net_onnx(tmp_path / "fixed.onnx", size=32, dynamic=False)
    good = u2net_onnx(tmp_path / "good.onnx", size=32)
    assert (free(fixed), free(good)) == ("made", "needless")
    monkeypatch.setattr(trials, "apart", lambda *_, **__: pytest.fail("tried again"))
    assert (free(fixed), free(good)) == ("made", "needless")


def test_killed_trial_leaves_the_original_and_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = u2net_onnx(tmp_path / "rembg" / "u2net.onnx", size=32, dynamic=False)
    with monkeypatch.context() as patch:
        patch.setattr(own_process, "_limited", exit_in_the_trial)
        assert free(original) == "killed"
    assert not variant_record(original, "dynamic")
    assert [path for path in original.parent.iterdir() if path.suffix != ".json"] == [original]
    assert model_file(tmp_path, "rembg", "u2net") == original
    assert free(original) == "made"


def exit_in_the_trial() -> None:
    """End the process as the kernel does when memory runs out, once the file to try has been written."""
    import os

    batch_axis.difference = lambda *_, **__: os._exit(9)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([helper.make_node("Reshape", ["x", "s"], ["r"]), helper.make_node("Relu", ["r"], ["y"])], [("s", [1, 3, 64])]),
        ([helper.make_node("Reshape", ["x", "s"], ["r"]), helper.make_node("Relu", ["r"], ["y"])], [("s", [1, 3, -1])]),
        # Windows as in Swin transformers: the batch is a factor of the first axis, and then an axis of its own again.
        (
            [
                helper.make_node("Reshape", ["x", "apart"], ["a"]),
                helper.make_node("Relu", ["a"], ["b"]),
                helper.make_node("Reshape", ["b", "together"], ["y"]),
            ],
            [("apart", [12, 4, 4]), ("together", [1, 3, 8, 8])],
        ),
        # A table without a batch axis, added to every image.
        (
            [helper.make_node("Reshape", ["table", "s"], ["t"]), helper.make_node("Add", ["x", "t"], ["y"])],
            [("table", [0.5] * 8), ("s", [1, 1, 1, 8])],
        ),
    ],
    ids=["whole", "inferred", "windows", "table"],
)
def test_make_rewrites_reshapes_that_fix_the_batch_size(
    tmp_path: Path, nodes: list[onnx.NodeProto], constants: list[tuple[str, list[int]]]
) -> None:
    original = graph(tmp_path / "net.onnx", *nodes, constants=constants)
    assert outcome_of(original)[0] == "made"
    assert batch_of(variant(original, "dynamic")) == "batch"


ZEROS = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros(SHAPE, np.float32)))
MEAN = helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([ZEROS, helper.make_node("Concat", ["x", "c"], ["y"], axis=1)], "Concat"),  # can't be run with two images
        ([MEAN, helper.make_node("Add", ["x", "m"], ["y"])], "for 2 images the output differs by"),
        ([MEAN, helper.make_node("Relu", ["m"], ["y"])], "for 2 images the output has shape (1, 3, 8, 8)"),
    ],
    ids=["fails", "mixes", "merges"],
)
def test_make_refuses_a_graph_whose_output_changes(tmp_path: Path, nodes: list[onnx.NodeProto], expected: str) -> None:
    outcome, reason = outcome_of(graph(tmp_path / "net.onnx", *nodes))
    assert outcome == "refused"
    assert expected in reason


def test_outputs_that_nobody_reads_are_neither_compared_nor_kept(tmp_path: Path) -> None:
    """Their sum over the batch can't be freed, but it is not what nodes read."""
    nodes = [
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Concat", ["x", "zeros"], ["unread"], axis=1),
    ]
    original = graph(tmp_path / "net.onnx", *nodes, constants=[("zeros", [0.0])])
    model = onnx.load(original)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros(SHAPE, np.float32), "zeros"))
    for place, name in ((0, "sum"), (2, "unread")):
        model.graph.output.insert(place, helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    onnx.save(model, original)
    target = variant(original, "dynamic")
    assert make(original, target, "y")[0] == "made"
    kept = onnx.load(target).graph
    assert [value.name for value in kept.output] == ["y"]
    assert [node.op_type for node in kept.node] == ["Relu"]
    assert not kept.initializer
    assert make(original, target, None)[0] == "refused"  # then the first, `sum`, is what nodes read


def test_free_refuses_a_file_that_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"not a model")
    assert free(tmp_path / "net.onnx") == "refused"
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".json"} == {"net.onnx"}


def test_difference_is_relative_to_the_range_of_the_output(tmp_path: Path) -> None:
    def scaled(name: str, factor: float) -> Path:
        scale = helper.make_node("Constant", [], ["c"], value_float=factor)
        return graph(tmp_path / name, scale, helper.make_node("Mul", ["x", "c"], ["y"]))

    original = scaled("one.onnx", 1.0)
    outcome_of(scaled("close.onnx", 1.0005))
    outcome_of(scaled("far.onnx", 1.003))
    assert difference(original, tmp_path / "close.dynamic.onnx", tolerance=TOLERANCE) is None
    assert "for one image" in str(difference(original, tmp_path / "far.dynamic.onnx", tolerance=TOLERANCE))
