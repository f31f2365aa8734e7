"""From masks and boxes to the hole, its fade, and the rectangles around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.shared.errors import BadMask
from imagemill.worker.imaging.picture import Grey
from imagemill.worker.operations.inpaint import mask as module
from imagemill.worker.operations.inpaint.mask import (
    build_mask,
    distance_to,
    feathered,
    fill_mask,
    rectangles_around,
    reveal,
    shrunk,
)
from imagemill.worker.operations.inpaint.rectangle import Rectangle
from tests.fills import distances, inputs, rectangle_mask


def built(size: tuple[int, int], mask: Grey | None = None, item_boxes: Any = (), **options: Any) -> Grey:
    return build_mask(size, inputs("opencv", mask, item_boxes, **options))


@pytest.mark.parametrize(("threshold", "masked"), [(0, {1, 128, 255}), (127, {128, 255}), (128, {255}), (254, {255})])
def test_mask_covers_values_above_the_threshold(threshold: int, masked: set[int]) -> None:
    mask = np.array([[0, 1, 128, 255]], np.uint8)
    hole = built((4, 1), mask, mask_threshold=threshold)
    assert {int(value) for value in mask[hole == 255]} == masked
    assert set(np.unique(hole)) <= {0, 255}


@pytest.mark.parametrize("dilate", [0, 1, 4, 7])
def test_mask_dilate_grows_the_hole_by_that_many_pixels_all_around(dilate: int) -> None:
    mask = rectangle_mask(30, 34, slice(12, 14), slice(3, 20))
    assert np.array_equal(built((34, 30), mask, mask_dilate=dilate) > 0, distances(mask > 0) <= dilate)
    assert np.allclose(distance_to(mask), distances(mask > 0), atol=1e-4)


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ("10,5,20,8", slice(5, 13), slice(10, 30)),
        ("0,0,1,1", slice(0, 1), slice(0, 1)),
        ("90,50,100,100", slice(50, 60), slice(90, 100)),
        ("99,59,1,1", slice(59, 60), slice(99, 100)),
        ("3.4,2.6,0.2,0.2", slice(3, 4), slice(3, 4)),
        ("0.5,0.25,0.25,0.5", slice(15, 45), slice(50, 75)),
        ("0.0,0.0,1.0,0.5", slice(0, 30), slice(0, 100)),
        ("0.99,0.0,0.01,1.0", slice(0, 60), slice(99, 100)),
        ([0.1, 0.5, 0.001, 0.001], slice(30, 31), slice(10, 11)),
    ],
)
def test_box_masks_its_pixels(box: Any, rows: slice, columns: slice) -> None:
    expected = rectangle_mask(60, 100, rows, columns)
    assert np.array_equal(built((100, 60), item_boxes=[box]), expected)
    assert np.array_equal(built((100, 60), np.zeros((60, 100), np.uint8), item_boxes=[box]), expected)
    job_boxes = box if isinstance(box, str) else [box]
    assert np.array_equal(built((100, 60), boxes=job_boxes), expected), "the job's boxes work like the item's"


def test_mask_and_boxes_of_item_and_job_are_combined() -> None:
    mask = rectangle_mask(60, 100, slice(0, 10), slice(0, 10))
    hole = built((100, 60), mask, item_boxes=["20,20,5,5"], boxes="50,0,3,1;0.9,0.9,0.1,0.1")
    assert np.count_nonzero(hole) == 100 + 25 + 3 + 60


@pytest.mark.parametrize("box", ["100,0,5,5", "0,60,5,5", "4000,3000,1,1", "1.0,0.5,0.00001,0.1"])
def test_box_outside_the_image_is_rejected_with_the_image_size(box: str) -> None:
    with pytest.raises(BadMask, match="outside the image, which is 100x60"):
        built((100, 60), item_boxes=[box])


@pytest.mark.parametrize(
    ("mask", "boxes", "message"),
    [
        (None, (), "give a mask"),
        (
            np.zeros((60, 60), np.uint8),
            (),
            "60x60 but the image is 100x60: their aspect ratios differ",
        ),
        (np.zeros((100, 60), np.uint8), ["1,1,2,2"], "60x100 but the image is 100x60: turn the mask upright"),
        (np.full((60, 100), 100, np.uint8), (), "nothing in it is brighter than 100: lower mask_threshold=127"),
        (np.full((60, 100), 100, np.uint8), ["1,1,2,2"], "nothing in it is brighter than 100: lower mask_threshold=127"),
        (rectangle_mask(600, 1000, slice(301, 302), slice(501, 502)), (), "nothing is left of it at the image's size, 100x60"),
        (np.full((60, 100), 255, np.uint8), (), "whole image"),
        (None, ["0,0,50,60", "50,0,50,60"], "whole image"),
    ],
    ids=["missing", "square", "on its side", "dark", "dark with a box", "a speck", "all white", "boxes over everything"],
)
def test_unusable_mask_is_rejected(mask: Grey | None, boxes: Any, message: str) -> None:
    with pytest.raises(BadMask, match=message):
        built((100, 60), mask, boxes)


@pytest.mark.parametrize("scale", [0.25, 0.5, 2, 3])
def test_mask_of_another_size_is_scaled_when_the_aspect_ratio_matches(scale: float) -> None:
    rows, columns = slice(int(20 * scale), int(40 * scale)), slice(0, int(40 * scale))
    mask = rectangle_mask(int(60 * scale), int(100 * scale), rows, columns)
    assert np.array_equal(built((100, 60), mask), rectangle_mask(60, 100, slice(20, 40), slice(0, 40)))


@pytest.mark.parametrize("reach", [1, 7, 60])
def test_dilation_and_fade_are_the_same_when_computed_in_blocks(reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(reach)
    mask = (rng.random((150, 170)) < 0.002).astype(np.uint8) * 255
    mask[:, 80:] = 0
    dilated, opacity = built((170, 150), mask, mask_dilate=reach), feathered(mask, reach)
    monkeypatch.setattr(module, "BLOCK", 16)
    assert np.array_equal(built((170, 150), mask, mask_dilate=reach), dilated)
    assert np.array_equal(feathered(mask, reach), opacity)
    assert np.array_equal(opacity > 0, distances(mask > 0) <= reach + 1e-4), "the fade has the requested width"
    assert np.array_equal(opacity == 255, mask == 255)


def test_fill_mask_covers_hole_and_fade_but_never_the_whole_image() -> None:
    opacity = np.array([[0, 1, 128, 255]], np.uint8)
    assert fill_mask(opacity).tolist() == [[0, 255, 255, 255]]
    assert fill_mask(opacity[:, 1:]).tolist() == [[0, 0, 255]]


def test_shrunk_mask_keeps_every_pixel_that_a_speck_was_averaged_into() -> None:
    speck = rectangle_mask(160, 320, slice(33, 34), slice(100, 101))
    assert np.array_equal(shrunk(speck, (20, 10)), rectangle_mask(10, 20, slice(2, 3), slice(6, 7)))
    half_left_full_right = rectangle_mask(160, 320, slice(0, 160), slice(0, 319))
    half_left_full_right[:, ::2] = 0
    half_left_full_right[:, 160:] = 255
    assert np.array_equal(shrunk(half_left_full_right, (2, 1)), [[0, 255]])


@settings(max_examples=60, deadline=None)
@given(
    holes=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 79), st.integers(1, 9), st.integers(1, 9)), max_size=9),
    margin=st.floats(0, 12),
)
def test_rectangles_cover_every_hole_with_its_margin_and_never_overlap(holes: list[tuple[int, ...]], margin: float) -> None:
    mask = np.zeros((60, 80), np.uint8)
    for top, left, height, width in holes:
        mask[top : top + height, left : left + width] = 255
    covered = np.zeros(mask.shape, int)
    for rectangle in rectangles_around(mask, margin):
        covered[rectangle] += 1
    assert covered.max(initial=0) <= 1
    if mask.any():
        y, x = np.mgrid[:60, :80]
        masked = np.argwhere(mask)
        near = np.maximum(abs(y[..., None] - masked[:, 0]), abs(x[..., None] - masked[:, 1])).min(axis=2) <= margin
        assert covered[near].all()


def test_rectangles_become_one_when_merging_takes_too_many_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((400, 400), np.uint8)
    mask[4::40, 4::50] = 255
    assert len(rectangles_around(mask, 5)) == 80
    monkeypatch.setattr(module, "ROUNDS", 0)
    assert rectangles_around(mask, 5) == [Rectangle(slice(0, 370), slice(0, 360))]


def test_rubbed_out_hole_becomes_visible_and_a_separate_shape_does_not() -> None:
    pixels = np.full((60, 80, 4), 90, np.uint8)
    pixels[..., 3] = 255
    pixels[10:30, 10:30, 3] = 0  # rubbed out of the picture
    pixels[:, 60:, 3] = 0  # the background of a cut-out
    opacity = np.zeros((60, 80), np.uint8)
    opacity[10:30, 10:30] = 255
    opacity[40:50, 70:78] = 255
    reveal(pixels, opacity)
    assert (pixels[:, :60, 3] == 255).all()
    assert not pixels[:, 60:, 3].any()
