from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from PIL import Image

from imagemill.shared.errors import ConfigurationError, UsageError
from imagemill.worker.models.checksums import digest
from imagemill.worker.models.commands import models
from imagemill.worker.models.files import model_file, record_variant, variant, variant_record
from imagemill.worker.models.quantize import quantize
from imagemill.worker.models.typical_images import divide
from imagemill.worker.operations.remove_background import garments
from imagemill.worker.operations.remove_background.model_families import FAMILIES
from tests.conftest import photo
from tests.models import in_half_precision
from tests.special_models import bright_onnx, garments_onnx
from tests.unit.worker.models.test_added import record

SIZE = 64


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven photos in nested folders, a duplicate, and a file that is not an image."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "deeper").mkdir()
    for seed in range(7):
        (folder / ("deeper" if seed % 2 else "") / f"{seed}.png").write_bytes(photo(seed))
    (folder / "again.png").write_bytes(photo(0))
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A weights folder with a small network called u2net."""
    original = bright_onnx(tmp_path / "rembg" / "u2net.onnx", size=SIZE)
    record_variant(original, "fp32", accepted=False, details={"outcome": "needless"})  # to find this out takes a process
    return tmp_path


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small u2net's."""
    monkeypatch.setitem(FAMILIES, "u2net", replace(FAMILIES["u2net"], size=SIZE))


def test_accepted_model_is_written_next_to_the_original_with_its_report_and_runs(weights: Path, images: Path) -> None:
    original, steps = weights / "rembg" / "u2net.onnx", set()
    report = quantize("u2net", weights, images, accept=0.0, faster=0.0, progress=lambda step, *_: steps.add(step))
    assert (report.accepted, report.calibrated, report.held_back, report.passed_over) == (True, 5, 2, 2)
    assert report.tried == (report.best,)
    assert report.best.method == "static, percentile 99.9"
    assert 0 < report.best.worst <= report.best.iou <= 1
    assert report.best.int8_bytes < report.fp32_bytes
    assert steps >= {"calibrating", "comparing (static, percentile 99.9)"}
    made = variant(original, "int8")
    assert model_file(weights, "rembg", "u2net", int8=True) == made
    assert model_file(weights, "rembg", "u2net") == original
    record = variant_record(original, "int8")
    assert (record["iou"], record["sha256"]) == (report.best.iou, digest(made))
    assert [row["method"] for row in record["tried"]] == ["static, percentile 99.9"]
    kinds = Counter(node.op_type for node in onnx.load(made).graph.node)
    assert kinds["QuantizeLinear"] > 0
    assert kinds["DequantizeLinear"] > kinds["QuantizeLinear"]  # weights are stored in 8 bits
    session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"input": np.zeros((2, 3, SIZE, SIZE), np.float32)})  # only what nodes read
    assert output.shape == (2, 1, SIZE, SIZE)
    assert not [path for path in original.parent.iterdir() if path.is_dir()]


def test_search_goes_on_until_a_copy_is_good_enough_and_keeps_none_if_all_are_too_bad(
    weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagemill.worker.models.eight_bit_search.BLOCKS", 3)
    monkeypatch.setattr("imagemill.worker.models.eight_bit_search.FLOATING", (1, 2))
    original = weights / "rembg" / "u2net.onnx"
    variant(original, "int8").write_bytes(b"made before")
    record_variant(original, "int8", accepted=True, details={})
    before = {path.name for path in original.parent.iterdir()}
    report = quantize("u2net", weights, images, accept=1.01, faster=0.0)
    assert not report.accepted
    methods = [row.method for row in report.tried]
    assert methods[:4] == ["static, percentile 99.9", "static, percentile 99.99", "static, min-max", "dynamic"]
    blocks = [method.rpartition(", ")[2] for method in methods[4:]]
    assert blocks == ["1 of 3 blocks in 32 bits", "2 of 3 blocks in 32 bits"]
    assert not [row.error for row in report.tried if row.error]
    assert report.tried[-1].int8_bytes > report.tried[0].int8_bytes
    assert report.best == max(report.tried, key=lambda row: min(row.iou / 1.01, row.worst / 0.9))
    assert report.shortcoming() == "the 8-bit masks differ too much"
    assert model_file(weights, "rembg", "u2net", int8=True).read_bytes() == b"made before"
    assert {path.name for path in original.parent.iterdir()} == before

    found = iter([0.5, 0.5, 1.0, 1.0])  # of two images each
    monkeypatch.setattr("imagemill.worker.models.eight_bit_search.overlap", lambda *_: next(found))
    second = quantize("u2net", weights, images, faster=0.0)
    assert (second.accepted, second.best.method, len(second.tried)) == (True, "static, percentile 99.99", 2)
    assert variant_record(original, "int8")["method"] == "static, percentile 99.99"


def test_search_ends_soon_if_8_bits_are_not_faster_on_this_cpu(weights: Path, images: Path) -> None:
    report = quantize("u2net", weights, images, accept=0.0, faster=1e6)
    assert [row.method for row in report.tried] == ["static, percentile 99.9", "dynamic"]
    assert not report.accepted
    assert report.shortcoming().startswith("the 8-bit models are not fast enough")


def test_failed_copy_is_reported_and_the_next_one_is_tried(
    weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such node")

    monkeypatch.setattr("imagemill.worker.models.eight_bits.make_static", fail)
    report = quantize("u2net", weights, images, accept=0.0, faster=0.0)
    assert [(row.method, row.error) for row in report.tried] == [
        ("static, percentile 99.9", "no such node"),
        ("static, percentile 99.99", "no such node"),
        ("static, min-max", "no such node"),
        ("dynamic", ""),
    ]
    assert (report.accepted, report.best.method) == (True, "dynamic")


def test_model_in_half_precision_is_converted_first(tmp_path: Path, images: Path) -> None:
    original = in_half_precision(bright_onnx(tmp_path / "full.onnx", size=SIZE), tmp_path / "rembg" / "u2net.onnx")
    assert quantize("u2net", tmp_path, images, accept=0.0, faster=0.0).accepted
    assert model_file(tmp_path, "rembg", "u2net") == variant(original, "fp32")
    assert model_file(tmp_path, "rembg", "u2net", int8=True) == variant(original, "int8")


@pytest.mark.parametrize("vnni", [True, False])
def test_weights_of_8_bits_are_only_used_where_they_do_not_saturate(
    weights: Path, monkeypatch: pytest.MonkeyPatch, vnni: bool
) -> None:
    original = weights / "rembg" / "u2net.onnx"
    variant(original, "int8").write_bytes(b"8 bits")
    record_variant(original, "int8", accepted=True, details={"needs_vnni": True})
    monkeypatch.setattr("imagemill.worker.models.files.has_vnni", lambda: vnni)
    assert model_file(weights, "rembg", "u2net", int8=True) == (variant(original, "int8") if vnni else original)


def test_command_prints_the_table_and_the_report(weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMILL_WEIGHTS__FOLDER", str(weights))
    command = ["quantize", "u2net", "--images", str(images), "--faster", "0", "--accept"]
    done = CliRunner().invoke(models, [*command, "0"])
    assert done.exit_code == 0, done.output
    header, row = done.stdout.splitlines()[0], done.stdout.splitlines()[2]
    assert header.split() == ["tried", "mean", "IoU", "lowest", "ms", "times", "as", "fast", "MB"]
    assert row.split()[:3] == ["static,", "percentile", "99.9"]
    assert "calibrated on 5 images, compared 2 masks of 2 others; skipped 2 files" in done.stdout
    assert "times as fast" in done.stdout
    assert "IMAGEMILL_ONNX__INT8=true" in done.stdout
    monkeypatch.setattr("imagemill.worker.models.eight_bit_search.overlap", lambda *_: 0.5)
    rejected = CliRunner().invoke(models, [*command, "0.97", "--faster", "1e6", "--json"])
    assert rejected.exit_code == 1
    report = json.loads(rejected.stdout)
    assert (report["accepted"], report["iou"], report["wanted"], len(report["tried"])) == (False, 0.5, 0.97, 2)
    assert rejected.stderr == "rejected: the 8-bit masks differ too much; the earlier 8-bit model stays\n"
    variant(weights / "rembg" / "u2net.onnx", "int8").unlink()
    rejected = CliRunner().invoke(models, [*command, "0.97", "--faster", "1e6"])
    assert rejected.stderr == "rejected: the 8-bit masks differ too much; nothing was kept\n"


def test_missing_model_is_an_error_with_the_pull_command(tmp_path: Path, images: Path) -> None:
    with pytest.raises(ConfigurationError, match="imagemill models pull u2net"):
        quantize("u2net", tmp_path, images)


def test_missing_file_of_an_added_model_is_an_error_with_the_add_command(tmp_path: Path, images: Path) -> None:
    record(tmp_path, "shop", parameters={"size": SIZE, "mean": [0, 0, 0], "deviation": [1, 1, 1]})
    (tmp_path / "rembg" / "shop.onnx").unlink()
    with pytest.raises(ConfigurationError, match="imagemill models add shop SOURCE --replace"):
        quantize("shop", tmp_path, images)


@pytest.fixture
def garments_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights folder with a small `u2net_cloth_seg`."""
    original = tmp_path / "rembg" / "u2net_cloth_seg.onnx"
    garments_onnx(original, size=SIZE)
    record_variant(original, "fp32", accepted=False, details={"outcome": "needless"})
    monkeypatch.setattr(garments, "FAMILY", replace(garments.FAMILY, size=SIZE))
    return original


def test_garments_are_compared_one_by_one(garments_model: Path, tmp_path: Path) -> None:
    """Red, green and blue show a garment each; the rest is white."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(5):
        pixels = np.full((SIZE, SIZE, 3), 255, np.uint8)
        for colour in range(3 if number % 2 else 2):
            pixels[8 + number : 48, 20 * colour : 20 * colour + 16] = np.eye(3, dtype=np.uint8)[colour] * 255
        Image.fromarray(pixels).save(photos / f"{number}.png")
    weights = garments_model.parents[1]
    report = quantize("u2net_cloth_seg", weights, photos, accept=0.0, faster=0.0)
    _, held_back, _ = divide(photos)
    assert report.accepted
    assert report.masks == sum(3 if int(path.stem) % 2 else 2 for path in held_back)
    assert 0 < report.best.worst <= report.best.iou <= 1
    assert f"compared {report.masks} masks of 2 others" in report.summary()
    assert model_file(weights, "rembg", "u2net_cloth_seg", int8=True) == variant(garments_model, "int8")


def test_photos_in_which_the_model_finds_nothing_are_refused_before_the_search(garments_model: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(5):
        Image.new("RGB", (40 + number, 40), "white").save(photos / f"{number}.png")
    steps = set[str]()
    with pytest.raises(UsageError, match=r"^the model finds nothing in the 2 images held back"):
        quantize("u2net_cloth_seg", garments_model.parents[1], photos, progress=lambda step, *_: steps.add(step))
    assert "calibrating" not in steps
    assert not list(garments_model.parent.glob(".*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            (
                name,
                f"{name} can't be quantised, since its masks depend on points and boxes; "
                "sam-quant is the same model with 8 bits: imagemill models pull sam-quant",
            )
            for name in ("sam", "sam.encoder")
        ),
        ("sam-vit-l-quant", "sam-vit-l-quant has 8 bits already"),
        ("house", "house can't be quantised: it doesn't run on onnxruntime"),
    ],
)
def test_models_that_cannot_be_quantised_are_refused_before_anything_is_read(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setenv("IMAGEMILL_WEIGHTS__FOLDER", str(tmp_path))
    record(tmp_path, "house", kind="checkpoint", family="sd15")
    done = CliRunner().invoke(models, ["quantize", name, "--images", str(images)])
    assert isinstance(done.exception, UsageError)
    assert done.exception.message == message


def test_model_of_8_bits_is_refused(weights: Path, images: Path) -> None:
    original = weights / "rembg" / "u2net.onnx"
    model = onnx.load(original)
    model.graph.node[0].op_type = "ConvInteger"
    onnx.save(model, original)
    with pytest.raises(UsageError, match=r"^u2net has 8 bits already$"):
        quantize("u2net", weights, images)


@pytest.mark.parametrize(("content", "reason"), [(b"", "it holds no network"), (b"no network", "Error parsing message")])
def test_damaged_file_is_told_with_the_command_that_checks_it(weights: Path, images: Path, content: bytes, reason: str) -> None:
    (weights / "rembg" / "u2net.onnx").write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"u2net.onnx can't be read \({reason}.*: .*`imagemill models verify u2net`$"):
        quantize("u2net", weights, images)


def test_model_that_cannot_be_converted_to_single_precision_is_refused(weights: Path, images: Path) -> None:
    details = {"outcome": "refused", "reason": "for one image the output differs by 3, more than 0.1"}
    record_variant(weights / "rembg" / "u2net.onnx", "fp32", accepted=False, details=details)
    with pytest.raises(UsageError, match=r"can't be converted to single precision: for one image the output differs by 3"):
        quantize("u2net", weights, images)


def test_folder_that_cannot_be_written_is_told_before_the_search(weights: Path, images: Path) -> None:
    (weights / "rembg" / ".making-u2net.int8.onnx").touch()
    with pytest.raises(ConfigurationError, match="rembg can't be written: "):
        quantize("u2net", weights, images)


def test_second_process_is_refused_and_what_a_killed_one_has_left_is_deleted(weights: Path, images: Path) -> None:
    work = weights / "rembg" / ".making-u2net.int8.onnx"
    work.mkdir()
    (work / "copy.onnx").write_bytes(b"half")
    other = os.open(work, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match=r"^another process is quantising u2net$"):
        quantize("u2net", weights, images)
    assert (work / "copy.onnx").read_bytes() == b"half"
    os.close(other)
    assert quantize("u2net", weights, images, accept=0.0, faster=0.0).accepted
    assert not work.exists()


@pytest.mark.parametrize("step", ["masks", "calibrating", "comparing (static, percentile 99.9)"])
def test_ctrl_c_leaves_everything_as_it_was(weights: Path, images: Path, step: str) -> None:
    original = weights / "rembg" / "u2net.onnx"
    variant(original, "int8").write_bytes(b"made before")
    before = {path: path.read_bytes() for path in original.parent.iterdir()}

    def interrupt(now: str, *_: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize("u2net", weights, images, progress=interrupt)
    assert {path: path.read_bytes() for path in original.parent.iterdir()} == before
