from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.shared.errors import BadMask
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.operations.base import Untouched
from imagemill.worker.operations.inpaint import opencv
from imagemill.worker.operations.inpaint.mask import EMPTY, LARGE, build_mask, feathered
from imagemill.worker.operations.inpaint.opencv import Inpaint
from tests.fills import damaged, distances, inputs, rectangle_mask, slope


def inpaint(pixels: Pixels, mask: Grey, **options: Any) -> tuple[Pixels, list[str]]:
    operation = Inpaint()
    operation.load(Device(threads=1))
    picture = Picture(pixels.copy())  # `finish` writes into it
    work = operation.prepare(picture, inputs("opencv", mask, **options))
    if isinstance(work, Untouched):
        return picture.pixels, list(work.notes)
    return operation.finish(work, operation.run(work.samples)).pixels, work.notes


def noisy(height: int, width: int, channels: int = 3, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize("method", ["telea", "navier-stokes"])
@pytest.mark.parametrize("effort", [opencv.EFFORT, 2e4], ids=["at full size", "enormous hole, filled at a smaller size"])
def test_hole_in_a_smooth_picture_is_filled_close_to_the_original(
    method: str, effort: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opencv, "EFFORT", effort)
    original = slope(120, 160)
    mask = rectangle_mask(120, 160, slice(40, 75), slice(60, 110))
    result, notes = inpaint(damaged(original, mask), mask, method=method)
    assert not notes
    assert abs(result.astype(int) - original)[mask > 0].mean() < 5
    assert abs(result.astype(int) - original).max() < 24
    assert np.array_equal(result[mask == 0], original[mask == 0])


def test_fill_of_an_enormous_hole_takes_no_colour_from_inside_the_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the smaller size, pixels of the hole must not be averaged into its rim."""
    mask = rectangle_mask(80, 90, slice(11, 58), slice(13, 70))
    monkeypatch.setattr(opencv, "EFFORT", 3e3)
    grey = np.full((80, 90, 3), 100, np.uint8)
    grey[mask > 0] = 255
    assert (inpaint(grey, mask, method="navier-stokes")[0] == 100).all()


def test_result_depends_on_method_and_radius_and_is_repeatable() -> None:
    pixels, mask = noisy(40, 40), rectangle_mask(40, 40, slice(10, 25), slice(12, 30))
    results = {
        inpaint(pixels, mask, method=method, radius=radius)[0].tobytes()
        for method, radius in (("telea", 3), ("telea", 9), ("navier-stokes", 3))
    }
    assert len(results) == 3
    assert inpaint(pixels, mask)[0].tobytes() == inpaint(pixels, mask)[0].tobytes()


@pytest.mark.parametrize("channels", [3, 4], ids=["rgb", "rgba"])
def test_holes_far_apart_are_filled_as_if_each_were_the_only_one(channels: int) -> None:
    pixels = noisy(90, 200, channels)
    left = rectangle_mask(90, 200, slice(10, 30), slice(8, 30))
    right = rectangle_mask(90, 200, slice(50, 80), slice(150, 190))
    both, _ = inpaint(pixels, left | right)
    work = Inpaint().prepare(Picture(pixels), inputs("opencv", left | right))
    assert not isinstance(work, Untouched)
    assert len(work.samples) == 2
    assert np.array_equal(both[:, :100], inpaint(pixels, left)[0][:, :100])
    assert np.array_equal(both[:, 100:], inpaint(pixels, right)[0][:, 100:])
    if channels == 4:
        assert np.array_equal(both[..., 3], pixels[..., 3]), "alpha is kept, even in the hole"


@settings(max_examples=120, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.sampled_from([3, 4]),
    seed=st.integers(0, 99),
    marks=st.lists(st.tuples(*[st.integers(0, 39)] * 4, st.integers(0, 255)), max_size=4),
    options=st.fixed_dictionaries(
        {
            "method": st.sampled_from(["telea", "navier-stokes"]),
            "radius": st.sampled_from([0.5, 3, 9]),
            "mask_threshold": st.sampled_from([0, 127, 254]),
            "mask_dilate": st.integers(0, 6),
            "mask_feather": st.integers(0, 8),
        }
    ),
)
def test_pixels_outside_the_hole_and_its_fade_stay_bit_identical(
    size: tuple[int, int], channels: int, seed: int, marks: list[tuple[int, ...]], options: dict[str, Any]
) -> None:
    height, width = size
    pixels, mask = noisy(height, width, channels, seed), np.zeros(size, np.uint8)
    for top, left, tall, wide, value in marks:
        mask[top : top + tall + 1, left : left + wide + 1] = value
    masked = mask > options["mask_threshold"]
    if mask.any() and not masked.any():
        with pytest.raises(BadMask, match="not black"):
            inpaint(pixels, mask, **options)
        return
    if not masked.any():
        result, notes = inpaint(pixels, mask, **options)
        assert notes == [EMPTY]
        assert np.array_equal(result, pixels)
        return
    hole = distances(masked) <= options["mask_dilate"] + 1e-4
    if hole.all():
        with pytest.raises(BadMask, match="whole image"):
            inpaint(pixels, mask, **options)
        return
    result, notes = inpaint(pixels, mask, **options)
    kept = distances(hole) > options["mask_feather"] + 1e-4
    assert notes == ([LARGE] if hole.mean() > 0.3 else [])
    assert np.array_equal(result[kept], pixels[kept])
    if channels == 4:
        assert np.array_equal(result[..., 3], pixels[..., 3])


def test_fill_fades_out_over_the_feather() -> None:
    pixels, mask = noisy(60, 60), rectangle_mask(60, 60, slice(20, 40), slice(15, 34))
    opacity = feathered(build_mask((60, 60), inputs("opencv", mask)), 5) / 255
    assert (opacity[mask > 0] == 1).all()
    assert np.allclose(opacity[30, 34:41], [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0], atol=0.5 / 255)
    change = abs(inpaint(pixels, mask, mask_feather=5)[0].astype(int) - pixels).mean(axis=2)
    rings = [change[(opacity > low) & (opacity <= low + 0.25)].mean() for low in (0.75, 0.5, 0.25, 0)]
    assert rings == sorted(rings, reverse=True)
    assert rings[-1] > 0
    assert not change[opacity == 0].any()


def test_fade_as_wide_as_the_image_still_fills_from_it() -> None:
    original = slope(40, 50)
    mask = rectangle_mask(40, 50, slice(15, 25), slice(20, 30))
    result, _ = inpaint(damaged(original, mask), mask, mask_feather=200)
    assert abs(result.astype(int) - original).max() < 12


def test_empty_mask_leaves_the_image_unchanged_with_a_note() -> None:
    pixels = noisy(20, 30, 4)
    result, notes = inpaint(pixels, np.zeros((20, 30), np.uint8), mask_dilate=5, mask_feather=5)
    assert np.array_equal(result, pixels)
    assert notes == [EMPTY]


@pytest.mark.parametrize(("rows", "notes"), [(29, []), (31, [LARGE])])
def test_mask_over_thirty_per_cent_is_filled_with_a_note(rows: int, notes: list[str]) -> None:
    assert inpaint(slope(100, 40), rectangle_mask(100, 40, slice(0, rows), slice(0, 40)))[1] == notes
