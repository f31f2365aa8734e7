"""The engine around the network: a stand-in for it continues gradients, so all that shows is what tiles do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import BadMask, ConfigurationError, OperationFailed
from imagemill.shared.messages import Item
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.operations.base import Inputs, Untouched
from imagemill.worker.operations.inpaint import lama
from imagemill.worker.operations.inpaint.lama import Crop, Lama, enlarged, shown
from imagemill.worker.operations.inpaint.mask import EMPTY, LARGE, Region
from tests.batches import run_batch
from tests.fills import Continues
from tests.unit.worker.operations.conformance import run_all


@pytest.fixture
def session() -> Continues:
    return Continues()


@pytest.fixture
def operation(session: Continues, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lama:
    (tmp_path / "lama").mkdir()
    (tmp_path / "lama" / "lama.ckpt").write_bytes(b"the network is not what is tested here")
    monkeypatch.setattr(lama, "model_file", lambda *_: tmp_path / "lama" / "lama.ckpt")
    monkeypatch.setattr(lama, "LamaModel", lambda *_: session)
    made = Lama()
    made.load(Device(gpu=0, weights=tmp_path))  # batches
    return made


def prepared(operation: Lama, pixels: Pixels, mask: Grey | None = None, boxes: Any = (), **options: Any) -> Any:
    item = Item(index=0, source="https://images.example/one.jpg", boxes=boxes)
    return operation.prepare(Picture(pixels.copy()), Inputs(item, parse_options("inpaint", "lama", options), mask))


def inpaint(operation: Lama, pixels: Pixels, mask: Grey | None = None, **options: Any) -> tuple[Pixels, list[str]]:
    work = prepared(operation, pixels, mask, **options)
    return operation.finish(work, run_all(operation, work.samples)).pixels, work.notes


def slope(height: int, width: int, channels: int = 3) -> Pixels:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    planes = [40 + 150 * x / width, 200 - 120 * y / height, 60 + 60 * (x / width + y / height), 80 + 150 * y / height]
    return np.ascontiguousarray(np.rint(np.stack(planes[:channels], axis=2)), np.uint8)


def damaged(truth: Pixels, mask: Grey) -> Pixels:
    pixels = truth.copy()
    pixels[mask > 0, :3] = (255, 0, 255)
    return pixels


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
def test_a_gradient_goes_on_through_the_hole_without_a_step_and_all_else_stays(
    operation: Lama, mask: Grey, options: dict[str, Any], tiles: int, channels: int
) -> None:
    truth = slope(*mask.shape, channels)
    pixels = damaged(truth, mask)
    work = prepared(operation, pixels, mask, **options)
    assert len(work.samples) >= tiles
    made = operation.finish(work, run_all(operation, work.samples)).pixels
    near = options.get("mask_dilate", 0) + options.get("mask_feather", 0)
    kept = cv2.dilate(mask, np.ones((2 * near + 1, 2 * near + 1), np.uint8)) == 0
    assert np.array_equal(made[kept], pixels[kept])
    assert made.shape == pixels.shape
    if "strategy" in options and options["strategy"] == "tile":
        return  # inside of it, tiles see nothing at all
    assert np.abs(made.astype(int) - truth).max() <= 2
    off = made[..., :3].astype(int) - truth[..., :3]
    assert max(np.abs(np.diff(off, axis=axis)).max() for axis in (0, 1)) <= 2
    if channels == 4:
        assert np.array_equal(made[..., 3], truth[..., 3])


def test_a_guided_tile_sees_the_coarse_fill_where_others_fill(operation: Lama, session: Continues) -> None:
    mask = disc(1300, 1500, 500)
    work = prepared(operation, damaged(slope(1300, 1500), mask), mask, tile=512)
    guides = {id(sample.data.guide) for sample in work.samples}
    assert len(guides) == 1
    assert None not in guides
    run_all(operation, work.samples)
    for sample in work.samples:
        crop: Crop = sample.data
        rgb, hole = shown(crop)
        area = crop.tile.area
        beyond = (mask[area.rows, area.columns] > 0) & (hole == 0)
        assert beyond.any()
        assert not ((rgb[beyond] == (255, 0, 255)).all(axis=1)).any(), "nothing of what is to go"
        own = mask[crop.tile.core.rows, crop.tile.core.columns] > 0
        inside = hole[lama.inside(crop.tile.core, area)]
        assert (inside[own] == 255).all(), "its own part is filled anew, at full size"


def test_the_guide_is_made_once_even_where_a_batch_has_to_be_halved(operation: Lama, session: Continues) -> None:
    mask = disc(1300, 1500, 500)
    pixels = damaged(slope(1300, 1500), mask)
    alone, _ = inpaint(operation, pixels, mask, tile=512)
    session.batches.clear()
    session.most = 2
    work = prepared(operation, pixels, mask, tile=512)
    guide = work.samples[0].data.guide.crop.tile.size
    alike = [sample for sample in work.samples if operation.group_key(sample) == operation.group_key(work.samples[0])]
    sizes = BatchSizes()
    outputs = {id(sample): output for sample, output in zip(alike, run_batch(operation, alike, sizes), strict=True)}
    assert [batch for batch in session.batches if batch[0] == guide] == [[guide]]
    others = [sample for sample in work.samples if id(sample) not in outputs]
    outputs |= {id(sample): run_batch(operation, [sample], sizes)[0] for sample in others}
    assert np.array_equal(operation.finish(work, [outputs[id(sample)] for sample in work.samples]).pixels, alone)
    assert [batch for batch in session.batches if batch[0] == guide] == [[guide]]


def test_tiles_and_guides_of_different_images_share_batches(operation: Lama, session: Continues) -> None:
    mask = disc(1300, 1500, 500)
    works = [prepared(operation, slope(1300, 1500), mask, tile=512) for _ in range(3)]
    run_all(operation, [sample for work in works for sample in work.samples])
    guide = works[0].samples[0].data.guide.crop.tile.size
    assert [guide] * 2 in session.batches  # of the two images that were in one batch
    assert max(len(batch) for batch in session.batches) == operation.spec.max_batch
    small = [prepared(operation, slope(400, 500 + 8 * width), boxes=[f"100,100,{40 + width},50"]) for width in (0, 7)]
    assert operation.group_key(small[0].samples[0]) == operation.group_key(small[1].samples[0])


def test_of_a_tile_no_more_is_kept_than_is_used(operation: Lama) -> None:
    work = prepared(operation, slope(700, 900), boxes=["300,300,20,10"])
    (output,) = run_all(operation, work.samples)
    assert output.shape == (10 + 64, 20 + 64, 3)
    assert output.base is None, "it holds no larger array"


def test_odd_sizes_are_padded_and_cropped_back(operation: Lama, session: Continues) -> None:
    for height, width in ((1, 9), (37, 53), (100, 17)):
        truth = slope(height, width)
        mask = np.zeros((height, width), np.uint8)
        mask[height // 2, width // 2 : width // 2 + 3] = 255
        made, _ = inpaint(operation, damaged(truth, mask), mask)
        assert made.shape == truth.shape
        assert np.array_equal(made[mask == 0], truth[mask == 0])
    assert [batch[0] for batch in session.batches] == [(16, 16), (40, 56), (104, 24)]


def test_all_that_is_to_go_is_hidden_from_every_tile(operation: Lama) -> None:
    mask = line(904, 904)
    mask[150:200, 500:560] = 255
    pixels = damaged(slope(904, 904), mask)
    for sample in prepared(operation, pixels, mask).samples:
        area = sample.data.tile.area
        rgb, hole = shown(sample.data)
        assert np.array_equal(hole, mask[area.rows, area.columns])
        assert np.array_equal(rgb, pixels[area.rows, area.columns])


def test_an_empty_mask_is_untouched_and_a_large_one_flagged(operation: Lama, session: Continues) -> None:
    work = prepared(operation, slope(40, 50), np.zeros((40, 50), np.uint8), mask_dilate=5)
    assert work == Untouched((EMPTY,))
    mask = np.zeros((40, 50), np.uint8)
    mask[:20] = 255
    assert inpaint(operation, slope(40, 50), mask)[1] == [LARGE]
    with pytest.raises(BadMask, match="nothing says what to fill"):
        prepared(operation, slope(40, 50))


@pytest.mark.parametrize("grey", [False, True])
def test_the_fill_of_a_grey_image_has_no_colours(
    operation: Lama, session: Continues, grey: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "run", lambda pictures, _: [np.full_like(one, (200, 100, 50)) for one in pictures])
    pixels = np.full((60, 80, 3), 90, np.uint8)
    options = parse_options("inpaint", "lama", {"boxes": ["20,20,10,10"], "mask_feather": 3})
    inputs = Inputs(Item(index=0, source="https://images.example/one.jpg"), options)
    work = operation.prepare(Picture(pixels, grey=grey), inputs)
    made = operation.finish(work, run_all(operation, work.samples))
    assert made.grey is grey
    assert made.pixels[25, 25].tolist() == ([124] * 3 if grey else [200, 100, 50])
    assert bool((made.pixels == made.pixels[..., :1]).all()) is grey


def test_whole_is_for_images_that_fit(operation: Lama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lama, "WHOLE", 9_999)
    with pytest.raises(OperationFailed, match=r"up to 0.009999 megapixels, the image has 0.0: leave it at auto"):
        prepared(operation, slope(100, 100), boxes=["1,1,5,5"], strategy="whole")
    assert len(prepared(operation, slope(100, 99), boxes=["1,1,5,5"], strategy="whole").samples) == 1


def test_without_its_model_it_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="run `imagemill models pull lama`"):
        Lama().load(Device(weights=tmp_path))


def test_on_a_cpu_tiles_go_one_at_a_time(operation: Lama, tmp_path: Path) -> None:
    assert operation.spec.max_batch > 1
    operation.load(Device(weights=tmp_path))
    assert operation.spec.max_batch == 1


def test_the_fingerprint_changes_with_the_weights_and_with_what_the_gpu_calculates_in(
    operation: Lama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = parse_options("inpaint", "lama", {})
    fingerprints = []
    for dtype in (torch.float16, torch.bfloat16, torch.bfloat16):
        monkeypatch.setattr(lama, "dtype_of", lambda _, dtype=dtype: dtype)
        fingerprints.append(operation.fingerprint(options))
    older, before, again = fingerprints
    assert older != before == again
    (tmp_path / "lama" / "lama.ckpt").write_bytes(b"other weights, of another length")
    assert operation.fingerprint(options) != before


def test_a_file_that_is_pulled_anew_is_opened_anew(
    operation: Lama, session: Continues, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(lama, "LamaModel", lambda path, _: opened.append(path) or session)
    work = prepared(operation, slope(64, 64), boxes=("20,20,8,8",))
    operation.run(work.samples)
    operation.run(work.samples)
    assert len(opened) == 1
    (tmp_path / "lama" / "lama.ckpt").write_bytes(b"other weights, of another length")
    operation.run(work.samples)
    assert len(opened) == 2


@pytest.mark.parametrize("width", [40, 40_000], ids=["small", "wider than OpenCV's own limit"])
def test_a_part_of_the_enlarged_fill_is_that_part_of_all_of_it(width: int) -> None:
    fill = slope(16, 24)
    area = Region(slice(100, 133), slice(7, 7 + width))
    whole = enlarged(fill, area, area)
    assert whole.shape == (33, width, 3)
    part = Region(slice(110, 120), slice(20, 7 + width))
    assert np.abs(enlarged(fill, area, part).astype(int) - whole[10:20, 13:]).max() <= 1
    wanted = cv2.resize(fill, (width, 33), interpolation=cv2.INTER_CUBIC)
    assert np.abs(whole.astype(int) - wanted).max() <= 2
