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
    """Torch's number of threads is as it was afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pictures(count: int, height: int = 32, width: int = 48) -> tuple[list[Pixels], list[Grey]]:
    """Noise, each with a hole in another place."""
    random = np.random.default_rng(0)
    holes = np.zeros((count, height, width), np.uint8)
    for place, hole in enumerate(holes):
        hole[8 : 8 + 4 * place + 4, 16:28] = 255
    return list(random.integers(0, 256, (count, height, width, 3), np.uint8)), list(holes)


def test_it_paints_what_the_generator_does(small: Path) -> None:
    sources, holes = pictures(3)
    made = LamaModel(small, CPU).run(sources, holes)
    generator = Generator(lama_weights())
    for source, hole, one in zip(sources, holes, made, strict=True):
        mask = torch.from_numpy(hole / np.float32(255))[None, None]
        image = torch.from_numpy(source / np.float32(255)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            wanted = generator(torch.cat([image * (1 - mask), mask], dim=1))[0].permute(1, 2, 0).numpy() * 255
        assert one.dtype == np.uint8
        assert one.shape == source.shape
        assert one.flags.c_contiguous
        assert np.abs(one - wanted).max() <= 0.51


def test_a_large_picture_is_painted_in_bands(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, holes = pictures(1, 96, 64)
    whole = LamaModel(small, CPU).run(sources, holes)[0]
    monkeypatch.setattr(module, "BAND", 64 * 16)
    assert np.abs(LamaModel(small, CPU).run(sources, holes)[0].astype(int) - whole).max() <= 1


def test_what_lies_in_the_hole_is_not_looked_at_and_a_faint_mask_is_none(small: Path) -> None:
    session = LamaModel(small, CPU)
    (source,), (hole,) = pictures(1)
    other = source.copy()
    other[hole > 0] = 255 - other[hole > 0]
    faint = np.where(hole > 0, 128, 127).astype(np.uint8)
    made = session.run([source, other, source], [hole, hole, faint])
    assert np.array_equal(made[0], made[1])
    assert np.array_equal(made[0], made[2])


def test_what_it_is_given_stays_as_it_is_and_may_be_read_only_or_a_view(small: Path) -> None:
    sources, holes = pictures(1)
    before = sources[0].copy(), holes[0].copy()
    wanted = LamaModel(small, CPU).run(sources, holes)[0]
    wide = np.repeat(sources[0], 2, axis=1)
    view = wide[:, ::2]
    view.flags.writeable = False
    assert np.array_equal(LamaModel(small, CPU).run([view], holes)[0], wanted)
    assert np.array_equal(sources[0], before[0])
    assert np.array_equal(holes[0], before[1])


def test_company_changes_nothing_and_nothing_is_nothing(small: Path) -> None:
    session, (sources, holes) = LamaModel(small, CPU), pictures(3)
    together = session.run(sources, holes)
    for one, source, hole in zip(together[::-1], sources[::-1], holes[::-1], strict=True):
        assert np.array_equal(session.run([source], [hole])[0], one)
    assert session.run([], []) == []


def test_it_keeps_to_its_threads_and_leaves_the_random_numbers_alone(small: Path) -> None:
    before = torch.random.get_rng_state()
    LamaModel(small, Device(threads=2)).run(*pictures(1))
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None], ids=["empty", "a page", "cut short"])
def test_a_damaged_file_is_named(content: bytes | None, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "lama.safetensors"
    path.write_bytes(small.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(ConfigurationError) as caught:
        LamaModel(path, CPU)
    assert str(path) in caught.value.message
    assert "imagemill models pull lama" in caught.value.message


def test_weights_of_something_else_are_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "lama.safetensors"
    save_file({name: tensor for name, tensor in lama_weights().items() if ".bn_g." not in name}, path)
    with pytest.raises(ConfigurationError, match=r"not the weights of LaMa's generator.*models pull lama"):
        LamaModel(path, CPU)


def test_a_gpu_that_torch_cant_use_is_refused(small: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this torch can")
    with pytest.raises(ConfigurationError, match=r"was to run on gpu3, but .* can't"):
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
def test_what_a_gpu_calculates_in(
    asked: Literal["auto", "fp32", "bf16", "fp16"],
    capability: tuple[int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert module.dtype_of(Device(gpu=0, dtype=asked)) is dtype
    assert module.dtype_of(Device(dtype=asked)) is torch.float32, "on a CPU"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pictures_share_a_batch_where_that_helps_in_each_type(
    dtype: torch.dtype, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, holes = pictures(3)
    wanted = LamaModel(small, CPU).run(sources, holes)
    monkeypatch.setattr(module, "dtype_of", lambda _: dtype)
    session, sizes = LamaModel(small, CPU), []
    session.batches = True  # as on a GPU
    paint = session._paint

    def counted(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return paint(x)

    monkeypatch.setattr(session, "_paint", counted)
    made = session.run(sources, holes)
    assert sizes == [3]
    assert max(np.abs(one.astype(int) - other).max() for one, other in zip(made, wanted, strict=True)) < 20


def test_compiled_it_is_told_which_shapes_are_fixed(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[tuple[str, int]] = []
    monkeypatch.setattr(torch, "compile", lambda generator: marked.append(("compiled", 0)) or generator)
    monkeypatch.setattr(torch._dynamo, "mark_static", lambda _, axis: marked.append(("static", axis)))
    monkeypatch.setattr(torch._dynamo, "mark_dynamic", lambda _, axis: marked.append(("dynamic", axis)))
    sources, holes = pictures(2)
    wanted = LamaModel(small, CPU).run(sources, holes)
    assert marked == []
    session = LamaModel(small, Device(threads=1, compile=True))
    session.batches = True
    made = session.run(sources, holes)
    assert marked == [("compiled", 0), ("static", 1), ("static", 2), ("static", 3), ("dynamic", 0)]
    assert max(np.abs(one.astype(int) - other).max() for one, other in zip(made, wanted, strict=True)) <= 1


def test_what_are_no_colours_fails_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "lama.safetensors"
    save_file(lama_weights() | {f"{PREFIX}17.bias": torch.tensor([0.0, float("nan"), 0.0])}, path)
    with pytest.raises(OperationFailed, match="no colours"):
        LamaModel(path, CPU).run(*pictures(1))


def test_a_picture_of_another_size_fails_with_a_sentence(small: Path) -> None:
    with pytest.raises(OperationFailed, match="running the model lama failed"):
        LamaModel(small, CPU).run(*pictures(1, 8, 8))


def too_large(_: Any) -> Tensor:
    return torch.empty(2**58)  # what torch itself says


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
def test_running_out_of_memory_is_told_from_other_failures(
    paint: Callable[[Any], Tensor], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = LamaModel(small, CPU)
    with monkeypatch.context() as patched:
        patched.setattr(session, "_paint", paint)
        with pytest.raises(OutOfMemory, match="for running the model lama"):
            session.run(*pictures(1))
    assert len(session.run(*pictures(1))) == 1, "it goes on afterwards"


def test_the_error_holds_none_of_the_memory_that_was_short(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Tensor]] = []

    def paint(x: Tensor) -> Tensor:
        large = x.repeat(2, 1, 1, 1)
        held.extend([weakref.ref(x), weakref.ref(large)])
        return too_large(large)

    session = LamaModel(small, CPU)
    monkeypatch.setattr(session, "_paint", paint)
    with pytest.raises(OutOfMemory) as caught:
        session.run(*pictures(1))
    gc.collect()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert [one() for one in held] == [None, None]
