"""Compares the engine with rembg on the same ONNX files, and tests what rembg does not have."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
from PIL import Image

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import (
    BadReference,
    ConfigurationError,
    ImageError,
    ModelUnavailable,
    NotFound,
    Unreachable,
)
from imagemill.shared.messages import Item
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.batching import Batcher, Recipe
from imagemill.worker.operations.base import Inputs, Sample, Work
from imagemill.worker.operations.remove_background import rembg as engine
from imagemill.worker.operations.remove_background import sessions
from imagemill.worker.operations.remove_background.model_families import Family
from imagemill.worker.operations.remove_background.rembg import Rembg
from tests.models import u2net_onnx, weights_folder
from tests.unit.worker.models.test_added import record
from tests.unit.worker.operations.conformance import REFERENCE, scene
from tests.workers import ROOT, clean_environment

MODELS = ("u2net", "isnet-general-use", "isnet-anime", "birefnet-general")
PHOTOS = os.environ.get("IMAGEMILL_BENCH_IMAGES")
PICTURES: dict[str, Pixels] = {
    "landscape": scene(240, 400),
    "portrait": scene(500, 300, seed=1),
    "small": scene(30, 40, seed=2),
    "with alpha": scene(200, 260, channels=4, seed=3),
}


OTHER_MATTING = {
    "alpha_matting": True,
    "alpha_matting_foreground_threshold": 200,
    "alpha_matting_background_threshold": 60,
    "alpha_matting_erode_size": 3,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_folder(tmp_path_factory.getbasetemp() / "weights", *MODELS)


def loaded(weights: Path) -> Rembg:
    operation = Rembg()
    operation.load(Device(threads=1, weights=weights))
    return operation


def prepared(operation: Rembg, pixels: Pixels, read: Any = None, **chosen: Any) -> Work:
    options = parse_options("remove-background", "rembg", chosen)
    return operation.prepare(
        Picture(pixels), Inputs(Item(index=0, source="https://images.example/one.png"), options, read=read)
    )


def cut(operation: Rembg, pixels: Pixels, **chosen: Any) -> Pixels:
    work = prepared(operation, pixels, **chosen)
    return operation.finish(work, operation.run(work.samples)).pixels


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


def test_open_model_is_dropped_before_another_one_is_opened(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    alive: WeakSet[Any] = WeakSet()

    class Watched(sessions.OnnxModel):
        def __init__(self, path: Path, name: str, device: Device, size: int, output: str | None = None) -> None:
            assert not alive, "two models are open"
            super().__init__(path, name, device, size, output)
            alive.add(self)
            opened.append(name)

    monkeypatch.setattr(sessions, "OnnxModel", Watched)
    operation, pixels = loaded(weights), PICTURES["landscape"]
    assert opened == [], "loading opens no model"
    first = cut(operation, pixels, model="u2net")
    cut(operation, pixels, model="u2net", exact=True)
    other = cut(operation, pixels, model="isnet-anime")
    assert np.array_equal(cut(operation, pixels, model="u2net"), first)
    assert not np.array_equal(other, first)
    assert opened == ["u2net", "isnet-anime", "u2net"]


def test_added_model_is_used_as_its_record_says(tmp_path: Path) -> None:
    """The same file under another name, with other parameters, is another model."""
    u2net_onnx(tmp_path / "rembg" / "u2net.onnx", size=64)
    u2net_onnx(tmp_path / "rembg" / "shop.onnx", size=64)
    parameters = {"size": 64, "mean": [0.5, 0.5, 0.5], "deviation": [1, 1, 1], "logits": False}
    family, options = (
        Family(64, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)),
        parse_options("remove-background", "rembg", {"model": "shop"}),
    )

    record(tmp_path, "shop", parameters=parameters)
    operation, pixels = loaded(tmp_path), PICTURES["landscape"]
    work = prepared(operation, pixels, model="shop")
    assert np.array_equal(work.samples[0].data, family.tensor(pixels))
    fused = operation.run(work.samples)[0]
    first = operation.fingerprint(options)
    assert operation.finish(work, [fused]).pixels.shape == (*pixels.shape[:2], 4)

    record(tmp_path, "shop", parameters={**parameters, "output": "1961"})
    work = prepared(operation, pixels, model="shop")
    assert not np.array_equal(operation.run(work.samples)[0], fused), "it reads another output"
    assert operation.fingerprint(options) != first


@pytest.mark.parametrize("content", [None, "no JSON", {"kind": "vae"}, {"parameters": {"size": "large"}}], ids=str)
def test_model_without_a_usable_record_fails_the_image_alone(tmp_path: Path, content: Any) -> None:
    u2net_onnx(tmp_path / "rembg" / "u2net.onnx", size=64)
    operation = loaded(tmp_path)
    if isinstance(content, dict):
        record(tmp_path, "shop", **content)
    elif content is not None:
        (tmp_path / "added").mkdir()
        (tmp_path / "added" / "shop.json").write_text(content)
    with pytest.raises(ModelUnavailable, match="shop"):
        prepared(operation, PICTURES["small"], model="shop")


def test_model_is_reopened_when_its_file_changes(tmp_path: Path) -> None:
    """Otherwise results of the old file would be cached under the fingerprint of the new one."""
    path = u2net_onnx(tmp_path / "rembg" / "u2net.onnx")
    operation, pixels = loaded(tmp_path), PICTURES["landscape"]
    before = cut(operation, pixels)
    u2net_onnx(tmp_path / "new.onnx", seed=1).replace(path)
    after = cut(operation, pixels)
    assert not np.array_equal(after, before)
    assert np.array_equal(after, cut(loaded(tmp_path), pixels))


def test_models_stay_open_while_there_is_memory_and_leave_nothing_behind(tmp_path: Path) -> None:
    for model in ("u2net", "u2netp", "silueta"):
        size = u2net_onnx(tmp_path / "rembg" / f"{model}.onnx", width=1).stat().st_size
    operation, pixels = loaded(tmp_path), PICTURES["small"]
    operation._model.memory.limit = int(2.5 * size)
    opened = {}
    for model in ("u2net", "u2netp", "u2net", "silueta", "u2net"):
        cut(operation, pixels, model=model)
        opened[model] = weakref.ref(operation._model.current)
    assert operation._model.memory.loads == 3
    assert {model: model_is() is not None for model, model_is in opened.items()} == {
        "u2net": True,
        "u2netp": False,
        "silueta": True,
    }


def test_load_without_models_names_the_pull_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="imagemill models pull u2net"):
        loaded(tmp_path)


def test_missing_model_is_unavailable_and_others_go_on(weights: Path) -> None:
    operation = loaded(weights)
    with pytest.raises(ModelUnavailable, match="imagemill models pull silueta"):
        cut(operation, PICTURES["small"], model="silueta")
    cut(operation, PICTURES["small"])


def test_damaged_model_is_unavailable_and_others_go_on(weights: Path, tmp_path: Path) -> None:
    folder = weights_folder(tmp_path, "u2net")
    (folder / "rembg" / "silueta.onnx").write_bytes(b"<html>")
    operation = loaded(folder)
    with pytest.raises(ModelUnavailable, match="silueta can't be opened"):
        cut(operation, PICTURES["small"], model="silueta")
    cut(operation, PICTURES["small"])


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
