"""The engine around the network. The network is replaced by one that continues gradients, so only the tiling can show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import BadMask, ConfigurationError, ModelUnavailable, OperationFailed
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.operations.base import Untouched
from imagemill.worker.operations.inpaint import lama
from imagemill.worker.operations.inpaint.lama import Crop, Lama, enlarged, network_input
from imagemill.worker.operations.inpaint.lama_model import LamaModel
from imagemill.worker.operations.inpaint.mask import EMPTY, LARGE
from imagemill.worker.operations.inpaint.rectangle import Rectangle
from tests.batches import run_batch
from tests.fills import Continues, damaged, inputs, rectangle_mask, slope
from tests.unit.worker.operations.conformance import run_all


@pytest.fixture
def model() -> Continues:
    return Continues()


@pytest.fixture
def operation(model: Continues, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lama:
    (tmp_path / "lama").mkdir()
    (tmp_path / "lama" / "lama.safetensors").write_bytes(b"never read, since the network is replaced")
    monkeypatch.setattr(lama, "LamaModel", lambda *_: model)
    operation = Lama()
    operation.load(Device(gpu=0, weights=tmp_path))  # a GPU, for batches
    return operation


def prepared(operation: Lama, pixels: Pixels, mask: Grey | None = None, item_boxes: Any = (), **options: Any) -> Any:
    return operation.prepare(Picture(pixels.copy()), inputs("lama", mask, item_boxes, **options))


def inpaint(operation: Lama, pixels: Pixels, mask: Grey, **options: Any) -> tuple[Pixels, list[str]]:
    work = prepared(operation, pixels, mask, **options)
    return operation.finish(work, run_all(operation, work.samples)).pixels, work.notes


def line(height: int, width: int, thickness: int = 12) -> Grey:
    mask = np.zeros((height, width), np.uint8)
    cv2.line(mask, (0, 30), (width - 1, height - 30), 255, thickness)
    return mask


def disc(height: int, width: int, radius: int) -> Grey:
    mask = np.zeros((height, width), np.uint8)
    cv2.circle(mask, (width // 2, height // 2), radius, 255, cv2.FILLED)
    return mask


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(
    ("mask", "options", "tiles"),
    [
        (disc(700, 900, 100), {}, 1),
        (line(1200, 1500), {}, 4),
        (line(1200, 1500), {"mask_dilate": 5, "mask_feather": 9}, 4),
        (disc(1300, 1500, 500), {"tile": 512}, 9),
        (disc(1300, 1500, 500), {"tile": 512, "strategy": "tile", "mask_feather": 20}, 9),
        (disc(1300, 1500, 500), {"tile": 512, "strategy": "resize"}, 1),
        (line(600, 800), {"strategy": "whole"}, 1),
    ],
    ids=["compact", "line", "soft line", "guided", "tiles only", "resized", "whole"],
)
def test_fill_continues_a_gradient_without_seams_and_keeps_all_other_pixels(
    operation: Lama, mask: Grey, options: dict[str, Any], tiles: int, channels: int
) -> None:
    original = slope(*mask.shape, channels)
    pixels = damaged(original, mask)
    work = prepared(operation, pixels, mask, **options)
    assert len(work.samples) >= tiles
    result = operation.finish(work, run_all(operation, work.samples)).pixels
    margin = options.get("mask_dilate", 0) + options.get("mask_feather", 0)
    kept = cv2.dilate(mask, np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)) == 0
    assert np.array_equal(result[kept], pixels[kept])
    assert result.shape == pixels.shape
    if options.get("strategy") == "tile":
        return  # unguided tiles inside the hole see no known pixels
    assert np.abs(result.astype(int) - original).max() <= 2
    error = result[..., :3].astype(int) - original[..., :3]
    assert max(np.abs(np.diff(error, axis=axis)).max() for axis in (0, 1)) <= 2
    if channels == 4:
        assert np.array_equal(result[..., 3], original[..., 3])


def test_guided_tile_sees_the_coarse_fill_where_other_tiles_fill(operation: Lama) -> None:
    mask = disc(1300, 1500, 500)
    work = prepared(operation, damaged(slope(1300, 1500), mask), mask, tile=512)
    guide = work.samples[0].data.guide
    assert guide is not None
    assert all(sample.data.guide is guide for sample in work.samples)
    run_all(operation, work.samples)
    for sample in work.samples:
        crop: Crop = sample.data
        rgb, hole = network_input(crop)
        area, core = crop.tile.area, crop.tile.core
        others = (mask[area] > 0) & (hole == 0)
        assert others.any()
        assert not ((rgb[others] == (255, 0, 255)).all(axis=1)).any(), "the damage must not be visible"
        core_hole = hole[core.relative_to(area)]
        assert (core_hole[mask[core] > 0] == 255).all(), "the tile fills its own part at full size"


def test_guide_is_computed_once_even_when_its_batch_is_halved(operation: Lama, model: Continues) -> None:
    mask = disc(1300, 1500, 500)
    pixels = damaged(slope(1300, 1500), mask)
    expected, _ = inpaint(operation, pixels, mask, tile=512)
    model.batches.clear()
    model.most = 2
    work = prepared(operation, pixels, mask, tile=512)
    guide_size = work.samples[0].data.guide.size
    key = operation.group_key(work.samples[0])
    first_group = [sample for sample in work.samples if operation.group_key(sample) == key]
    sizes = BatchSizes()
    outputs = dict(zip(map(id, first_group), run_batch(operation, first_group, sizes), strict=True))
    assert [batch for batch in model.batches if batch[0] == guide_size] == [[guide_size]]
    remaining = [sample for sample in work.samples if id(sample) not in outputs]
    outputs |= {id(sample): run_batch(operation, [sample], sizes)[0] for sample in remaining}
    result = operation.finish(work, [outputs[id(sample)] for sample in work.samples]).pixels
    assert np.array_equal(result, expected)
    assert [batch for batch in model.batches if batch[0] == guide_size] == [[guide_size]]


def test_tiles_and_guides_of_different_images_share_batches(operation: Lama, model: Continues) -> None:
    mask = disc(1300, 1500, 500)
    works = [prepared(operation, slope(1300, 1500), mask, tile=512) for _ in range(3)]
    run_all(operation, [sample for work in works for sample in work.samples])
    guide_size = works[0].samples[0].data.guide.size
    assert [guide_size] * 2 in model.batches  # of the two images that were in one batch
    assert max(len(batch) for batch in model.batches) == operation.spec.max_batch
    small = [prepared(operation, slope(400, 500 + 8 * extra), item_boxes=[f"100,100,{40 + extra},50"]) for extra in (0, 7)]
    assert operation.group_key(small[0].samples[0]) == operation.group_key(small[1].samples[0])


def test_run_keeps_only_the_part_of_a_tile_that_is_used(operation: Lama) -> None:
    work = prepared(operation, slope(700, 900), item_boxes=["300,300,20,10"])
    (output,) = run_all(operation, work.samples)
    assert output.shape == (10 + 64, 20 + 64, 3)
    assert output.base is None, "a view would keep the whole tile in memory"


def test_odd_sizes_are_padded_and_cropped_back(operation: Lama, model: Continues) -> None:
    for height, width in ((1, 9), (37, 53), (100, 17)):
        original = slope(height, width)
        middle = slice(height // 2, height // 2 + 1), slice(width // 2, width // 2 + 3)
        mask = rectangle_mask(height, width, *middle)
        result, _ = inpaint(operation, damaged(original, mask), mask)
        assert result.shape == original.shape
        assert np.array_equal(result[mask == 0], original[mask == 0])
    assert [batch[0] for batch in model.batches] == [(16, 16), (40, 56), (104, 24)]


def test_every_tile_masks_the_whole_hole_in_its_area(operation: Lama) -> None:
    mask = line(904, 904)
    mask[150:200, 500:560] = 255
    pixels = damaged(slope(904, 904), mask)
    for sample in prepared(operation, pixels, mask).samples:
        rgb, hole = network_input(sample.data)
        assert np.array_equal(hole, mask[sample.data.tile.area])
        assert np.array_equal(rgb, pixels[sample.data.tile.area])


def test_empty_mask_is_untouched_a_large_one_noted_and_a_missing_one_rejected(operation: Lama) -> None:
    assert prepared(operation, slope(40, 50), np.zeros((40, 50), np.uint8), mask_dilate=5) == Untouched((EMPTY,))
    assert inpaint(operation, slope(40, 50), rectangle_mask(40, 50, slice(0, 20), slice(0, 50)))[1] == [LARGE]
    with pytest.raises(BadMask, match="no mask and no boxes"):
        prepared(operation, slope(40, 50))


@pytest.mark.parametrize("grey", [False, True])
def test_fill_of_a_grey_image_is_grey(operation: Lama, model: Continues, grey: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "run", lambda pictures, _: [np.full_like(picture, (200, 100, 50)) for picture in pictures])
    picture = Picture(np.full((60, 80, 3), 90, np.uint8), grey=grey)
    work = operation.prepare(picture, inputs("lama", boxes=["20,20,10,10"], mask_feather=3))
    assert not isinstance(work, Untouched)
    result = operation.finish(work, run_all(operation, work.samples))
    assert result.grey is grey
    assert result.pixels[25, 25].tolist() == ([124] * 3 if grey else [200, 100, 50])
    assert bool((result.pixels == result.pixels[..., :1]).all()) is grey


def test_strategy_whole_is_refused_for_images_that_are_too_large(operation: Lama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lama, "WHOLE", 9_999)
    with pytest.raises(OperationFailed, match=r"up to 0.009999 megapixels, and this one has 0.0: use strategy=auto"):
        prepared(operation, slope(100, 100), item_boxes=["1,1,5,5"], strategy="whole")
    assert len(prepared(operation, slope(100, 99), item_boxes=["1,1,5,5"], strategy="whole").samples) == 1


def test_load_fails_when_the_model_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="run `imagemill models pull lama`"):
        Lama().load(Device(weights=tmp_path))


@pytest.mark.parametrize(("content", "reason"), [(None, "run `imagemill models pull lama`"), (b"<html>", "models verify")])
def test_model_that_is_lost_or_damaged_later_only_fails_images(
    content: bytes | None, reason: str, operation: Lama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = prepared(operation, slope(64, 64), item_boxes=("20,20,8,8",))
    operation.run(work.samples)
    monkeypatch.setattr(lama, "LamaModel", LamaModel)
    operation._device = Device(weights=tmp_path)
    path = tmp_path / "lama" / "lama.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ModelUnavailable, match=reason):
        operation.run(work.samples)


def test_batch_size_is_one_on_a_cpu(operation: Lama, tmp_path: Path) -> None:
    assert operation.spec.max_batch > 1
    operation.load(Device(weights=tmp_path))
    assert operation.spec.max_batch == 1


def test_fingerprint_changes_with_weights_and_precision(
    operation: Lama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = parse_options("inpaint", "lama", {})
    fingerprints = []
    for dtype in (torch.float16, torch.bfloat16, torch.bfloat16):
        monkeypatch.setattr(lama, "dtype_of", lambda _, dtype=dtype: dtype)
        fingerprints.append(operation.fingerprint(options))
    fp16, bf16, bf16_again = fingerprints
    assert fp16 != bf16 == bf16_again
    (tmp_path / "lama" / "lama.safetensors").write_bytes(b"other weights, of another length")
    assert operation.fingerprint(options) != bf16


def test_model_is_reopened_only_when_its_file_changes(
    operation: Lama, model: Continues, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(lama, "LamaModel", lambda path, _: opened.append(path) or model)
    work = prepared(operation, slope(64, 64), item_boxes=("20,20,8,8",))
    operation.run(work.samples)
    operation.run(work.samples)
    assert len(opened) == 1
    (tmp_path / "lama" / "lama.safetensors").write_bytes(b"other weights, of another length")
    operation.run(work.samples)
    assert len(opened) == 2


@pytest.mark.parametrize("width", [40, 40_000], ids=["small", "wider than OpenCV's own limit"])
def test_enlarged_part_equals_the_same_part_of_the_whole_enlarged_fill(width: int) -> None:
    fill = slope(16, 24)
    area = Rectangle(slice(100, 133), slice(7, 7 + width))
    whole = enlarged(fill, area, area)
    assert whole.shape == (33, width, 3)
    part = Rectangle(slice(110, 120), slice(20, 7 + width))
    assert np.abs(enlarged(fill, area, part).astype(int) - whole[10:20, 13:]).max() <= 1
    expected = cv2.resize(fill, (width, 33), interpolation=cv2.INTER_CUBIC)
    assert np.abs(whole.astype(int) - expected).max() <= 2
