"""Scaling and rotation: exact sizes, correct orientation and no dark rim around cut-outs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.worker.imaging import scale
from imagemill.worker.imaging.scale import Array, fit, reduced, resize, upright

sides = st.integers(1, 100_000)
few = st.integers(1, 60)


@settings(deadline=None)
@given(sides, sides, sides)
def test_fit_shrinks_to_edge_and_keeps_aspect(width: int, height: int, edge: int) -> None:
    new = fit((width, height), edge)
    if max(width, height) <= edge:
        assert new == (width, height)
        return
    assert max(new) == edge
    for got, side in zip(new, (width, height), strict=True):
        assert got == 1 or abs(got - side * edge / max(width, height)) <= 0.5


@pytest.mark.parametrize(
    ("size", "edge", "wanted"),
    [
        ((4000, 3000), 1600, (1600, 1200)),
        ((3000, 4000), 1600, (1200, 1600)),
        ((100, 50), 100, (100, 50)),
        ((100, 50), None, (100, 50)),
        ((1000, 3), 100, (100, 1)),  # at least one pixel
        ((1000, 15), 100, (100, 2)),  # halves are rounded up
    ],
)
def test_fit_of_common_sizes(size: tuple[int, int], edge: int | None, wanted: tuple[int, int]) -> None:
    assert fit(size, edge) == wanted


@pytest.mark.parametrize(
    ("orientation", "wanted"),
    [
        (1, [[1, 2, 3], [4, 5, 6]]),
        (2, [[3, 2, 1], [6, 5, 4]]),
        (3, [[6, 5, 4], [3, 2, 1]]),
        (4, [[4, 5, 6], [1, 2, 3]]),
        (5, [[1, 4], [2, 5], [3, 6]]),
        (6, [[4, 1], [5, 2], [6, 3]]),
        (7, [[6, 3], [5, 2], [4, 1]]),
        (8, [[3, 6], [2, 5], [1, 4]]),
    ],
)
def test_upright_applies_every_orientation(orientation: int, wanted: list[list[int]]) -> None:
    stored = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    assert upright(stored, orientation).tolist() == wanted
    for channels in (3, 4):
        turned = upright(np.dstack([stored * np.uint8(channel + 1) for channel in range(channels)]), orientation)
        for channel in range(channels):
            assert turned[:, :, channel].tolist() == [[value * (channel + 1) for value in row] for row in wanted]


@settings(deadline=None)
@given(few, few, few, few, st.sampled_from([(), (3,), (4,)]), st.integers(0, 255), st.integers(1, 255))
def test_resize_keeps_uniform_colour(
    width: int, height: int, new_width: int, new_height: int, channels: tuple[int, ...], level: int, alpha: int
) -> None:
    pixels = np.full((height, width, *channels), level, np.uint8)
    if channels == (4,):
        pixels[:, :, 3] = alpha
    new = resize(pixels, (new_width, new_height))
    assert new.shape == (new_height, new_width, *channels)
    assert new.dtype == np.uint8
    assert np.abs(new.astype(int) - pixels[0, 0]).max() == 0


def test_resize_to_same_size_changes_nothing() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (7, 9, 4), np.uint8)
    assert (resize(pixels, (9, 7)) == pixels).all()


def test_resize_averages_when_shrinking() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (40, 60, 3), np.uint8)
    means = pixels.reshape(10, 4, 20, 3, 3).mean(axis=(1, 3))
    assert np.abs(resize(pixels, (20, 10)) - means).max() <= 0.51


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("size", [(64, 96), (63, 97), (1, 5), (130, 1)])
@pytest.mark.parametrize("halvings", [0, 1, 3])
def test_reduced_averages_squares(
    halvings: int, size: tuple[int, int], channels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (*size, *channels), np.uint8)
    side = 2**halvings
    padded = np.pad(pixels, ((0, -size[0] % side), (0, -size[1] % side), *[(0, 0)] * len(channels)), mode="edge")
    squares = padded.reshape(padded.shape[0] // side, side, padded.shape[1] // side, side, *channels)
    whole = reduced(pixels, halvings)
    assert np.abs(whole - squares.mean(axis=(1, 3))).max() <= 0.5 * max(halvings, 1)
    monkeypatch.setattr(scale, "_STRIP", 1000)
    assert np.array_equal(reduced(pixels, halvings, lambda strip: 255 - strip), reduced(255 - pixels, halvings))
    assert np.array_equal(reduced(pixels, halvings), whole)


def test_resize_is_smooth_and_does_not_overflow_when_enlarging() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[:, 1] = 255
    pixels[:, :, 3] = 254  # not opaque, so that colours are weighted by alpha
    new = resize(pixels, (40, 2))[0, :, 0].astype(int)
    assert (np.diff(new[8:32]) >= 0).all()
    assert new[:8].max() < 30
    assert new[32:].min() > 225


def rim(hidden: int) -> Array:
    """A red disc with a soft edge; the transparent pixels have grey level `hidden`."""
    y, x = np.mgrid[:64, :64] - 31.5
    alpha = np.clip((24 - np.hypot(x, y)) * 100, 0, 255)
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :, 0] = np.where(alpha > 0, 200, hidden)
    pixels[:, :, 1:3] = np.where(alpha > 0, 40, hidden)[:, :, None]
    pixels[:, :, 3] = alpha
    return pixels


@pytest.mark.parametrize("size", [(20, 20), (31, 47), (64, 10), (100, 90)])
def test_resize_gives_cut_out_no_rim(size: tuple[int, int]) -> None:
    for hidden in (0, 255):
        scaled = resize(rim(hidden), size)
        seen = scaled[scaled[:, :, 3] > 8].astype(int)
        assert np.abs(seen[:, :3] - [200, 40, 40]).max() <= 2
        assert (scaled[:, :, 3] % 255 > 0).any()  # there are partially transparent pixels to get wrong
    assert (resize(rim(0), size)[:, :, 3] == resize(rim(255), size)[:, :, 3]).all()


def test_resize_keeps_hue_of_faintest_pixel() -> None:
    pixels = np.full((8, 8, 4), (250, 120, 30, 1), np.uint8)
    assert np.abs(resize(pixels, (3, 5)).astype(int) - (250, 120, 30, 1)).max() <= 1


def test_resize_treats_opaque_rgba_like_rgb() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (33, 21, 4), np.uint8)
    pixels[:, :, 3] = 255
    for size in ((10, 11), (50, 60)):
        new = resize(pixels, size)
        assert (new[:, :, :3] == resize(np.ascontiguousarray(pixels[:, :, :3]), size)).all()
        assert (new[:, :, 3] == 255).all()


def test_resize_and_upright_handle_sides_above_16_bits() -> None:
    pixels = np.zeros((3, 70_000, 3), np.uint8)
    pixels[:, 35_000:] = 255
    small = resize(pixels, (700, 1))
    assert (small[0, :350] == 0).all()
    assert (small[0, 350:] == 255).all()
    assert upright(pixels, 6).shape == (70_000, 3, 3)
