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
from tests.models import birefnet_like_onnx, in_half_precision, u2net_onnx

CPU = Device(threads=1)
GPU = Device(gpu=0, provider="cuda")


def tensors(count: int, size: int = 64) -> list[NDArray[np.float32]]:
    return list(np.random.default_rng(0).standard_normal((count, 3, size, size)).astype(np.float32))


def network(path: Path, *shapes: list[int | str]) -> Path:
    """A model that returns its first input."""
    inputs = [helper.make_tensor_value_info(f"in{at}", TensorProto.FLOAT, shape) for at, shape in enumerate(shapes)]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, shapes[0])
    graph = helper.make_graph([helper.make_node("Identity", ["in0"], ["out"])], "net", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def watch_options(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options of every session opened from now on."""
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
    """A session that claims to run on CUDA, and records the batch size of each run."""

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
    """The batch size of each run on a simulated GPU."""
    OnGpu.sizes = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", OnGpu)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    return OnGpu.sizes


def test_images_share_a_batch_on_a_gpu_when_the_batch_axis_is_dynamic(small: Path, sizes: list[int]) -> None:
    session = OnnxModel(small, "u2net", GPU, 64)
    outputs = session.run(tensors(3))
    assert session.batches
    assert sizes == [3]
    assert [output.shape for output in outputs] == [(1, 64, 64)] * 3
    session.run(tensors(2), together=False)
    assert sizes == [3, 1, 1]


def test_pip_installed_gpu_libraries_are_loaded_before_the_session(
    small: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime's CUDA library can't find them otherwise and would not load."""
    steps: list[str] = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: steps.append("libraries"))
    monkeypatch.setattr(OnGpu, "get_providers", lambda _: steps.append("session") or ["CUDAExecutionProvider"])
    OnnxModel(small, "u2net", GPU, 64)
    assert steps[:2] == ["libraries", "session"]


def test_images_run_one_by_one_on_a_gpu_when_the_batch_axis_is_fixed(fixed: Path, sizes: list[int], small: Path) -> None:
    session = OnnxModel(fixed, "u2net", GPU, 64)
    outputs = session.run(tensors(3))
    assert not session.batches
    assert sizes == [1, 1, 1]
    for one, other in zip(outputs, OnnxModel(small, "u2net", GPU, 64).run(tensors(3)), strict=True):
        assert np.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("cores", "size", "lanes"), [(1, 64, 1), (3, 64, 3), (3, 1024, 1)])
def test_small_models_run_one_image_per_core_on_cpus(
    cores: int, size: int, lanes: int, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = watch_options(monkeypatch)
    session = OnnxModel(small, "u2net", Device(threads=cores), size)
    assert opened[0].intra_op_num_threads == cores + 1 - lanes
    at_a_time = Barrier(lanes, timeout=60)
    run = session._run

    def together(batch: NDArray[np.float32]) -> Any:
        at_a_time.wait()  # returns once `lanes` runs are active, otherwise fails
        return run(batch)

    monkeypatch.setattr(session, "_run", together)
    several = tensors(lanes)
    outputs = session.run(several)
    for one, tensor in zip(outputs, several, strict=True):
        assert np.array_equal(one, run(tensor[None])[0]), "in order, and equal to running alone"


def test_model_with_a_fixed_reshape_runs_several_images(tmp_path: Path) -> None:
    session = OnnxModel(birefnet_like_onnx(tmp_path / "model.onnx", size=64), "birefnet-general", CPU, 64)
    assert [output.shape for output in session.run(tensors(2))] == [(1, 64, 64)] * 2


def test_first_output_is_used(small: Path) -> None:
    (tensor,) = tensors(1)
    found = onnxruntime.InferenceSession(str(small), providers=["CPUExecutionProvider"]).run(None, {"input.1": tensor[None]})
    (output,) = OnnxModel(small, "u2net", CPU, 64).run([tensor])
    assert np.array_equal(output, found[0][0])
    assert not np.array_equal(output, found[1][0])


def test_run_without_images_returns_nothing(small: Path) -> None:
    assert OnnxModel(small, "u2net", CPU, 64).run([]) == []


def test_session_uses_its_share_of_cores_and_no_memory_arena(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = watch_options(monkeypatch)
    OnnxModel(small, "u2net", Device(threads=3), 1024)
    (options,) = opened
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert not options.enable_mem_pattern
    assert not options.enable_cpu_mem_arena


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None], ids=["empty", "a page", "cut short"])
def test_damaged_file_error_names_path_and_pull_command(content: bytes | None, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "u2net.onnx"
    path.write_bytes(small.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(ConfigurationError, match=r"u2net.*models pull u2net") as caught:
        OnnxModel(path, "u2net", CPU, 64)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_model_that_takes_half_precision_returns_single_precision(small: Path, tmp_path: Path) -> None:
    half = in_half_precision(small, tmp_path / "half.onnx", keep_io=False)
    (found,), (expected,) = (OnnxModel(path, "u2net", CPU, 64).run(tensors(1)) for path in (half, small))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize("shapes", [[["b", 3]], [["b", 3, 8, 8], ["b", 1, 8, 8]]], ids=["input is not an image", "two inputs"])
def test_model_of_another_kind_is_rejected(shapes: list[list[int | str]], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not a segmentation model"):
        OnnxModel(network(tmp_path / "u2net.onnx", *shapes), "u2net", CPU, 64)


def test_onnxruntime_error_fails_the_image(small: Path) -> None:
    with pytest.raises(OperationFailed, match="the model u2net failed"):
        OnnxModel(small, "u2net", CPU, 64).run(tensors(1, size=32))


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_unsupported_gpu_provider_is_rejected(provider: Literal["cuda", "tensorrt"], small: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime supports CUDA")
    with pytest.raises(ConfigurationError, match=r"imagemill\[rembg-gpu\]"):
        OnnxModel(small, "u2net", Device(provider=provider), 64)


def test_session_that_fell_back_to_the_cpu_is_rejected(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FallsBack(onnxruntime.InferenceSession):  # type: ignore[misc]
        """Falls back to the CPU, as onnxruntime does when CUDA's libraries can't be loaded."""

        def __init__(self, path: str, options: Any, *, providers: list[Any], **more: Any) -> None:
            assert providers[0][0] == "CUDAExecutionProvider"
            super().__init__(path, options, providers=["CPUExecutionProvider"], **more)

    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", FallsBack)
    with pytest.raises(ConfigurationError, match="could not start CUDAExecutionProvider"):
        OnnxModel(small, "u2net", Device(provider="cuda"), 64)


def test_cuda_options_limit_memory_and_allocate_on_demand() -> None:
    chain = providers(Device(gpu=3, provider="cuda", memory_limit=2**30), Path("u2net.onnx"), {})
    assert [name for name, _ in chain] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    options = chain[0][1]
    assert options["gpu_mem_limit"] == 2**30
    assert options["arena_extend_strategy"] == "kSameAsRequested"
    assert options["device_id"] == 0, "inside the process, the pinned GPU is the first"
    assert "gpu_mem_limit" not in providers(Device(provider="cuda"), Path("u2net.onnx"), {})[0][1]


def test_tensorrt_comes_before_cuda() -> None:
    shapes = {"trt_profile_max_shapes": f"input.1:{LARGEST_BATCH}x3x320x320"}
    chain = providers(Device(provider="tensorrt"), Path("weights/u2net.onnx"), shapes)
    assert [name for name, _ in chain] == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert chain[0][1].items() >= shapes.items()


@pytest.mark.parametrize(
    "message",
    [
        "std::bad_alloc",
        "Failed to allocate memory for requested buffer of size 1677721600",
        "CUDA failure 2: out of memory ; GPU=0",
        "CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_memory_errors_of_onnxruntime_become_out_of_memory(message: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException(f"[ONNXRuntimeError] : 6 : {message}")

    session = OnnxModel(small, "u2net", CPU, 64)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", refuse)
    with pytest.raises(OutOfMemory, match="u2net"):
        session.run(tensors(1))
