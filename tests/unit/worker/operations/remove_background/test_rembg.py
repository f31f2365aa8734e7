"""Compares the engine with rembg on the same ONNX files, and tests what rembg does not have."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import (
    BadReference,
    ConfigurationError,
    ImageError,
    NotFound,
    Unreachable,
)
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.batching import Batcher, Recipe
from imagemill.worker.operations.base import Sample
from imagemill.worker.operations.remove_background import rembg as engine
from imagemill.worker.operations.remove_background.rembg import Rembg
from tests.models import u2net_onnx, weights_folder
from tests.unit.worker.operations.conformance import REFERENCE, scene
from tests.unit.worker.operations.remove_background.cutting import PICTURES, cut, loaded, prepared
from tests.workers import ROOT, clean_environment

MODELS = ("u2net", "isnet-general-use", "isnet-anime", "birefnet-general")
PHOTOS = os.environ.get("IMAGEMILL_BENCH_IMAGES")


OTHER_MATTING = {
    "alpha_matting": True,
    "alpha_matting_foreground_threshold": 200,
    "alpha_matting_background_threshold": 60,
    "alpha_matting_erode_size": 3,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_folder(tmp_path_factory.getbasetemp() / "weights", *MODELS)


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The rembg package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rembg imports libraries that warn
        import rembg
    return rembg


def removed(theirs: Any, weights: Path, model: str, pixels: Pixels, **more: Any) -> Pixels:
    """The result of `rembg.remove` with the engine's own model file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_CHECKSUM_DISABLED", "1")
        patch.setenv("U2NET_HOME", str(weights / "rembg"))
        session = theirs.new_session(model, providers=["CPUExecutionProvider"])
    return np.asarray(theirs.remove(Image.fromarray(pixels), session=session, **more))


@pytest.mark.parametrize("model", MODELS)
def test_exact_equals_rembg(model: str, weights: Path, theirs: Any) -> None:
    operation = loaded(weights)
    for name, pixels in PICTURES.items():
        expected = removed(theirs, weights, model, pixels)
        assert np.array_equal(cut(operation, pixels, model=model, exact=True), expected), name
        assert expected[..., 3].std() > 5, f"{name}: an empty matte would prove nothing"


@pytest.mark.parametrize(
    ("own", "rembgs"),
    [
        ({"background": "#ff8000"}, {"bgcolor": (255, 128, 0, 255)}),
        ({"mask_only": True}, {"only_mask": True}),
        ({"alpha_matting": True}, {"alpha_matting": True}),
        *[(same, same) for same in (OTHER_MATTING, {"post_process_mask": True}, OTHER_MATTING | {"post_process_mask": True})],
        ({"post_process_mask": True, "mask_only": True}, {"post_process_mask": True, "only_mask": True}),
    ],
    ids=lambda chosen: next(iter(chosen)),
)
def test_exact_equals_rembg_with_its_own_options(
    own: dict[str, Any], rembgs: dict[str, Any], weights: Path, theirs: Any
) -> None:
    pixels = PICTURES["landscape"]
    expected = removed(theirs, weights, "u2net", pixels, **rembgs)
    result = cut(loaded(weights), pixels, exact=True, **own)
    if expected.ndim == 2:
        expected = expected[..., None]
    assert np.array_equal(result, np.broadcast_to(expected[..., : result.shape[2]], result.shape))


def test_exact_skips_matting_when_the_image_is_too_large(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LARGEST", 10_000)
    operation, pixels = loaded(weights), PICTURES["landscape"]
    work = prepared(operation, pixels, exact=True, alpha_matting=True)
    result = operation.finish(work, operation.run(work.samples)).pixels
    assert np.array_equal(result, cut(operation, pixels, exact=True))
    assert work.notes == ["matting_too_large"]


def test_exact_keeps_the_source_size_and_otherwise_long_edge_applies(weights: Path) -> None:
    operation, pixels = loaded(weights), scene(40, 1700)
    assert cut(operation, pixels, exact=True).shape == (40, 1700, 4)
    assert cut(operation, pixels, exact=True, crop=True).shape[1] <= 1870
    assert cut(operation, pixels).shape == (38, 1600, 4)
    assert cut(operation, pixels, long_edge="original").shape == (40, 1700, 4)
    edges = [operation.work_edge(parse_options("remove-background", "rembg", chosen)) for chosen in ({}, {"exact": True})]
    assert edges == [1600, None]


@pytest.mark.parametrize("model", MODELS)
def test_fast_path_alpha_is_close_to_rembg(model: str, weights: Path, theirs: Any) -> None:
    operation = loaded(weights)
    for name, pixels in PICTURES.items():
        rgb = np.ascontiguousarray(pixels[..., :3])  # rembg shows hidden colours to the model, the fast path does not
        alpha = cut(operation, rgb, model=model)[..., 3].astype(int)
        assert np.abs(alpha - removed(theirs, weights, model, rgb)[..., 3]).mean() <= 1.5, name


@pytest.mark.skipif(PHOTOS is None, reason="IMAGEMILL_BENCH_IMAGES names no folder of photos")
def test_fast_path_alpha_is_close_to_rembg_on_photos(weights: Path, theirs: Any) -> None:
    operation = loaded(weights)
    for path in sorted(Path(PHOTOS or "").glob("*.jpg")):
        with Image.open(path) as image:
            image.thumbnail((1000, 790))  # larger images' input differs, which random weights turn into another matte
            pixels = np.array(image.convert("RGB"))
        alpha = cut(operation, pixels)[..., 3].astype(int)
        assert np.abs(alpha - removed(theirs, weights, "u2net", pixels)[..., 3]).mean() <= 1.5, path.name


def test_matting_thresholds_and_post_processing_apply_unless_exact_too(weights: Path, theirs: Any) -> None:
    operation, pixels = loaded(weights), PICTURES["landscape"]
    usual, other = (cut(operation, pixels, **chosen)[..., 3] for chosen in ({"alpha_matting": True}, OTHER_MATTING))
    assert np.count_nonzero(usual != other) > 100
    smooth = cut(operation, pixels, post_process_mask=True)[..., 3]
    assert set(np.unique(smooth)) == {0, 255}
    expected = removed(theirs, weights, "u2net", pixels, post_process_mask=True)[..., 3]
    assert np.count_nonzero(smooth != expected) < 0.01 * smooth.size


@pytest.mark.parametrize("dynamic", [True, False])
def test_result_does_not_depend_on_the_batch(dynamic: bool, tmp_path: Path) -> None:
    u2net_onnx(tmp_path / "rembg" / "u2net.onnx", dynamic=dynamic)
    operation = loaded(tmp_path)
    works = [prepared(operation, pixels) for pixels in PICTURES.values()]
    outputs = operation.run([sample for work in works for sample in work.samples])
    for work, output in zip(works, outputs, strict=True):
        together = operation.finish(work, [output]).pixels.astype(int)
        assert np.abs(together - operation.finish(work, operation.run(work.samples)).pixels).max() <= 1


def test_images_for_different_models_never_share_a_batch(weights: Path) -> None:
    operation = loaded(weights)
    batcher, recipe = Batcher[int](), Recipe(operation, BatchSizes(), 8, "the same for all")
    wanted = [{"model": model, "exact": exact} for model in MODELS for exact in (True, False)] * 2
    for place, chosen in enumerate(wanted):
        batcher.add(place, [Sample(None, parse_options("remove-background", "rembg", chosen))], recipe)
    while batcher:
        batch = [slot.sample.options for slot in batcher.take()[1]]
        assert len({(options.model, options.exact) for options in batch}) == 1
        assert len(batch) == 2


@pytest.mark.parametrize("exact", [True, False])
def test_empty_matte_gives_an_empty_cut_out_with_a_note(exact: bool, weights: Path) -> None:
    operation = loaded(weights)
    work = prepared(operation, PICTURES["landscape"], exact=exact)
    result = operation.finish(work, [np.full((1, 320, 320), 0.5, np.float32)]).pixels
    assert not result[..., 3].any()
    assert work.notes == ["empty_cutout"]


@pytest.mark.parametrize(
    ("chosen", "comparable", "matte"),
    [
        ({}, True, False),
        ({"background": "#ff0000"}, True, True),
        ({"crop": True}, False, True),
        ({"mask_only": True}, False, True),
    ],
    ids=str,
)
def test_evidence_holds_what_the_result_does_not_show(
    chosen: dict[str, Any], comparable: bool, matte: bool, weights: Path
) -> None:
    operation = loaded(weights)
    work = prepared(operation, PICTURES["landscape"], **chosen)
    operation.finish(work, operation.run(work.samples))
    assert work.evidence.comparable == comparable
    assert (work.evidence.alpha is not None) == matte


def test_result_is_transparent_wherever_the_source_is(weights: Path) -> None:
    pixels = PICTURES["with alpha"]
    result = cut(loaded(weights), pixels)
    assert (result[..., 3] <= pixels[..., 3]).all()
    assert result[..., 3].any()


@pytest.mark.parametrize("matting", [False, True])
def test_picture_that_is_cut_out_already_keeps_its_soft_edge(matting: bool, weights: Path) -> None:
    rows, columns = np.mgrid[:96, :128]
    pixels = np.full((96, 128, 4), (180, 60, 40, 0), np.uint8)
    pixels[..., 3] = np.clip((40 - np.hypot(rows - 48, columns - 64)) * 20, 0, 255)
    result, seen = cut(loaded(weights), pixels, alpha_matting=matting), pixels[..., 3] > 0
    assert np.array_equal(result[..., 3], pixels[..., 3])
    assert np.array_equal(result[seen], pixels[seen])


def test_exact_cuts_a_cut_out_again_as_rembg_does(weights: Path, theirs: Any) -> None:
    pixels = PICTURES["with alpha"].copy()
    pixels[:8] = pixels[-8:] = pixels[:, :8] = pixels[:, -8:] = 0
    assert np.array_equal(
        cut(loaded(weights), pixels, model=MODELS[0], exact=True), removed(theirs, weights, MODELS[0], pixels)
    )


def test_background_image_is_read_once_and_shown_behind_the_subject(weights: Path) -> None:
    asked: list[str] = []

    def read(url: str) -> Picture:
        asked.append(url)
        return Picture(np.full((30, 30, 3), (0, 0, 255), np.uint8))

    operation, pixels = loaded(weights), PICTURES["landscape"]
    for chosen in ({}, {"exact": True}):
        work = prepared(operation, pixels, read, background_image=REFERENCE, **chosen)
        assert asked.pop() == REFERENCE
        result = operation.finish(work, operation.run(work.samples)).pixels
        assert result.shape == pixels.shape
        outside = cut(operation, pixels, **chosen)[..., 3] == 0
        assert outside.any()
        assert (result[outside] == (0, 0, 255)).all()


@pytest.mark.parametrize(("error", "expected"), [(NotFound("gone"), BadReference), (Unreachable("down"), Unreachable)])
def test_unreadable_background_is_a_bad_reference_unless_retryable(
    error: ImageError, expected: type[ImageError], weights: Path
) -> None:
    def read(url: str) -> Picture:
        raise error

    with pytest.raises(expected):
        prepared(loaded(weights), PICTURES["small"], read, background_image=REFERENCE)


def test_fingerprint_depends_on_model_file_and_options(tmp_path: Path) -> None:
    folder = weights_folder(tmp_path, "u2net", "u2netp", "silueta")
    u2net_onnx(folder / "rembg" / "silueta.onnx", seed=7)
    operation = loaded(folder)

    def fingerprints(*selections: dict[str, Any]) -> list[str]:
        return [operation.fingerprint(parse_options("remove-background", "rembg", chosen)) for chosen in selections]

    before = fingerprints({}, {"model": "u2netp"}, {"model": "silueta"}, {"alpha_matting": True})
    assert len(set(before)) == 4
    assert fingerprints({}) == before[:1]
    u2net_onnx(folder / "rembg" / "u2net.onnx", seed=8)
    assert fingerprints({}) != before[:1]
    (folder / "rembg" / "silueta.onnx").unlink()
    with pytest.raises(ConfigurationError, match="models pull silueta"):
        fingerprints({"model": "silueta"})


def test_max_batch_is_a_multiple_of_the_cores_on_cpus(weights: Path) -> None:
    for cores in (1, 3):
        on_cpus = Rembg()
        on_cpus.load(Device(threads=cores, weights=weights))
        assert on_cpus.spec.max_batch % cores == 0
    on_gpu = Rembg()
    on_gpu.load(Device(provider="cuda", weights=weights))
    assert on_gpu.spec.max_batch > 1
    assert Rembg.spec.max_batch == on_gpu.spec.max_batch


PROGRAM = """
import resource, sys
from pathlib import Path
import numpy as np
from imagemill.shared.messages import Item
from imagemill.shared.engines import parse_options
from imagemill.worker.line.batch_sizes import BatchSizes
from tests.batches import run_batch
from imagemill.worker.hardware.device import Device
from imagemill.worker.operations import registry
from imagemill.worker.operations.base import Inputs
from imagemill.worker.imaging.picture import Picture

operation = registry.create("remove-background", "rembg")
operation.load(Device(threads=1, weights=Path(sys.argv[1])))
random = np.random.default_rng(0)

def picture(height, width):
    return Picture(np.full((height, width, 3), 90, np.uint8) + random.integers(0, 90, (height, width, 1), np.uint8))

def prepared(height, width, **chosen):
    options = parse_options("remove-background", "rembg", chosen)
    return operation.prepare(picture(height, width), Inputs(Item(index=0, source="https://images.example/one.png"), options))

def cut(height, width, **chosen):
    work = prepared(height, width, **chosen)
    return operation.finish(work, operation.run(work.samples)).pixels

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

def peak():  # ru_maxrss would include the parent's
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6

cut(64, 64)
"""


def in_a_process(weights: Path, program: str) -> list[str]:
    """The words that a fresh process prints that cuts out one small image and then runs `program`."""
    command = [sys.executable, "-c", PROGRAM + program, str(weights)]
    environment = clean_environment(MALLOC_ARENA_MAX="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_engine_imports_no_heavy_libraries_without_matting(weights: Path) -> None:
    heavy = ("torch", "diffusers", "rembg", "numba", "pymatting", "scipy", "skimage", "onnx")
    assert in_a_process(weights, f"print(*sorted(set({heavy!r}) & set(sys.modules)))") == []
    matted = f"cut(64, 64, exact=True, alpha_matting=True)\nprint(*sorted(set({heavy!r}) & set(sys.modules)))"
    assert "rembg" in in_a_process(weights, matted)


def test_memory_does_not_grow_with_the_number_of_images(weights: Path) -> None:
    program = """
from imagemill.worker.hardware.device import give_back  # as after each shift
sizes = [(random.integers(40, 400), random.integers(40, 400)) for _ in range(15)]
for height, width in sizes:
    cut(height, width)
give_back()
few = held()
for height, width in sizes * 4:
    cut(height, width)
give_back()
print(held() / few)
"""
    (ratio,) = in_a_process(weights, program)
    assert float(ratio) <= 1.10


def test_large_image_needs_little_more_memory_than_source_and_result(weights: Path) -> None:
    program = """
before = held()
result = cut(5000, 6000, long_edge="original")
assert result.shape == (5000, 6000, 4)
print((peak() - before) / 30)
"""
    (bytes_per_pixel,) = in_a_process(weights, program)
    assert float(bytes_per_pixel) < 3 + 1 + 4 + 2.5  # source, alpha and result, and a margin for generating the source


def test_batch_that_does_not_fit_into_memory_is_halved(tmp_path: Path) -> None:
    u2net_onnx(tmp_path / "rembg" / "u2net.onnx", width=16)
    program = """
operation = registry.create("remove-background", "rembg")
operation.load(Device(threads=16, weights=Path(sys.argv[1])))
cut(64, 64)
works = [prepared(64, 64 + extra) for extra in range(16)]
sizes = []
run = operation.run
def counted(samples):
    sizes.append(len(samples))
    return run(samples)
operation.run = counted
used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 600_000_000, resource.RLIM_INFINITY))
outputs = run_batch(operation, [sample for work in works for sample in work.samples], BatchSizes())
print(sum(isinstance(output, np.ndarray) for output in outputs), max(sizes), min(sizes))
"""
    done, largest, smallest = in_a_process(tmp_path, program)
    assert (done, largest) == ("16", "16")
    assert int(smallest) < 16
