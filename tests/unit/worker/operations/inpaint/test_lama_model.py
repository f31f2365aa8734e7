from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from imagemill.shared.errors import ConfigurationError, OperationFailed, OutOfMemory
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Grey, Pixels
from imagemill.worker.operations.inpaint import lama_model as module
from imagemill.worker.operations.inpaint.lama_generator import PREFIX, Generator
from imagemill.worker.operations.inpaint.lama_model import LamaModel
from tests.generators import lama_file, lama_weights

CPU = Device(threads=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lama_file(tmp_path_factory.mktemp("models") / "lama.safetensors")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pictures(count: int, height: int = 32, width: int = 48) -> tuple[list[Pixels], list[Grey]]:
    """Noise, with a larger hole in each further picture."""
    random = np.random.default_rng(0)
    holes = np.zeros((count, height, width), np.uint8)
    for place, hole in enumerate(holes):
        hole[8 : 8 + 4 * place + 4, 16:28] = 255
    return list(random.integers(0, 256, (count, height, width, 3), np.uint8)), list(holes)


def test_run_returns_the_generators_output(small: Path) -> None:
    sources, holes = pictures(3)
    painted = LamaModel(small, CPU).run(sources, holes)
    generator = Generator(lama_weights())
    for source, hole, pixels in zip(sources, holes, painted, strict=True):
        mask = torch.from_numpy(hole / np.float32(255))[None, None]
        image = torch.from_numpy(source / np.float32(255)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            expected = generator(torch.cat([image * (1 - mask), mask], dim=1))[0].permute(1, 2, 0).numpy() * 255
        assert pixels.dtype == np.uint8
        assert pixels.shape == source.shape
        assert pixels.flags.c_contiguous
        assert np.abs(pixels - expected).max() <= 0.51


def test_run_gives_the_same_result_in_bands(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, holes = pictures(1, 96, 64)
    whole = LamaModel(small, CPU).run(sources, holes)[0]
    monkeypatch.setattr(module, "BAND", 64 * 16)
    assert np.abs(LamaModel(small, CPU).run(sources, holes)[0].astype(int) - whole).max() <= 1


def test_run_ignores_the_pixels_in_the_hole_and_mask_values_up_to_127(small: Path) -> None:
    (source,), (hole,) = pictures(1)
    inverted = source.copy()
    inverted[hole > 0] = 255 - inverted[hole > 0]
    faint = np.where(hole > 0, 128, 127).astype(np.uint8)
    expected, of_inverted, of_faint = LamaModel(small, CPU).run([source, inverted, source], [hole, hole, faint])
    assert np.array_equal(expected, of_inverted)
    assert np.array_equal(expected, of_faint)


def test_run_leaves_its_input_unchanged_and_accepts_read_only_views(small: Path) -> None:
    sources, holes = pictures(1)
    source, hole = sources[0].copy(), holes[0].copy()
    expected = LamaModel(small, CPU).run(sources, holes)[0]
    view = np.repeat(sources[0], 2, axis=1)[:, ::2]
    view.flags.writeable = False
    assert np.array_equal(LamaModel(small, CPU).run([view], holes)[0], expected)
    assert np.array_equal(sources[0], source)
    assert np.array_equal(holes[0], hole)


def test_run_gives_each_picture_the_same_result_alone_and_accepts_no_pictures(small: Path) -> None:
    model, (sources, holes) = LamaModel(small, CPU), pictures(3)
    for together, source, hole in zip(model.run(sources, holes), sources, holes, strict=True):
        assert np.array_equal(model.run([source], [hole])[0], together)
    assert model.run([], []) == []


def test_model_uses_its_threads_and_leaves_the_random_state_unchanged(small: Path) -> None:
    state = torch.random.get_rng_state()
    LamaModel(small, Device(threads=2)).run(*pictures(1))
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None], ids=["empty", "a web page", "truncated"])
def test_damaged_file_is_named_with_the_command_that_downloads_it(content: bytes | None, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "lama.safetensors"
    path.write_bytes(small.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(ConfigurationError) as caught:
        LamaModel(path, CPU)
    assert str(path) in caught.value.message
    assert "imagemill models pull lama" in caught.value.message


def test_weights_of_another_model_are_rejected_with_the_command_that_downloads_the_right_ones(tmp_path: Path) -> None:
    path = tmp_path / "lama.safetensors"
    save_file({name: tensor for name, tensor in lama_weights().items() if ".bn_g." not in name}, path)
    with pytest.raises(ConfigurationError, match=r"not the weights of LaMa's generator.*models pull lama"):
        LamaModel(path, CPU)


def test_gpu_that_torch_cannot_use_is_rejected(small: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch can use a GPU here")
    with pytest.raises(ConfigurationError, match=r"should run on gpu3, but .* can't"):
        LamaModel(small, Device(gpu=3))


@pytest.mark.parametrize(
    ("asked", "capability", "dtype"),
    [
        ("auto", (9, 0), torch.bfloat16),
        ("auto", (8, 0), torch.bfloat16),
        ("auto", (7, 5), torch.float16),
        ("fp16", (9, 0), torch.float16),
        ("fp32", (9, 0), torch.float32),
        ("bf16", (7, 5), torch.bfloat16),
    ],
)
def test_precision_follows_the_setting_and_the_gpu(
    asked: Literal["auto", "fp32", "bf16", "fp16"],
    capability: tuple[int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert module.dtype_of(Device(gpu=0, dtype=asked)) is dtype
    assert module.dtype_of(Device(dtype=asked)) is torch.float32, "on a CPU"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pictures_share_a_batch_on_a_gpu_in_every_precision(
    dtype: torch.dtype, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, holes = pictures(3)
    expected = LamaModel(small, CPU).run(sources, holes)
    monkeypatch.setattr(module, "dtype_of", lambda _: dtype)
    model, sizes = LamaModel(small, CPU), []
    model.batches = True  # as on a GPU
    paint = model._paint

    def counted(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return paint(x)

    monkeypatch.setattr(model, "_paint", counted)
    painted = model.run(sources, holes)
    assert sizes == [3]
    assert max(np.abs(pixels.astype(int) - wanted).max() for pixels, wanted in zip(painted, expected, strict=True)) < 20


def test_compiled_model_marks_which_dimensions_vary(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[tuple[str, int]] = []
    monkeypatch.setattr(torch, "compile", lambda generator: marked.append(("compiled", 0)) or generator)
    monkeypatch.setattr(torch._dynamo, "mark_static", lambda _, axis: marked.append(("static", axis)))
    monkeypatch.setattr(torch._dynamo, "mark_dynamic", lambda _, axis: marked.append(("dynamic", axis)))
    sources, holes = pictures(2)
    expected = LamaModel(small, CPU).run(sources, holes)
    assert marked == []
    model = LamaModel(small, Device(threads=1, compile=True))
    model.batches = True
    painted = model.run(sources, holes)
    assert marked == [("compiled", 0), ("static", 1), ("static", 2), ("static", 3), ("dynamic", 0)]
    assert max(np.abs(pixels.astype(int) - wanted).max() for pixels, wanted in zip(painted, expected, strict=True)) <= 1


def test_run_fails_when_the_output_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "lama.safetensors"
    save_file(lama_weights() | {f"{PREFIX}17.bias": torch.tensor([0.0, float("nan"), 0.0])}, path)
    with pytest.raises(OperationFailed, match="NaN or infinity"):
        LamaModel(path, CPU).run(*pictures(1))


def test_run_fails_with_a_sentence_for_an_unsupported_size(small: Path) -> None:
    with pytest.raises(OperationFailed, match="running the model lama failed"):
        LamaModel(small, CPU).run(*pictures(1, 8, 8))


def too_large(_: Any) -> Tensor:
    return torch.empty(2**58)  # raises torch's own error


def raising(error: Exception) -> Callable[[Any], Tensor]:
    def paint(_: Any) -> Tensor:
        raise error

    return paint


@pytest.mark.parametrize(
    "paint",
    [
        too_large,
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
        raising(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")),
        raising(RuntimeError("std::bad_alloc")),
        raising(MemoryError()),
    ],
    ids=["torch", "CUDA", "cuDNN", "C++", "Python"],
)
def test_out_of_memory_is_recognised_and_the_model_keeps_working(
    paint: Callable[[Any], Tensor], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LamaModel(small, CPU)
    with monkeypatch.context() as patched:
        patched.setattr(model, "_paint", paint)
        with pytest.raises(OutOfMemory, match="for running the model lama"):
            model.run(*pictures(1))
    assert len(model.run(*pictures(1))) == 1


def test_out_of_memory_error_keeps_no_tensors_alive(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Tensor]] = []

    def paint(x: Tensor) -> Tensor:
        large = x.repeat(2, 1, 1, 1)
        held.extend([weakref.ref(x), weakref.ref(large)])
        return too_large(large)

    model = LamaModel(small, CPU)
    monkeypatch.setattr(model, "_paint", paint)
    with pytest.raises(OutOfMemory) as caught:
        model.run(*pictures(1))
    gc.collect()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert [reference() for reference in held] == [None, None]
