"""Each measure on synthetic pictures with known properties."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from skimage.color import deltaE_ciede2000

from imagemill.worker.checking.measures import (
    FEWEST,
    Pair,
    agreement,
    border_step,
    cast,
    ciede2000,
    edge_map,
    edges,
    entropy,
    kept,
    lab,
    look,
    rings,
    shares,
    sharpness,
    shift,
    small,
)
from imagemill.worker.imaging.picture import Grey, Pixels
from tests.unit.worker.checking.samples import all_of, blurred, greyish, tinted
from tests.unit.worker.operations.conformance import PICTURES, scene

COORDINATE = st.floats(-100, 100)
COLOUR = st.tuples(st.floats(0, 100), COORDINATE, COORDINATE)


# --- colour ---


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [  # from table 1 of the paper
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
        ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
        ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_ciede2000_matches_published_values(
    one: tuple[float, float, float], other: tuple[float, float, float], difference: float
) -> None:
    assert ciede2000(one, other) == pytest.approx(difference, abs=5e-5)
    assert ciede2000(other, one) == pytest.approx(difference, abs=5e-5)


@given(one=COLOUR, other=COLOUR)
def test_ciede2000_matches_scikit_image(one: tuple[float, float, float], other: tuple[float, float, float]) -> None:
    theirs = float(deltaE_ciede2000(np.array(one), np.array(other)))
    assert ciede2000(one, other) == pytest.approx(theirs, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize(("da", "db"), [(6, 0), (-6, 0), (0, 8), (0, -8), (5, 5), (0.0, 2.0)])
def test_cast_equals_colour_difference_that_was_added(da: float, db: float) -> None:
    pixels = greyish()
    found = cast(Pair.of(tinted(pixels, da, db), pixels))
    assert found == pytest.approx(ciede2000((52, 0, 0), (52, da, db)), rel=0.1)


def test_cast_ignores_brightness_and_is_none_without_neutral_pixels() -> None:
    pixels = greyish()
    assert cast(Pair.of(tinted(pixels, 0, 0, dl=15), pixels)) == pytest.approx(0, abs=0.1)
    red = tinted(pixels, 60, 40)
    assert cast(Pair.of(pixels, red)) is None


def test_cast_ignores_transparent_pixels() -> None:
    pixels = greyish()
    hidden = np.dstack([tinted(pixels, 0, 20), np.zeros(pixels.shape[:2], np.uint8)])
    assert shift(Pair.of(hidden, pixels)) is None
    half = hidden.copy()
    half[:, :160] = np.dstack([pixels[:, :160], all_of(pixels)[:, :160]])
    assert cast(Pair.of(half, pixels)) == pytest.approx(0, abs=0.05)


def test_look_is_mean_and_deviation_in_cielab() -> None:
    pixels = greyish()
    colours = lab(pixels)
    found = look(colours, all_of(pixels))
    assert found == pytest.approx([*colours.mean(axis=(0, 1)), *colours.std(axis=(0, 1))], abs=0.06)
    assert look(colours, np.zeros(pixels.shape[:2], np.uint8)) is None


# --- detail and edges ---


@given(sigmas=st.tuples(st.floats(0.3, 4), st.floats(0.3, 4)), seed=st.integers(0, 20))
def test_sharpness_falls_with_blur(sigmas: tuple[float, float], seed: int) -> None:
    pixels = greyish(seed=seed)
    less, more = sorted(sigmas)
    assume(more - less > 0.2)  # rounding to 8 bits hides smaller differences
    pictures = (pixels, blurred(pixels, less), blurred(pixels, more))
    sharp, softer, softest = (sharpness(Pair.of(picture, pixels).grey, all_of(pixels)) or 0.0 for picture in pictures)
    assert sharp >= softer > softest > 0
    assert sharp > 2 * softest or more < 0.6


@pytest.mark.parametrize("size", [(240, 320), (1200, 1600), (3000, 4000)])
def test_kept_sharpness_shows_blur_at_any_picture_size(size: tuple[int, int]) -> None:
    pixels = cv2.resize(greyish(480, 640), size[::-1], interpolation=cv2.INTER_CUBIC)
    pair = Pair.of(blurred(pixels, max(size) / 200), pixels)
    share = kept(sharpness(pair.grey, pair.inner), sharpness(pair.source_grey, pair.inner))
    assert share is not None
    assert share < 0.3
    assert max(pair.size) <= 512


def test_kept_is_one_for_flat_pictures_and_none_if_unknown() -> None:
    assert kept(0.0, 0.0) == 1
    assert kept(None, 3.0) is None
    assert kept(3.0, None) is None


def test_sharpness_ignores_edge_of_cut_out() -> None:
    pixels = greyish()
    alpha = np.zeros(pixels.shape[:2], np.uint8)
    alpha[60:180, 80:240] = 255
    cut = np.dstack([np.where(alpha[..., None] > 0, pixels, 0), alpha])
    pair = Pair.of(cut, pixels)
    assert sharpness(pair.grey, pair.inner) == sharpness(pair.source_grey, pair.inner)


@given(seed=st.integers(0, 1000), width=st.integers(10, 90), height=st.integers(10, 90), part=st.floats(0.3, 1))
def test_sharpness_is_the_variance_of_the_laplacian(seed: int, width: int, height: int, part: float) -> None:
    random = np.random.default_rng(seed)
    grey = random.integers(0, 256, (height, width), np.uint8)
    inner = np.where(random.random((height, width)) < part, 255, 0).astype(np.uint8)
    assume(cv2.countNonZero(inner) >= FEWEST)
    deviation = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S), mask=inner)[1][0, 0]
    assert sharpness(grey, inner) == pytest.approx(deviation**2, rel=1e-14)


def test_entropy_of_one_two_and_all_grey_levels() -> None:
    flat = np.full((64, 64), 7, np.uint8)
    every = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64).astype(np.uint8)
    halves = np.repeat(np.array([[10, 200]], np.uint8), 64, axis=0).repeat(32, axis=1)
    assert [entropy(grey, all_of(grey)) for grey in (flat, halves, every)] == pytest.approx([0, 1, 8])
    assert entropy(flat, np.zeros_like(flat)) is None


def test_agreement_of_shifted_halved_and_missing_edges() -> None:
    squares = np.zeros((200, 200), np.uint8)
    for top in range(20, 180, 40):
        squares[top : top + 20, top : top + 20] = 200
    own = edges(squares)
    assert agreement(own, own) == 1
    assert agreement(np.roll(own, 2, axis=1), own) == 1
    far = agreement(np.roll(own, 10, axis=(0, 1)), own)
    half = own.copy()
    half[:, 100:] = 0
    part = agreement(half, own)
    assert far is not None
    assert part is not None
    assert far < 0.4 < part < 0.8
    assert agreement(np.zeros_like(own), own) == 0
    assert agreement(own, np.zeros_like(own)) is None, "no edges wanted"


def test_edge_map_scales_control_image() -> None:
    control = np.zeros((400, 300), np.uint8)
    cv2.rectangle(control, (60, 80), (220, 300), 255, 2)
    laid = edge_map(control, (150, 200))
    assert laid.shape == (200, 150)
    assert set(np.unique(laid)) == {0, 255}
    reference = np.zeros((200, 150), np.uint8)
    cv2.rectangle(reference, (30, 40), (110, 150), 255, 1)
    found = agreement(laid, reference)
    assert found is not None
    assert found > 0.9


# --- cut-outs and holes ---


def test_shares_of_opaque_and_partial_alpha() -> None:
    alpha = np.zeros((10, 10), np.uint8)
    alpha[:2], alpha[2:5], alpha[5] = 255, 128, 3
    assert shares(alpha) == (0.2, 0.3)


def ramp(height: int = 200, width: int = 300) -> Pixels:
    y, x = np.mgrid[:height, :width]
    return np.repeat((40 + x * 0.4 + y * 0.3)[..., None], 3, axis=2).astype(np.uint8)


def hole_in(pixels: Pixels) -> Grey:
    hole = np.zeros(pixels.shape[:2], np.uint8)
    cv2.circle(hole, (150, 100), 40, 255, -1)
    return hole


@given(level=st.integers(0, 60))
def test_border_step_grows_with_seam(level: int) -> None:
    pixels = ramp()
    hole = hole_in(pixels)
    filled = np.where(hole[..., None] > 0, pixels + np.uint8(level), pixels)
    found = border_step(filled, hole)
    assert found is not None
    assert found == pytest.approx(1 + level / 1.35, rel=0.25, abs=0.1)


def test_border_step_is_one_in_noise() -> None:
    rough = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    assert border_step(rough, hole_in(rough)) == pytest.approx(1, abs=0.05)


def test_border_step_is_none_without_three_pixels_outside() -> None:
    pixels = ramp(40, 40)
    assert border_step(pixels, np.zeros((40, 40), np.uint8)) is None
    hole = np.full((40, 40), 255, np.uint8)
    assert border_step(pixels, hole) is None
    hole[:, 39] = 0
    assert border_step(pixels, hole) is None
    hole[:, 30:] = 0
    assert border_step(pixels, hole) == pytest.approx(1, abs=0.2)


def test_rings_do_not_touch() -> None:
    hole = hole_in(ramp())
    inside, around = rings(hole, (150, 100))
    assert inside.shape == around.shape == (100, 150)
    assert not (inside & around).any()
    assert not (cv2.dilate(inside, np.ones((3, 3), np.uint8)) & around).any()
    assert np.count_nonzero(inside) == pytest.approx(math.pi * 20**2, rel=0.1)
    assert around.any()


@pytest.mark.parametrize("name", PICTURES)
def test_measures_are_finite_for_every_picture(name: str) -> None:
    pixels = PICTURES[name]
    pair = Pair.of(pixels, scene(50, 70))
    for value in (cast(pair), sharpness(pair.grey, pair.inner), entropy(pair.grey, pair.solid)):
        assert value is None or math.isfinite(value)
    assert small(pixels, (5, 7)).shape[:2] == (7, 5)
