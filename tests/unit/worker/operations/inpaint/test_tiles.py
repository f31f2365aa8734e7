"""Planning: for any hole, a few tiles inside the image cover all of it."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.worker.imaging.picture import Grey
from imagemill.worker.operations.inpaint.rectangle import Rectangle
from imagemill.worker.operations.inpaint.tiles import CELL, CONTEXT, LEAST, STEP, Tiling, cells_of, labels_at, plan, weights

Mark = tuple[int, int, int, int, int, bool]

MARKS = st.lists(
    st.tuples(*[st.integers(0, 2000)] * 4, st.integers(1, 300), st.booleans()),
    min_size=1,
    max_size=6,
)
"""Lines and discs: two points (the centre first), thickness or radius, and whether it is a line."""


def hole_of(size: tuple[int, int], marks: list[Mark]) -> Grey:
    hole = np.zeros(size, np.uint8)
    for x, y, to_x, to_y, thickness, line in marks:
        if line:
            cv2.line(hole, (x, y), (to_x, to_y), 255, max(1, thickness // 8))
        else:
            cv2.circle(hole, (x, y), thickness, 255, cv2.FILLED)
    return hole


def image(size: tuple[int, int]) -> Rectangle:
    return Rectangle(slice(0, size[0]), slice(0, size[1]))


def pixels(tiling: Tiling) -> int:
    return sum(tile.size[0] * tile.size[1] for tile in tiling.tiles)


def cropped_by_box(hole: Grey) -> int:
    """Pixels that IOPaint processes: one crop per outline, CONTEXT around its box, sides padded to multiples of 8."""
    outlines, _ = cv2.findContours(hole, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    total = 0
    for outline in outlines:
        box = Rectangle.at(*cv2.boundingRect(outline)).shape
        height, width = (-(-min(side + 2 * CONTEXT, most) // 8) * 8 for side, most in zip(box, hole.shape, strict=True))
        total += height * width
    return total


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 1800), st.integers(1, 1800)),
    marks=MARKS,
    longest=st.sampled_from([512, 768, 1024]),
    strategy=st.sampled_from(["auto", "tile", "resize", "whole"]),
)
def test_weights_of_every_masked_pixel_add_up_to_one_and_tiles_stay_inside_the_image(
    size: tuple[int, int], marks: list[Mark], longest: int, strategy: str
) -> None:
    hole = hole_of(size, marks)
    tiling = plan(hole, strategy=strategy, longest=longest)
    for tile in (*tiling.tiles, *tiling.guides.values()):
        for side, length in zip(tile.area, size, strict=True):
            assert 0 <= side.start < side.stop <= length
        assert all(length >= 16 and length % 8 == 0 for length in tile.size)
        if strategy != "whole":
            assert max(tile.size) <= longest
        if not tile.reduced:
            assert all(
                0 <= padded - length < 16 or padded == 16 for padded, length in zip(tile.size, tile.area.shape, strict=True)
            )
    total, normalised = np.zeros(size), np.zeros(size)
    parts = list(weights(tiling.tiles, tiling.labels, image(size)))
    for _, place, weight in parts:
        total[place] += weight
    for _, place, weight in parts:
        normalised[place] += weight / np.maximum(total[place], 1e-6)
    assert np.allclose(normalised[hole > 0], 1, atol=1e-5)
    assert (total[hole > 0] >= 1).all(), "each pixel lies in the core of a tile"


@settings(max_examples=100, deadline=None)
@given(size=st.tuples(st.integers(1, 1800), st.integers(1, 1800)), marks=MARKS, longest=st.sampled_from([512, 768, 1024]))
def test_number_of_tiles_and_pixels_is_bounded_by_the_hole_and_repeatable(
    size: tuple[int, int], marks: list[Mark], longest: int
) -> None:
    hole = hole_of(size, marks)
    tiling = plan(hole, strategy="tile", longest=longest)
    assert len(tiling.tiles) <= np.count_nonzero(tiling.labels)
    # Each square of 256 pixels that contains part of the hole costs at most two tiles of its size with their context.
    squares = sum(
        hole[top : top + 256, left : left + 256].any() for top in range(0, size[0], 256) for left in range(0, size[1], 256)
    )
    assert pixels(tiling) <= 2 * squares * (256 + 2 * CONTEXT) ** 2
    repeated = plan(hole, strategy="tile", longest=longest)
    assert repeated.tiles == tiling.tiles
    assert np.array_equal(repeated.labels, tiling.labels)


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(16, 3000), st.integers(16, 3000)),
    box=st.tuples(st.integers(0, 2999), st.integers(0, 2999), st.integers(1, 832), st.integers(1, 832)),
    longest=st.sampled_from([512, 768, 1024]),
)
def test_hole_that_fits_takes_one_tile_no_larger_than_its_box_with_context(
    size: tuple[int, int], box: tuple[int, int, int, int], longest: int
) -> None:
    limit = longest - 2 * LEAST
    top, left, height, width = box[0] % size[0], box[1] % size[1], 1 + box[2] % (limit - 8), 1 + box[3] % (limit - 8)
    hole = np.zeros(size, np.uint8)
    hole[top : top + height, left : left + width] = 255
    tiling = plan(hole, longest=longest)
    (tile,) = tiling.tiles
    assert not tiling.guides
    assert pixels(tiling) <= cropped_by_box(hole)
    for core, area, length in zip(tile.core, tile.area, size, strict=True):
        assert core.start - area.start >= min(core.start, LEAST)
        assert area.stop - core.stop >= min(length - core.stop, LEAST)


def line(size: tuple[int, int], thickness: int) -> Grey:
    hole = np.zeros(size, np.uint8)
    cv2.line(hole, (0, size[0] // 20), (size[1] - 1, size[0] - size[0] // 20), 255, thickness)
    return hole


@pytest.mark.parametrize("longest", [512, 768, 1024])
@pytest.mark.parametrize("thickness", [3, 60])
def test_tiles_follow_a_thin_hole_instead_of_its_box(longest: int, thickness: int) -> None:
    hole = line((2000, 3000), thickness)
    tiling = plan(hole, longest=longest)
    assert not tiling.guides
    assert 2 * pixels(tiling) < cropped_by_box(hole)
    twice_as_long = plan(line((4000, 6000), thickness), longest=longest)
    assert pixels(twice_as_long) < 2.6 * pixels(tiling), "pixels grow with the length, not with the area of the box"


def test_caption_letters_share_tiles() -> None:
    hole = np.zeros((1000, 3000), np.uint8)
    cv2.putText(hole, "a caption of several words", (100, 900), cv2.FONT_HERSHEY_DUPLEX, 3, 255, 12)
    tiling = plan(hole)
    assert len(tiling.tiles) < 6
    assert 3 * pixels(tiling) < cropped_by_box(hole)


def test_near_holes_share_a_tile_and_distant_ones_do_not() -> None:
    hole = np.zeros((2000, 2000), np.uint8)
    hole[100:140, 100:140] = hole[1700:1740, 1800:1840] = 255
    assert [tile.size for tile in plan(hole).tiles] == [(256, 256)] * 2
    hole[100:140, 180:220] = 255
    near, far = plan(hole).tiles
    assert sorted([near.size, far.size]) == [(256, 256), (256, 320)]


def test_tile_sides_are_multiples_of_the_step_so_that_sizes_are_few() -> None:
    rng = np.random.default_rng(0)
    sizes = set()
    for _ in range(200):
        hole = np.zeros((1500, 1500), np.uint8)
        height, width = rng.integers(1, 800, 2)
        hole[300 : 300 + height, 200 : 200 + width] = 255
        sizes |= {side for tile in plan(hole).tiles for side in tile.size}
    assert all(side % STEP == 0 for side in sizes)
    assert len(sizes) <= 13


@pytest.mark.parametrize(("strategy", "guides"), [("auto", 1), ("tile", 0)])
def test_guide_shows_all_of_a_hole_that_is_larger_than_a_tile(strategy: str, guides: int) -> None:
    hole = np.zeros((3000, 4000), np.uint8)
    cv2.circle(hole, (2000, 1500), 900, 255, cv2.FILLED)
    tiling = plan(hole, strategy=strategy)
    assert len(tiling.guides) == guides
    assert all(not tile.reduced for tile in tiling.tiles)
    for guide in tiling.guides.values():
        assert guide.reduced
        assert max(guide.size) == 1024
        assert guide.area.rows.start < 600 - CONTEXT
        assert guide.area.columns.stop > 2900 + CONTEXT
        height, width = guide.area.shape
        assert np.isclose(height / width, guide.size[0] / guide.size[1], rtol=0.02)


def test_resize_makes_one_tile_per_hole_and_reduces_only_those_that_do_not_fit() -> None:
    hole = line((3000, 4000), 20)
    hole[100:140, 3000:3050] = 255
    small, large = sorted(plan(hole, strategy="resize").tiles, key=lambda tile: tile.reduced)
    assert (small.reduced, small.size) == (False, (256, 256))
    assert (large.reduced, max(large.size)) == (True, 1024)


def test_neighbouring_tiles_blend_in_small_steps() -> None:
    hole = np.zeros((400, 3000), np.uint8)
    hole[190:210] = 255
    tiling = plan(hole)
    shares = np.zeros((len(tiling.tiles), 3000))
    for index, place, weight in weights(tiling.tiles, tiling.labels, image((400, 3000))):
        shares[index, place.columns] = weight[200 - place.rows.start]
    shares /= shares.sum(axis=0)
    assert len(shares) > 2
    assert np.abs(np.diff(shares, axis=1)).max() < 0.03
    for left, right in pairwise(sorted(tiling.tiles, key=lambda tile: tile.core.columns.start)):
        assert left.area.columns.stop - right.area.columns.start >= 2 * LEAST


def test_small_hole_inside_the_box_of_a_long_line_is_filled_by_its_own_tiles_only() -> None:
    hole = line((2000, 2000), 5)
    hole[300:330, 1500:1530] = 255
    tiling = plan(hole)
    labels = labels_at(tiling.labels, image((2000, 2000)))
    assert set(np.unique(labels[300:330, 1500:1530])) != set(np.unique(labels[1000:1010, 1000:1010]))
    of_other_regions = np.zeros((2000, 2000))
    for index, place, weight in weights(tiling.tiles, tiling.labels, image((2000, 2000))):
        if tiling.tiles[index].label != labels[310, 1510]:
            of_other_regions[place] += weight
    assert not of_other_regions[300:330, 1500:1530].any()


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(1, 700), st.integers(1, 700)), seed=st.integers(0, 99), share=st.sampled_from([1e-4, 0.01, 0.9])
)
def test_cell_belongs_to_the_hole_when_any_of_its_pixels_does(size: tuple[int, int], seed: int, share: float) -> None:
    hole = (np.random.default_rng(seed).random(size) < share).astype(np.uint8)
    cells = cells_of(hole)
    padded = np.pad(hole, [(0, -side % CELL) for side in size])
    assert np.array_equal(cells, padded.reshape(len(cells), CELL, -1, CELL).any(axis=(1, 3)))
