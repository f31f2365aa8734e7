from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
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
from imagemill.worker.operations.remove_background.model_families import FAMILIES
from tests.conftest import photo
from tests.models import in_half_precision, u2net_onnx
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
    """A weights folder with a small u2net."""
    original = u2net_onnx(tmp_path / "rembg" / "u2net.onnx", size=SIZE)
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
    (output,) = session.run(None, {"input.1": np.zeros((2, 3, SIZE, SIZE), np.float32)})  # only what nodes read
    assert output.shape == (2, 1, SIZE, SIZE)
    assert not [path for path in original.parent.iterdir() if path.is_dir()]


def test_search_goes_on_until_a_copy_is_good_enough_and_keeps_none_if_all_are_too_bad(
    weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagemill.worker.models.quantize.BLOCKS", 3)
    monkeypatch.setattr("imagemill.worker.models.quantize.FLOATING", (1, 2))
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
    monkeypatch.setattr("imagemill.worker.models.quantize.overlap", lambda *_: next(found))
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
    original = in_half_precision(u2net_onnx(tmp_path / "full.onnx", size=SIZE), tmp_path / "rembg" / "u2net.onnx")
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
    assert "calibrated on 5 images, compared on 2 others; skipped 2 files" in done.stdout
    assert "times as fast" in done.stdout
    assert "IMAGEMILL_ONNX__INT8=true" in done.stdout
    monkeypatch.setattr("imagemill.worker.models.quantize.overlap", lambda *_: 0.5)
    rejected = CliRunner().invoke(models, [*command, "0.97", "--faster", "1e6", "--json"])
    assert rejected.exit_code == 1
    report = json.loads(rejected.stdout)
    assert (report["accepted"], report["iou"], report["wanted"], len(report["tried"])) == (False, 0.5, 0.97, 2)
    assert rejected.stderr == "rejected: the 8-bit masks differ too much; nothing was kept\n"


def test_missing_model_is_an_error_with_the_pull_command(tmp_path: Path, images: Path) -> None:
    with pytest.raises(ConfigurationError, match="imagemill models pull u2net"):
        quantize("u2net", tmp_path, images)


def test_missing_file_of_an_added_model_is_an_error_with_the_add_command(tmp_path: Path, images: Path) -> None:
    record(tmp_path, "shop", parameters={"size": SIZE, "mean": [0, 0, 0], "deviation": [1, 1, 1]})
    (tmp_path / "rembg" / "shop.onnx").unlink()
    with pytest.raises(ConfigurationError, match="imagemill models add shop SOURCE --replace"):
        quantize("shop", tmp_path, images)


def test_model_without_image_preparation_is_refused(tmp_path: Path, images: Path) -> None:
    with pytest.raises(UsageError, match="u2net_cloth_seg can't be quantised"):
        quantize("u2net_cloth_seg", tmp_path, images)


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
    assert (len(calibration), len(held_back), passed_over) == (MOST - MOST // 3, MOST // 3, 10)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([1, 1, 0, 0], [1, 1, 0, 0], 1.0), ([1, 1, 0, 0], [0, 1, 1, 0], 1 / 3), ([1, 0], [0, 1], 0.0), ([0, 0], [0, 0], 1.0),
     ([0.6, 0.4], [0.9, 0.1], 1.0)],
)  # fmt: skip
def test_overlap_is_intersection_over_union_of_the_masks(one: list[float], other: list[float], expected: float) -> None:
    assert overlap(np.array(one, np.float32), np.array(other, np.float32)) == pytest.approx(expected)
