from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

from imagemill.shared.errors import ConfigurationError, UsageError
from imagemill.worker.models.checksums import digest
from imagemill.worker.models.commands import models
from imagemill.worker.models.files import model_file, record_variant, variant, variant_record
from imagemill.worker.models.quantize import MOST, divide, overlap, quantize
from tests.conftest import photo
from tests.models import u2net_onnx


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
    """A weights folder with a small u2net."""
    u2net_onnx(tmp_path / "rembg" / "u2net.onnx")
    return tmp_path


def test_accepted_model_is_written_next_to_the_original_with_its_report_and_runs(weights: Path, images: Path) -> None:
    original, steps = weights / "rembg" / "u2net.onnx", set()
    report = quantize("u2net", weights, images, accept=0.0, progress=lambda step, *_: steps.add(step))
    assert (report.accepted, report.calibrated, report.held_back, report.passed_over) == (True, 5, 2, 2)
    assert 0 <= report.worst <= report.iou <= 1
    assert report.int8_bytes < report.fp32_bytes
    assert steps == {"preparing the graph", "calibrating", "comparing"}
    made = variant(original, "int8")
    assert model_file(weights, "rembg", "u2net", int8=True) == made
    assert model_file(weights, "rembg", "u2net") == original
    assert variant_record(original, "int8")["iou"] == report.iou
    assert variant_record(original, "int8")["sha256"] == digest(made)
    kinds = Counter(node.op_type for node in onnx.load(made).graph.node)
    assert kinds["QuantizeLinear"] > 0
    assert kinds["DequantizeLinear"] > kinds["QuantizeLinear"]  # weights are stored in 8 bits
    session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
    assert session.run(None, {"input.1": np.zeros((2, 3, 320, 320), np.float32)})[0].shape == (2, 1, 320, 320)
    assert not [path for path in original.parent.iterdir() if path.is_dir()]


def test_rejected_model_is_discarded_and_an_earlier_accepted_one_stays(weights: Path, images: Path) -> None:
    original = weights / "rembg" / "u2net.onnx"
    variant(original, "int8").write_bytes(b"made before")
    record_variant(original, "int8", accepted=True, details={})
    before = {path.name for path in original.parent.iterdir()}
    assert not quantize("u2net", weights, images, accept=1.01).accepted
    assert model_file(weights, "rembg", "u2net", int8=True).read_bytes() == b"made before"
    assert {path.name for path in original.parent.iterdir()} == before


def test_command_prints_the_report(weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMILL_WEIGHTS__FOLDER", str(weights))
    command = ["quantize", "u2net", "--images", str(images), "--accept"]
    done = CliRunner().invoke(models, [*command, "0"])
    assert done.exit_code == 0, done.output
    assert "calibrated on 5 images, compared on 2 others; skipped 2 files" in done.stdout
    assert "times as fast" in done.stdout
    assert "IMAGEMILL_ONNX__INT8=true" in done.stdout
    monkeypatch.setattr("imagemill.worker.models.quantize.overlap", lambda *_: 0.5)
    rejected = CliRunner().invoke(models, [*command, "0.98", "--json"])
    assert rejected.exit_code == 1
    report = json.loads(rejected.stdout)
    assert (report["accepted"], report["iou"], report["wanted"]) == (False, 0.5, 0.98)
    assert "rejected: the 8-bit masks of u2net differ too much" in rejected.stderr


def test_missing_model_is_an_error_with_the_pull_command(tmp_path: Path, images: Path) -> None:
    with pytest.raises(ConfigurationError, match="imagemill models pull u2net"):
        quantize("u2net", tmp_path, images)


def test_model_without_image_preparation_is_refused(tmp_path: Path, images: Path) -> None:
    with pytest.raises(UsageError, match="bria-rmbg"):
        quantize("bria-rmbg", tmp_path, images)


def test_divide_is_reproducible_and_puts_no_image_on_both_sides(images: Path) -> None:
    calibration, held_back, passed_over = divide(images)
    assert (len(calibration), len(held_back), passed_over) == (5, 2, 2)
    assert len({path.read_bytes() for path in calibration + held_back}) == 7
    assert divide(images) == (calibration, held_back, passed_over)


def test_divide_skips_truncated_images(tmp_path: Path) -> None:
    for seed in range(6):
        data = photo(seed, kind="JPEG")
        (tmp_path / f"{seed}.jpg").write_bytes(data if seed else data[: len(data) // 2])
    calibration, held_back, passed_over = divide(tmp_path)
    assert (len(calibration), len(held_back), passed_over) == (3, 2, 1)
    assert tmp_path / "0.jpg" not in calibration + held_back


def test_divide_refuses_too_few_images_and_limits_their_number(tmp_path: Path) -> None:
    for seed in range(4):
        (tmp_path / f"{seed}.png").write_bytes(photo(seed, 16, 16))
    with pytest.raises(UsageError, match="4 different images: at least 5"):
        divide(tmp_path)
    for seed in range(4, MOST + 10):
        (tmp_path / f"{seed}.png").write_bytes(photo(seed, 16, 16))
    calibration, held_back, passed_over = divide(tmp_path)
    assert (len(calibration), len(held_back), passed_over) == (MOST - MOST // 5, MOST // 5, 10)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([1, 1, 0, 0], [1, 1, 0, 0], 1.0), ([1, 1, 0, 0], [0, 1, 1, 0], 1 / 3), ([1, 0], [0, 1], 0.0), ([0, 0], [0, 0], 1.0),
     ([0.6, 0.4], [0.9, 0.1], 1.0)],
)  # fmt: skip
def test_overlap_is_intersection_over_union_of_the_masks(one: list[float], other: list[float], expected: float) -> None:
    assert overlap(np.array(one, np.float32), np.array(other, np.float32)) == pytest.approx(expected)
