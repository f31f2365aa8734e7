from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from imagemill.worker.operations.stylize.buckets import LONGEST, bucket, cropped, inside, laid_in, taken_out
from tests.unit.worker.operations.conformance import scene

SIZES = st.tuples(st.integers(1, 20_000), st.integers(1, 20_000))
MULTIPLES = st.sampled_from([8, 64])
SIDES = st.sampled_from([256, 512, 768, 1024])


@given(SIZES, SIDES, MULTIPLES)
def test_bucket_has_the_requested_area_and_multiples_near_the_images_proportions(
    size: tuple[int, int], side: int, multiple: int
) -> None:
    width, height = bucket(size, side, multiple)
    assert width % multiple == height % multiple == 0
    assert abs(width * height - side**2) <= max(width, height) * multiple / 2
    wanted = min(max(size[0] / size[1], 1 / LONGEST), LONGEST)
    nearest = multiple * (1 / width + 1 / height)  # relative change when either side changes by one step
    assert abs(np.log(width / height / wanted)) <= nearest


@given(SIZES, SIDES, MULTIPLES)
def test_bucket_of_a_rotated_image_is_the_rotated_bucket(size: tuple[int, int], side: int, multiple: int) -> None:
    assert bucket(size, side, multiple) == bucket(size[::-1], side, multiple)[::-1]


@given(SIDES, MULTIPLES)
def test_there_are_few_buckets(side: int, multiple: int) -> None:
    buckets = {bucket((width, 1000), side, multiple) for width in range(1, 10_000, 7)}
    assert len(buckets) <= 2 * side // multiple + 1
    assert (side, side) in buckets


@given(SIZES, SIZES)
def test_inside_is_the_largest_undistorted_size_that_fits(size: tuple[int, int], room: tuple[int, int]) -> None:
    width, height = inside(size, room)
    assert 1 <= width <= room[0]
    assert 1 <= height <= room[1]
    assert width == room[0] or height == room[1]
    assert abs(width - size[0] * room[1] / size[1]) <= 1 or abs(height - size[1] * room[0] / size[0]) <= 1


@given(st.integers(1, 400), st.integers(1, 400), MULTIPLES)
def test_taken_out_returns_what_was_laid_in(height: int, width: int, multiple: int) -> None:
    pixels = scene(height, width)
    room = bucket((width, height), 128, multiple)
    laid = laid_in(pixels, room)
    assert laid.shape == (room[1], room[0], 3)
    taken = taken_out(laid, (width, height))
    assert taken.shape[1::-1] == inside((width, height), room)
    assert np.array_equal(laid[: taken.shape[0], : taken.shape[1]], taken)


@given(st.integers(1, 200), st.integers(1, 200), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_cropped_is_the_largest_centred_part_with_the_proportions(
    height: int, width: int, proportions: tuple[int, int]
) -> None:
    pixels = np.arange(height * width, dtype=np.uint32).reshape(height, width, 1)
    crop = cropped(pixels, proportions)  # type: ignore[arg-type]  # indices show the crop's position
    high, wide = crop.shape[:2]
    assert (wide, high) == inside(proportions, (width, height))
    top, left = divmod(int(crop[0, 0, 0]), width)
    assert abs(2 * top + high - height) <= 1
    assert abs(2 * left + wide - width) <= 1
