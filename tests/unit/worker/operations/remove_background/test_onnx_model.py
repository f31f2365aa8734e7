from __future__ import annotations

from pathlib import Path
from threading import Barrier
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from imagemill.shared.errors import ConfigurationError, OperationFailed, OutOfMemory
from imagemill.worker.hardware.device import Device
from imagemill.worker.operations.remove_background.onnx_model import LARGEST_BATCH, OnnxModel, providers
from tests.models import birefnet_like_onnx, u2net_onnx

CPU = Device(threads=1)
GPU = Device(gpu=0, provider="cuda")


def tensors(count: int, size: int = 64) -> list[NDArray[np.float32]]:
    return list(np.random.default_rng(0).standard_normal((count, 3, size, size)).astype(np.float32))


def network(path: Path, *shapes: list[int | str]) -> Path:
    """A model that gives back the first of its inputs."""
    inputs = [helper.make_tensor_value_info(f"in{at}", TensorProto.FLOAT, shape) for at, shape in enumerate(shapes)]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, shapes[0])
    graph = helper.make_graph([helper.make_node("Identity", ["in0"], ["out"])], "net", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def watch_options(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options of each session that is opened from now on."""
    opened: list[Any] = []

    def keep(path: str, options: Any, **more: Any) -> Any:
        opened.append(options)
        return open_session(path, options, **more)

    open_session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", keep)
    return opened


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return u2net_onnx(tmp_path_factory.mktemp("models") / "u2net.onnx", size=64)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return u2net_onnx(tmp_path_factory.mktemp("models") / "u2net.onnx", size=64, dynamic=False)


class OnGpu(onnxruntime.InferenceSession):  # type: ignore[misc]
    """Says that it runs on CUDA, and remembers how many images came with each run."""

    sizes: list[int]

    def __init__(self, path: str, options: Any, *, providers: list[Any], **more: Any) -> None:
        super().__init__(path, options, providers=["CPUExecutionProvider"], **more)

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def run(self, names: Any, feed: dict[str, Any], options: Any) -> Any:
        self.sizes.append(len(next(iter(feed.values()))))
        assert options.get_run_config_entry("memory.enable_memory_arena_shrinkage") == "gpu:0"
        return super().run(names, feed)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images went through onnxruntime in each run, on what passes for a GPU."""
    OnGpu.sizes = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", OnGpu)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    return OnGpu.sizes


def test_on_a_gpu_images_share_a_batch_where_its_axis_is_free(small: Path, sizes: list[int]) -> None:
    session = OnnxModel(small, "u2net", GPU, 64)
    made = session.run(tensors(3))
    assert session.batches
    assert sizes == [3]
    assert [output.shape for output in made] == [(1, 64, 64)] * 3
    session.run(tensors(2), together=False)
    assert sizes == [3, 1, 1]


def test_before_a_session_on_a_gpu_the_libraries_that_pip_installed_are_loaded(
    small: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime's CUDA library has no path to them, and would not be loaded."""
    steps: list[str] = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: steps.append("libraries"))
    monkeypatch.setattr(OnGpu, "get_providers", lambda _: steps.append("session") or ["CUDAExecutionProvider"])
    OnnxModel(small, "u2net", GPU, 64)
    assert steps[:2] == ["libraries", "session"]


def test_on_a_gpu_images_go_one_by_one_where_the_axis_is_fixed(fixed: Path, sizes: list[int], small: Path) -> None:
    session = OnnxModel(fixed, "u2net", GPU, 64)
    made = session.run(tensors(3))
    assert not session.batches
    assert sizes == [1, 1, 1]
    for one, other in zip(made, OnnxModel(small, "u2net", GPU, 64).run(tensors(3)), strict=True):
        assert np.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("cores", "size", "lanes"), [(1, 64, 1), (3, 64, 3), (3, 1024, 1)])
def test_on_cpus_small_models_have_a_core_for_each_image(
    cores: int, size: int, lanes: int, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = watch_options(monkeypatch)
    session = OnnxModel(small, "u2net", Device(threads=cores), size)
    assert opened[0].intra_op_num_threads == cores + 1 - lanes
    at_a_time = Barrier(lanes, timeout=60)
    run = session._run

    def together(batch: NDArray[np.float32]) -> Any:
        at_a_time.wait()  # returns once so many have come, and breaks else
        return run(batch)

    monkeypatch.setattr(session, "_run", together)
    several = tensors(lanes)
    made = session.run(several)
    for one, tensor in zip(made, several, strict=True):
        assert np.array_equal(one, run(tensor[None])[0]), "in order, and the same as alone"


def test_a_reshape_that_holds_the_batch_is_no_trouble(tmp_path: Path) -> None:
    session = OnnxModel(birefnet_like_onnx(tmp_path / "model.onnx", size=64), "birefnet-general", CPU, 64)
    assert [output.shape for output in session.run(tensors(2))] == [(1, 64, 64)] * 2


def test_the_first_of_several_outputs_is_the_matte(small: Path) -> None:
    (tensor,) = tensors(1)
    found = onnxruntime.InferenceSession(str(small), providers=["CPUExecutionProvider"]).run(None, {"input.1": tensor[None]})
    (made,) = OnnxModel(small, "u2net", CPU, 64).run([tensor])
    assert np.array_equal(made, found[0][0])
    assert not np.array_equal(made, found[1][0])


def test_no_images_are_no_run(small: Path) -> None:
    assert OnnxModel(small, "u2net", CPU, 64).run([]) == []


def test_the_session_keeps_to_its_share_of_the_cores_and_gives_memory_back(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = watch_options(monkeypatch)
    OnnxModel(small, "u2net", Device(threads=3), 1024)
    (options,) = opened
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert not options.enable_mem_pattern
    assert not options.enable_cpu_mem_arena


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None], ids=["empty", "a page", "cut short"])
def test_a_damaged_file_is_named_with_what_to_do(content: bytes | None, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "u2net.onnx"
    path.write_bytes(small.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(ConfigurationError, match=r"u2net.*models pull u2net") as caught:
        OnnxModel(path, "u2net", CPU, 64)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("shapes", [[["b", 3]], [["b", 3, 8, 8], ["b", 1, 8, 8]]], ids=["no image", "two inputs"])
def test_a_model_of_another_kind_is_refused(shapes: list[list[int | str]], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no model that makes a mask"):
        OnnxModel(network(tmp_path / "u2net.onnx", *shapes), "u2net", CPU, 64)


def test_what_onnxruntime_refuses_fails_the_image_with_a_sentence(small: Path) -> None:
    with pytest.raises(OperationFailed, match="the model u2net failed"):
        OnnxModel(small, "u2net", CPU, 64).run(tensors(1, size=32))


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_gpu_that_this_onnxruntime_cant_use_is_refused(provider: Literal["cuda", "tensorrt"], small: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime can")
    with pytest.raises(ConfigurationError, match=r"imagemill\[rembg-gpu\]"):
        OnnxModel(small, "u2net", Device(provider=provider), 64)


def test_a_session_that_fell_back_to_the_cpu_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FallsBack(onnxruntime.InferenceSession):  # type: ignore[misc]
        """As onnxruntime does where CUDA's own libraries can't be loaded: a line on stderr, and on with the CPU."""

        def __init__(self, path: str, options: Any, *, providers: list[Any], **more: Any) -> None:
            assert providers[0][0] == "CUDAExecutionProvider"
            super().__init__(path, options, providers=["CPUExecutionProvider"], **more)

    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", FallsBack)
    with pytest.raises(ConfigurationError, match="could not start CUDAExecutionProvider"):
        OnnxModel(small, "u2net", Device(provider="cuda"), 64)


def test_on_a_gpu_memory_is_limited_and_taken_as_needed() -> None:
    chain = providers(Device(gpu=3, provider="cuda", memory_limit=2**30), Path("u2net.onnx"), {})
    assert [name for name, _ in chain] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    options = chain[0][1]
    assert options["gpu_mem_limit"] == 2**30
    assert options["arena_extend_strategy"] == "kSameAsRequested"
    assert options["device_id"] == 0, "inside the process the pinned GPU is the first"
    assert "gpu_mem_limit" not in providers(Device(provider="cuda"), Path("u2net.onnx"), {})[0][1]


def test_tensorrt_goes_first_and_leaves_to_cuda_what_it_cant_do() -> None:
    shapes = {"trt_profile_max_shapes": f"input.1:{LARGEST_BATCH}x3x320x320"}
    chain = providers(Device(provider="tensorrt"), Path("weights/u2net.onnx"), shapes)
    assert [name for name, _ in chain] == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert chain[0][1].items() >= shapes.items()


@pytest.mark.parametrize(
    "said",
    [
        "std::bad_alloc",
        "Failed to allocate memory for requested buffer of size 1677721600",
        "CUDA failure 2: out of memory ; GPU=0",
        "CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_running_out_of_memory_is_told_from_other_failures(said: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException(f"[ONNXRuntimeError] : 6 : {said}")

    session = OnnxModel(small, "u2net", CPU, 64)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", refuse)
    with pytest.raises(OutOfMemory, match="u2net"):
        session.run(tensors(1))
