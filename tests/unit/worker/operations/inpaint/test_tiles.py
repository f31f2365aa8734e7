"""The planner: whatever the hole, all of it is covered, by tiles that lie inside the image, and not by too many."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.worker.imaging.picture import Grey
from imagemill.worker.operations.inpaint.mask import Region
from imagemill.worker.operations.inpaint.tiles import CELL, CONTEXT, LEAST, STEP, Plan, in_cells, owners, plan, weights

Mark = tuple[int, int, int, int, int, bool]

MARKS = st.lists(
    st.tuples(*[st.integers(0, 2000)] * 4, st.integers(1, 300), st.booleans()),
    min_size=1,
    max_size=6,
)
"""Lines and discs: two points, a thickness, and whether it is a line."""


def hole_of(size: tuple[int, int], marks: list[Mark]) -> Grey:
    hole = np.zeros(size, np.uint8)
    for x, y, to_x, to_y, thickness, line in marks:
        if line:
            cv2.line(hole, (x, y), (to_x, to_y), 255, max(1, thickness // 8))
        else:
            cv2.circle(hole, (x, y), thickness, 255, cv2.FILLED)
    return hole


def sides(region: Region) -> tuple[int, int]:
    return region.rows.stop - region.rows.start, region.columns.stop - region.columns.start


def pixels(made: Plan) -> int:
    return sum(tile.size[0] * tile.size[1] for tile in made.tiles)


def cropped_by_box(hole: Grey) -> int:
    """Pixels that IOPaint works on: one crop per outline, CONTEXT around its box, sides padded to multiples of 8."""
    outlines, _ = cv2.findContours(hole, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    crops = 0
    for outline in outlines:
        _, _, width, height = cv2.boundingRect(outline)
        across, down = (
            -(-min(side + 2 * CONTEXT, most) // 8) * 8 for side, most in ((width, hole.shape[1]), (height, hole.shape[0]))
        )
        crops += across * down
    return crops


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 1800), st.integers(1, 1800)),
    marks=MARKS,
    longest=st.sampled_from([512, 768, 1024]),
    strategy=st.sampled_from(["auto", "tile", "resize", "whole"]),
)
def test_every_masked_pixel_is_filled_by_weights_that_add_up_to_one_and_no_tile_leaves_the_image(
    size: tuple[int, int], marks: list[Mark], longest: int, strategy: str
) -> None:
    hole = hole_of(size, marks)
    made = plan(hole, strategy=strategy, longest=longest)
    for tile in (*made.tiles, *made.guides.values()):
        for side, extent in ((tile.area.rows, size[0]), (tile.area.columns, size[1])):
            assert 0 <= side.start < side.stop <= extent
        assert all(length >= 16 and length % 8 == 0 for length in tile.size)
        if strategy != "whole":
            assert max(tile.size) <= longest
        if not tile.reduced:
            assert all(16 > have - want >= 0 or have == 16 for have, want in zip(tile.size, sides(tile.area), strict=True))
    total, raw = np.zeros(size), np.zeros(size)
    everything = Region(slice(0, size[0]), slice(0, size[1]))
    parts = list(weights(made.tiles, made.numbers, everything))
    for _, where, weight in parts:
        raw[where.rows, where.columns] += weight
    for _, where, weight in parts:
        total[where.rows, where.columns] += weight / np.maximum(raw[where.rows, where.columns], 1e-6)
    assert np.allclose(total[hole > 0], 1, atol=1e-5)
    assert (raw[hole > 0] >= 1).all(), "each pixel lies in the core of a tile"


@settings(max_examples=100, deadline=None)
@given(size=st.tuples(st.integers(1, 1800), st.integers(1, 1800)), marks=MARKS, longest=st.sampled_from([512, 768, 1024]))
def test_there_are_no_more_tiles_than_the_hole_has_cells_nor_pixels_than_follow_from_its_length(
    size: tuple[int, int], marks: list[Mark], longest: int
) -> None:
    hole = hole_of(size, marks)
    made = plan(hole, strategy="tile", longest=longest)
    assert len(made.tiles) <= np.count_nonzero(made.numbers)
    # Each square of 256 pixels that has some of the hole in it costs at most a tile with its context, twice over.
    squares = sum(
        hole[top : top + 256, left : left + 256].any() for top in range(0, size[0], 256) for left in range(0, size[1], 256)
    )
    assert pixels(made) <= 2 * squares * (256 + 2 * CONTEXT) ** 2
    again = plan(hole, strategy="tile", longest=longest)
    assert again.tiles == made.tiles
    assert np.array_equal(again.numbers, made.numbers)


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(16, 3000), st.integers(16, 3000)),
    box=st.tuples(st.integers(0, 2999), st.integers(0, 2999), st.integers(1, 832), st.integers(1, 832)),
    longest=st.sampled_from([512, 768, 1024]),
)
def test_a_hole_that_fits_takes_one_tile_of_no_more_pixels_than_its_box_with_context(
    size: tuple[int, int], box: tuple[int, int, int, int], longest: int
) -> None:
    limit = longest - 2 * LEAST
    top, left, height, width = box[0] % size[0], box[1] % size[1], 1 + box[2] % (limit - 8), 1 + box[3] % (limit - 8)
    hole = np.zeros(size, np.uint8)
    hole[top : top + height, left : left + width] = 255
    made = plan(hole, longest=longest)
    (tile,) = made.tiles
    assert not made.guides
    assert pixels(made) <= cropped_by_box(hole)
    for core, area, extent in ((tile.core.rows, tile.area.rows, size[0]), (tile.core.columns, tile.area.columns, size[1])):
        assert core.start - area.start >= min(core.start, LEAST)
        assert area.stop - core.stop >= min(extent - core.stop, LEAST)


def line(size: tuple[int, int], thickness: int) -> Grey:
    hole = np.zeros(size, np.uint8)
    cv2.line(hole, (0, size[0] // 20), (size[1] - 1, size[0] - size[0] // 20), 255, thickness)
    return hole


@pytest.mark.parametrize("longest", [512, 768, 1024])
@pytest.mark.parametrize("thickness", [3, 60])
def test_tiles_follow_a_thin_hole_and_not_its_box(longest: int, thickness: int) -> None:
    hole = line((2000, 3000), thickness)
    made = plan(hole, longest=longest)
    assert not made.guides
    assert 2 * pixels(made) < cropped_by_box(hole)
    twice = plan(line((4000, 6000), thickness), longest=longest)
    assert pixels(twice) < 2.6 * pixels(made), "twice as long, not four times as much"


def test_letters_of_a_caption_share_tiles() -> None:
    hole = np.zeros((1000, 3000), np.uint8)
    cv2.putText(hole, "a caption of several words", (100, 900), cv2.FONT_HERSHEY_DUPLEX, 3, 255, 12)
    made = plan(hole)
    assert len(made.tiles) < 6
    assert 3 * pixels(made) < cropped_by_box(hole)


def test_holes_far_apart_have_tiles_of_their_own_and_near_ones_are_planned_together() -> None:
    hole = np.zeros((2000, 2000), np.uint8)
    hole[100:140, 100:140] = hole[1700:1740, 1800:1840] = 255
    assert [tile.size for tile in plan(hole).tiles] == [(256, 256)] * 2
    hole[100:140, 180:220] = 255
    near, far = plan(hole).tiles
    assert sorted([near.size, far.size]) == [(256, 256), (256, 320)]


def test_sides_come_in_steps_so_that_tiles_share_batches() -> None:
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
def test_a_hole_larger_than_a_tile_is_guided_by_a_reduced_one_that_shows_all_of_it(strategy: str, guides: int) -> None:
    hole = np.zeros((3000, 4000), np.uint8)
    cv2.circle(hole, (2000, 1500), 900, 255, cv2.FILLED)
    made = plan(hole, strategy=strategy)
    assert len(made.guides) == guides
    assert all(not tile.reduced for tile in made.tiles)
    for guide in made.guides.values():
        assert guide.reduced
        assert max(guide.size) == 1024
        assert guide.area.rows.start < 600 - CONTEXT
        assert guide.area.columns.stop > 2900 + CONTEXT
        assert np.isclose(sides(guide.area)[0] / sides(guide.area)[1], guide.size[0] / guide.size[1], rtol=0.02)


def test_resize_makes_one_tile_per_region_and_reduces_only_what_does_not_fit() -> None:
    hole = line((3000, 4000), 20)
    hole[100:140, 3000:3050] = 255
    small, large = sorted(plan(hole, strategy="resize").tiles, key=lambda tile: tile.reduced)
    assert (small.reduced, small.size) == (False, (256, 256))
    assert (large.reduced, max(large.size)) == (True, 1024)


def test_in_smooth_steps_one_tile_passes_into_the_next() -> None:
    hole = np.zeros((400, 3000), np.uint8)
    hole[190:210] = 255
    made = plan(hole)
    everything = Region(slice(0, 400), slice(0, 3000))
    tiles = np.zeros((len(made.tiles), 3000))
    for place, where, weight in weights(made.tiles, made.numbers, everything):
        tiles[place, where.columns] = weight[200 - where.rows.start]
    tiles /= tiles.sum(axis=0)
    assert len(tiles) > 2
    assert np.abs(np.diff(tiles, axis=1)).max() < 0.03
    for one, other in pairwise(sorted(made.tiles, key=lambda tile: tile.core.columns.start)):
        assert one.area.columns.stop - other.area.columns.start >= 2 * LEAST


def test_each_region_is_filled_by_its_own_tiles_only() -> None:
    """A small hole before the box of a long line: the line's tiles leave it alone."""
    hole = line((2000, 2000), 5)
    hole[300:330, 1500:1530] = 255
    made = plan(hole)
    numbers = owners(made.numbers, Region(slice(0, 2000), slice(0, 2000)))
    assert set(np.unique(numbers[300:330, 1500:1530])) != set(np.unique(numbers[1000:1010, 1000:1010]))
    raw = np.zeros((2000, 2000))
    for place, where, weight in weights(made.tiles, made.numbers, Region(slice(0, 2000), slice(0, 2000))):
        if made.tiles[place].number != numbers[310, 1510]:
            raw[where.rows, where.columns] += weight
    assert not raw[300:330, 1500:1530].any()


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(1, 700), st.integers(1, 700)), seed=st.integers(0, 99), share=st.sampled_from([1e-4, 0.01, 0.9])
)
def test_a_cell_is_filled_where_any_of_its_pixels_is(size: tuple[int, int], seed: int, share: float) -> None:
    hole = (np.random.default_rng(seed).random(size) < share).astype(np.uint8)
    cells = in_cells(hole)
    padded = np.pad(hole, [(0, -side % CELL) for side in size])
    wanted = padded.reshape(len(cells), CELL, -1, CELL).any(axis=(1, 3))
    assert np.array_equal(cells, wanted)
