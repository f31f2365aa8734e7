"""What is recognised of ONNX files that an operator adds, and which ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.models.matting import KINDS, Recognised, Said, recognise
from tests.models import u2net_onnx
from tests.networks import network


def recognised(path: Path, **said: Any) -> Recognised:
    return recognise(path, Said(**said), path.parent)


def taking(*shape: int | str, name: str = "input", kind: int = TensorProto.FLOAT) -> tuple[str, int, tuple[int | str, ...]]:
    return name, kind, shape


FREE = taking("batch", 3, "height", "width")


@pytest.mark.parametrize(
    ("made", "family", "why"),
    [
        ({"part": "stage1.rebnconvin.conv_s1.weight"}, "u2net", "its graph names rebnconv"),
        ({"part": "conv_in.rebnconv.weight"}, "isnet", "its graph names conv_in and rebnconv"),
        ({"part": "squeeze_module.0.weight"}, "birefnet", "its graph names squeeze_module"),
        ({"source": taking(1, 3, 32, 32, name="input_image")}, "birefnet", "its graph names input_image"),
        ({"part": "lr_branch.hr_branch.weight"}, "modnet", "its graph names lr_branch and hr_branch"),
        ({"part": "multifieldcrossatt.insmask_head.weight"}, "ben", "its graph names multifieldcrossatt and insmask_head"),
        ({"outputs": "abcdefg"}, "u2net", "it returns 7 mattes"),
        ({"outputs": "abcdef"}, "isnet", "it returns 6 mattes"),
        ({"source": taking(1, 3, 320, 320)}, "u2net", "it takes 320 pixels and ends in a sigmoid"),
        ({"source": taking(1, 3, 1024, 1024)}, "isnet", "it takes 1024 pixels and ends in a sigmoid"),
    ],
    ids=str,
)
def test_family_is_recognised(made: dict[str, Any], family: str, why: str, tmp_path: Path) -> None:
    found = recognised(network(tmp_path / "a.onnx", **made))
    assert (found.family, found.found[0]) == (family, f"family: {family} ({why})")
    assert (found.parameters.mean, found.parameters.deviation) == (KINDS[family].mean, KINDS[family].deviation)


def test_u2net_as_published_is_recognised(tmp_path: Path) -> None:
    assert recognised(u2net_onnx(tmp_path / "u2net.onnx")).parameters == KINDS["u2net"]


@pytest.mark.parametrize(
    ("source", "said", "size", "where"),
    [
        (taking(1, 3, 64, 64), {}, 64, "fixed in its graph"),
        (taking("n", 3, 64, "width"), {}, 64, "fixed in its graph"),
        (FREE, {}, 512, "its graph takes any, its family this"),
        (FREE, {"size": 96}, 96, "as you said"),
    ],
    ids=str,
)
def test_size_is_the_graphs_or_as_given(source: Any, said: dict[str, Any], size: int, where: str, tmp_path: Path) -> None:
    found = recognised(network(tmp_path / "a.onnx", source=source), family="modnet", **said)
    assert found.parameters.size == size
    assert f"{size} x {size} pixels ({where})" in found.found[1]


def test_network_of_no_known_family_needs_mean_and_deviation(tmp_path: Path) -> None:
    mean, deviation = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)
    found = recognised(network(tmp_path / "a.onnx"), mean=mean, deviation=deviation)
    assert (found.family, found.parameters.mean, found.parameters.deviation) == ("custom", mean, deviation)
    assert recognised(network(tmp_path / "a.onnx"), family="ben", deviation=deviation).parameters.deviation == deviation


@pytest.mark.parametrize("said", ["second", "1"])
def test_output_is_the_first_or_as_said(said: str, tmp_path: Path) -> None:
    path = network(tmp_path / "a.onnx", outputs=("first", "second"))
    assert recognised(path, family="isnet").parameters.output is None
    assert recognised(path, family="isnet", output=said).parameters.output == "second"


@pytest.mark.parametrize(
    ("made", "said", "logits"),
    [
        ({}, None, False),
        ({"sigmoid": False, "weight": 20.0}, None, True),
        ({"sigmoid": False, "weight": 0.01}, None, False),
        ({}, True, True),
        ({"sigmoid": False, "weight": 20.0}, False, False),
    ],
)
def test_sigmoid_is_left_to_the_engine_only_if_the_graph_has_none(
    made: dict[str, Any], said: bool | None, logits: bool, tmp_path: Path
) -> None:
    assert recognised(network(tmp_path / "a.onnx", **made), family="ben", logits=said).parameters.logits is logits


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"source": taking(1, 1, 32, 32)}, "its input input is of the shape 1 x 1 x 32 x 32; expected batch x 3 x height"),
        ({"source": taking(1, 4, 32, 32)}, "1 x 4 x 32 x 32; expected batch x 3 x height x width, an RGB picture"),
        ({"source": taking(1, 32, 32, 3)}, "an RGB picture; this one has its channels last"),
        ({"source": taking("n", "height", "width", 3)}, "an RGB picture; this one has its channels last"),
        ({"source": taking(4, 3, 32, 32)}, "it takes 4 pictures at a time; expected one, or any number of them"),
        ({"source": taking(1, 3, 32)}, "of the shape 1 x 3 x 32; expected batch x 3 x height x width"),
        ({"source": taking(1, 3, 32, 48)}, "its input has 48 x 32 pixels; expected a square"),
        ({"source": taking(1, 3, 8192, 8192)}, "its input has 8192 x 8192 pixels; expected at most 4096"),
        ({"source": taking(1, 3, 32, 32, kind=TensorProto.UINT8)}, "takes uint8; expected floats of 32 or 16 bits"),
        ({"channels": 2}, "its output output is 1 x 2 x 32 x 32; expected one channel, 1 x 1 x 32 x 32"),
        ({"weight": np.nan}, "has values that are not finite numbers; expected a matte"),
        ({"weight": np.inf, "sigmoid": False}, "has values that are not finite numbers; expected a matte"),
        ({"weight": 0.0}, "is the same everywhere in a picture; expected a matte"),
    ],
    ids=str,
)
def test_network_that_does_not_fit_is_refused_with_what_was_expected(made: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        recognised(network(tmp_path / "a.onnx", **made), family="isnet")
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({}, "can't tell which family it is (input 1 x 3 x 32 x 32, 1 outputs): add --family with one of u2net, isnet"),
        ({"family": "resnet"}, "there is no family 'resnet' of ONNX models; there are u2net, isnet"),
        ({"family": "isnet", "size": 64}, "its input has 32 x 32 pixels, so --input-size can't be 64"),
        ({"family": "isnet", "output": "matte"}, "it has no output 'matte'; it has output"),
        ({"family": "isnet", "output": "1"}, "it has no output '1'; it has output"),
    ],
    ids=str,
)
def test_wrong_flags_for_a_network_are_refused(said: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        recognised(network(tmp_path / "a.onnx"), **said)
    assert reason in caught.value.message


def edited(path: Path, change: Any) -> Path:
    model = onnx.load(network(path))
    change(model)
    onnx.save_model(model, str(path))
    return path


def _second_input(model: Any) -> None:
    model.graph.input.append(helper.make_tensor_value_info("points", TensorProto.FLOAT, [1, 2]))


def _same_for_all(model: Any) -> None:
    """The matte is a gradient that doesn't depend on the picture."""
    gradient = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(1, 1, 32, 32)
    value = onnx.numpy_helper.from_array(gradient)
    model.graph.node.append(helper.make_node("Constant", [], ["gradient"], value=value))
    model.graph.node.append(helper.make_node("Identity", ["gradient"], ["fixed"]))
    model.graph.output[0].name = "fixed"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_second_input, "it has 2 inputs (input, points); expected one, a picture"),
        (_same_for_all, "its output fixed is the same for any picture; expected a matte with the subject"),
        (lambda model: model.graph.ClearField("output"), "it has no output; expected a matte"),
        (lambda model: model.ClearField("graph"), "it has 0 inputs (none); expected one, a picture"),
        (lambda model: setattr(model.graph.node[0], "op_type", "Convolve"), "it does not run on a picture of 32 pixels: "),
    ],
    ids=["inputs", "constant", "no output", "no graph", "operator"],
)
def test_other_graph_is_refused(change: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        recognised(edited(tmp_path / "a.onnx", change), family="isnet")
    assert reason in caught.value.message


def _newer_ir(model: Any) -> None:
    model.ir_version = 99


def _newer_opset(model: Any) -> None:
    model.opset_import[0].version = 99


@pytest.mark.parametrize(("change", "what"), [(_newer_ir, "IR version"), (_newer_opset, "opset")])
def test_file_that_is_too_new_for_the_runtime_is_refused(change: Any, what: str, tmp_path: Path) -> None:
    path = edited(tmp_path / "a.onnx", change)
    with pytest.raises(
        ConfigurationError, match=rf"^it is too new: onnxruntime .* runs models up to {what} \d+; export it for"
    ):
        recognised(path, family="isnet")


def _only_for_one(model: Any) -> None:
    """As exported with a batch of 1, and then said to take any."""
    shape = onnx.numpy_helper.from_array(np.array([1, 1, 32, 32], np.int64), "form")
    model.graph.initializer.append(shape)
    model.graph.node[-1].CopyFrom(helper.make_node("Reshape", ["matte", "form"], ["output"]))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def _mixing(model: Any) -> None:
    """Each picture's matte is the mean of all."""
    model.graph.node[-1].CopyFrom(helper.make_node("ReduceMean", ["matte"], ["mean"], axes=[0], keepdims=1))
    model.graph.node.append(helper.make_node("Expand", ["mean", "form"], ["output"]))
    model.graph.node.insert(0, helper.make_node("Shape", ["map"], ["form"]))
    model.graph.node.append(model.graph.node.pop(0))
    nodes = sorted(model.graph.node, key=lambda node: ["Conv", "Sigmoid", "Shape", "ReduceMean", "Expand"].index(node.op_type))
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


@pytest.mark.parametrize("change", [_only_for_one, _mixing])
def test_free_batch_axis_that_does_not_hold_what_it_promises_is_refused(change: Any, tmp_path: Path) -> None:
    path = edited(tmp_path / "a.onnx", change)
    with pytest.raises(
        ConfigurationError, match="takes any number of pictures, but fails with two; export it with a batch of 1: "
    ):
        recognised(path, family="isnet")


def ending(kind: str, **attributes: Any) -> Any:
    """Replaces a network's sigmoid by one more node."""

    def change(model: Any) -> None:
        model.graph.node[1].CopyFrom(helper.make_node(kind, ["map"], ["matte"], **attributes))

    return change


def _times_255(model: Any) -> None:
    weight = onnx.numpy_helper.from_array(np.array(255, np.float32), "most")
    model.graph.initializer.append(weight)
    model.graph.node[-1].CopyFrom(helper.make_node("Mul", ["matte", "most"], ["output"]))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_times_255, "for a synthetic photo"),
        (ending("Tanh"), "it ends in a tanh"),
        (ending("HardSigmoid"), "it ends in a sigmoid"),
        (ending("AveragePool", kernel_shape=[2, 2], strides=[2, 2]), "for a synthetic photo"),
    ],
    ids=["0 to 255", "-1 to 1", "hard", "half the size"],
)
def test_matte_of_another_range_or_size_is_stretched(change: Any, why: str, tmp_path: Path) -> None:
    path = edited(tmp_path / "a.onnx", change)
    if why.startswith("for"):  # only brightness, which is never negative
        found = recognised(path, mean=(0.0,) * 3, deviation=(1.0,) * 3)
    else:
        found = recognised(path, family="isnet")
    assert (found.parameters.logits, why in found.found[2]) == (False, True), found


@pytest.mark.parametrize("content", [b"\x08\x08\x12\x07pytorch"[:-3], b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(64)], ids=len)
def test_file_that_is_not_onnx_or_damaged_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"it is not an ONNX file, or it is damaged|it has 0 inputs"):
        recognised(path)


def test_cut_off_file_is_refused(tmp_path: Path) -> None:
    path = network(tmp_path / "a.onnx")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigurationError, match="it is not an ONNX file, or it is damaged"):
        recognised(path, family="isnet")


# --- weights in other files ------------------------------------------------------------------------------------------


def test_weights_in_another_file_are_taken_along(tmp_path: Path) -> None:
    path = network(tmp_path / "from" / "a.onnx", outside="a.onnx.data")
    copy = tmp_path / "work" / "a.onnx"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    found = recognise(copy, Said(family="isnet"), path.parent)
    assert found == recognised(network(tmp_path / "whole.onnx"), family="isnet")
    assert recognise(copy, Said(family="isnet"), tmp_path / "elsewhere") == found, "the copy needs no other file"


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "a/../../secret", "link", ""])
def test_weights_outside_the_folder_are_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(100))
    path = network(tmp_path / "from" / "a.onnx", outside="a.onnx.data")
    (path.parent / "link").symlink_to(tmp_path / "secret")
    model = onnx.load(path, load_external_data=False)
    next(entry for entry in model.graph.initializer[0].external_data if entry.key == "location").value = place
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ConfigurationError, match="expected a file in its own folder"):
        recognised(path, family="isnet")


def test_missing_and_incomplete_weights_are_refused(tmp_path: Path) -> None:
    path = network(tmp_path / "a.onnx", outside="a.onnx.data")
    data = tmp_path / "a.onnx.data"
    data.write_bytes(data.read_bytes()[:4])
    with pytest.raises(ConfigurationError, match="is not complete: weight lies beyond its 4 bytes"):
        recognised(path, family="isnet")
    data.unlink()
    with pytest.raises(ConfigurationError, match=r"its weights are in a\.onnx\.data, which is missing"):
        recognised(path, family="isnet")


def test_weights_that_one_file_can_not_hold_are_refused(tmp_path: Path) -> None:
    path = network(tmp_path / "a.onnx", outside="a.onnx.data")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = str(3 * 2**30) if entry.key == "length" else entry.value
    path.write_bytes(model.SerializeToString())
    with (tmp_path / "a.onnx.data").open("r+b") as file:
        file.truncate(4 * 2**30)  # sparse
    with pytest.raises(ConfigurationError, match=r"it has 3\.2 GB, and nodes take up to 2\.1 GB"):
        recognised(path, family="isnet")
