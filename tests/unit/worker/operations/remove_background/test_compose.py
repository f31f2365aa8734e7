from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.worker.imaging.picture import Grey, Pixels
from imagemill.worker.operations.remove_background import compose as module
from imagemill.worker.operations.remove_background.compose import ENLARGED, NO_SHADOW, compose
from imagemill.worker.operations.remove_background.matte import EMPTY, SEEN
from imagemill.worker.operations.remove_background.matting import TOO_LARGE, matted

RED, GREEN = np.array((200, 40, 40)), np.array((40, 210, 60))
SIZE = (240, 160)  # width, height
IMAGE = "https://images.example/behind.png"


def composed(
    pixels: Pixels, alpha: Grey, behind: Pixels | None = None, *, clean_rim: bool = True, **options: Any
) -> tuple[Pixels, list[str]]:
    notes: list[str] = []
    before = pixels.copy(), alpha.copy()
    if behind is not None:
        options["background_image"] = IMAGE
    result = compose(pixels, alpha, RembgRemoveBackground(**options), behind, notes, clean_rim=clean_rim)
    assert np.array_equal(pixels, before[0]), "the source must not change"
    assert np.array_equal(alpha, before[1]), "the matte must not change"
    return result, notes


def ellipse(
    centre: tuple[float, float] = (110, 80),
    axes: tuple[float, float] = (60, 40),
    soft: float = 1.5,
    size: tuple[int, int] = SIZE,
) -> Any:
    """The true alpha of an ellipse, 0..1."""
    y, x = np.mgrid[: size[1], : size[0]].astype(np.float32)
    far = np.hypot((x + 0.5 - centre[0]) / axes[0], (y + 0.5 - centre[1]) / axes[1]) - 1
    return np.clip(0.5 - far * min(axes) / (2 * soft), 0, 1)


def scene(soft: float = 1.5) -> tuple[Pixels, Grey]:
    """A red ellipse, 120 by 80, on green, and its matte."""
    truth = ellipse(soft=soft)
    alpha = np.rint(truth * 255).astype(np.uint8)
    share = alpha[..., None] / 255
    return np.rint(RED * share + GREEN * (1 - share)).astype(np.uint8), alpha


def box_of(shown: Any) -> tuple[int, ...]:
    down, across = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    return int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1


@pytest.mark.parametrize("strip", [1 << 20, 1000], ids=["at once", "in strips"])
@pytest.mark.parametrize("clean", [True, False])
def test_cut_out_has_the_matte_as_alpha_and_a_clean_rim(clean: bool, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRIP", strip)
    pixels, alpha = scene(soft=4)
    result, notes = composed(pixels, alpha, clean_rim=clean)
    assert not notes
    assert np.array_equal(result[..., 3], alpha)
    assert np.array_equal(result[alpha == 255, :3], pixels[alpha == 255])
    assert not result[alpha == 0].any(), "invisible pixels have no colours"
    rim = (alpha > 20) & (alpha < 250)
    assert (abs(result[rim, :3] - RED).max() < 8) == clean


def test_cut_out_multiplies_the_matte_with_the_source_alpha() -> None:
    pixels, alpha = scene()
    own = np.full(alpha.shape, 255, np.uint8)
    own[:, 100:], own[:, 120:] = 128, 0
    result, _ = composed(np.dstack([pixels, own]), alpha)
    assert abs(result[..., 3] - alpha * (own / 255)).max() <= 0.51


@pytest.mark.parametrize("shown", [dict(background="#0080ff"), dict(picture=(0, 128, 255))], ids=["colour", "image"])
def test_background_gives_an_opaque_result(shown: dict[str, Any]) -> None:
    pixels, alpha = scene(soft=4)
    picture = shown.pop("picture", None)
    behind = None if picture is None else np.full((9, 7, 3), picture, np.uint8)
    result, _ = composed(pixels, alpha, behind, **shown)
    share = alpha[..., None] / 255
    assert result.shape == pixels.shape
    assert abs(result - (RED * share + np.array((0, 128, 255)) * (1 - share))).max() < 8
    assert (result[alpha == 0] == (0, 128, 255)).all()


@pytest.mark.parametrize("size", [(800, 160), (120, 300), (30, 20)], ids=["wider", "taller", "smaller"])
def test_background_image_covers_the_result_and_is_centred(size: tuple[int, int]) -> None:
    x = np.linspace(-1, 1, size[0])[None, :] * size[0]
    y = np.linspace(-1, 1, size[1])[:, None] * size[1]
    far = np.hypot(x, y) / np.hypot(*size)  # brighter further from the centre
    behind = np.repeat(np.rint(far * 250).astype(np.uint8)[..., None], 3, axis=2)
    result, _ = composed(np.zeros((160, 240, 3), np.uint8), np.zeros((160, 240), np.uint8), behind)
    shown = result[..., 0].astype(int)
    assert abs(shown - shown[::-1]).max() <= 6
    assert abs(shown - shown[:, ::-1]).max() <= 6
    scale = max(240 / size[0], 160 / size[1])
    corner = np.hypot(240, 160) / scale / np.hypot(*size) * 250
    assert shown[0, 0] == pytest.approx(corner, abs=6), "cropped no more than necessary"


def test_transparent_background_image_is_composited_over_white() -> None:
    behind = np.zeros((20, 30, 4), np.uint8)
    behind[..., 3] = 102
    result, _ = composed(*scene(), behind)
    assert (result[0, 0] == 153).all()


def test_background_image_is_flattened_before_it_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled: list[int] = []
    real = module.resize

    def resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
        scaled.append(pixels.shape[2])
        return real(pixels, size)

    monkeypatch.setattr(module, "resize", resize)
    module._covering(np.full((20, 30, 4), 200, np.uint8), SIZE)
    assert scaled == [3], "scaling alpha takes floats, 4 GB at 100 megapixels"


@pytest.mark.parametrize("margin", [0, 0.05, 0.25])
@pytest.mark.parametrize("background", [None, "#ffffff"])
@pytest.mark.parametrize("tall", [False, True])
def test_crop_is_the_subject_with_a_margin(margin: float, background: str | None, tall: bool) -> None:
    pixels, alpha = (np.ascontiguousarray(np.swapaxes(some, 0, 1)) if tall else some for some in scene())
    result, notes = composed(pixels, alpha, crop=True, margin=margin, background=background)
    left, top, right, bottom = box_of(alpha > SEEN)
    side = round(margin * max(right - left, bottom - top))
    assert result.shape[:2] == (bottom - top + 2 * side, right - left + 2 * side)
    assert not notes
    whole = composed(pixels, alpha, background=background)[0][top - side : bottom + side, left - side : right + side]
    assert np.array_equal(result[..., 3:], whole[..., 3:])
    assert abs(result.astype(int) - whole).max() < 8, "the rim's colours may be averaged over fewer pixels"


@pytest.mark.parametrize("background", [None, "#ffffff"])
def test_crop_outside_the_image_is_filled(background: str | None) -> None:
    pixels = np.full((40, 60, 3), 90, np.uint8)
    result, _ = composed(pixels, np.full((40, 60), 255, np.uint8), crop=True, margin=0.5, background=background)
    assert result.shape[:2] == (100, 120)
    outside = np.ones((100, 120), bool)
    outside[30:70, 30:90] = False
    assert (result[outside] == (0 if background is None else 255)).all()
    assert (result[30:70, 30:90, :3] == 90).all()


@pytest.mark.parametrize("faint", [0, 8])
def test_crop_ignores_nearly_invisible_pixels(faint: int) -> None:
    pixels, alpha = scene()
    left, top, right, bottom = box_of(alpha > SEEN)
    result, _ = composed(pixels, np.maximum(alpha, np.uint8(faint)), crop=True, margin=0)
    assert result.shape[:2] == (bottom - top, right - left)


@pytest.mark.parametrize(
    ("centre", "axes"), [((110, 80), (60, 40)), ((30, 80), (30, 60)), ((200, 150), (60, 40))], ids=["wide", "tall", "cut off"]
)
@pytest.mark.parametrize(("side", "margin"), [(100, 0.0625), (2000, 0.05), (37, 0.5), (16, 0)])
@pytest.mark.parametrize("channels", [3, 4])
def test_canvas_is_a_square_filled_by_the_subject_and_its_margin(
    centre: tuple[float, float], axes: tuple[float, float], side: int, margin: float, channels: int
) -> None:
    alpha = np.rint(ellipse(centre, axes) * 255).astype(np.uint8)
    pixels = np.full((160, 240, channels), 255, np.uint8)
    pixels[..., :3] = RED
    result, notes = composed(pixels, alpha, crop=True, canvas=side, margin=margin, background="#ffffff")
    assert result.shape == (side, side, 3)
    left, top, right, bottom = box_of(alpha > SEEN)
    scale = side / (1 + 2 * margin) / max(right - left, bottom - top)
    assert (notes == [ENLARGED]) == (scale > 1)
    left, top, right, bottom = box_of(result[..., 1] < 245)
    slack = 2 + 2 * scale
    assert max(right - left, bottom - top) == pytest.approx(side / (1 + 2 * margin), abs=slack)
    assert left + right == pytest.approx(side, abs=slack)
    assert top + bottom == pytest.approx(side, abs=slack)


def test_canvas_is_transparent_without_a_background() -> None:
    result, _ = composed(*scene(), crop=True, canvas=300)
    assert result.shape == (300, 300, 4)
    assert not result[0].any()
    assert result[150, 150].tolist() == [*RED, 255]


@pytest.mark.parametrize("frame", [dict(), dict(crop=True), dict(crop=True, canvas=90)], ids=["whole", "crop", "canvas"])
def test_mask_only_returns_the_matte_in_three_equal_channels(frame: dict[str, Any]) -> None:
    pixels, alpha = scene()
    mask, _ = composed(pixels, alpha, mask_only=True, **frame)
    cutout, _ = composed(pixels, alpha, **frame)
    assert mask.shape[2] == 3
    assert all(np.array_equal(mask[..., channel], cutout[..., 3]) for channel in range(3))


@pytest.mark.parametrize(
    "options", [{}, {"crop": True}, {"crop": True, "canvas": 50}, {"shadow": True}, {"alpha_matting": True}], ids=str
)
@pytest.mark.parametrize("faint", [0, 5])
def test_empty_cut_out_gets_a_note_and_keeps_its_size(options: dict[str, Any], faint: int) -> None:
    pixels, _ = scene()
    result, notes = composed(pixels, np.full(SIZE[::-1], faint, np.uint8), **options)
    assert notes == [EMPTY]
    assert result.shape == (160, 240, 4)
    assert (result[..., 3] == faint).all()


@pytest.mark.parametrize(("level", "found"), [(12, False), (13, True)])
@pytest.mark.parametrize("crop", [False, True])
def test_one_visible_pixel_is_a_subject(level: int, found: bool, crop: bool) -> None:
    pixels, _ = scene()
    alpha = np.zeros(SIZE[::-1], np.uint8)
    alpha[40, 50] = level
    result, notes = composed(pixels, alpha, crop=crop)
    assert notes == ([] if found else [EMPTY])
    assert (result.shape[:2] == (160, 240)) == (not (found and crop))


def test_compose_skips_matting_when_the_image_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "matted", partial(matted, most=10_000))
    pixels, alpha = scene()
    plain, _ = composed(pixels, alpha)
    result, notes = composed(pixels, alpha, alpha_matting=True)
    assert notes == [TOO_LARGE]
    assert np.array_equal(result, plain)


def test_matting_recovers_an_edge_that_the_matte_blurs() -> None:
    pixels, truth = scene(soft=0.5)
    blurred = cv2.GaussianBlur(truth, (0, 0), 5)
    result, notes = composed(pixels, blurred, alpha_matting=True)
    assert not notes
    assert abs(result[..., 3].astype(int) - truth).mean() < 0.1 * abs(blurred.astype(int) - truth).mean()


GROUND = (480, 360)
DEEP = 0.4


def standing(backdrop: str = "plain", colour: tuple[float, float, float] = (1, 1, 1)) -> tuple[Pixels, Grey, Any]:
    """An egg with a soft shadow: image, matte and shadow 0..1. `colour` is the shadow's strength in red, green and blue."""
    y, x = np.mgrid[: GROUND[1], : GROUND[0]].astype(np.float32)
    shade = cv2.GaussianBlur(DEEP * ellipse((270, 250), (110, 26), size=GROUND).astype(np.float32), (0, 0), 8)
    light = 235 - 25 * y / GROUND[1] - 12 * x / GROUND[0]
    grain = np.random.default_rng(3).normal(0, 1.5, (*light.shape, 3))
    if backdrop == "texture":
        grain = cv2.GaussianBlur(np.random.default_rng(3).normal(0, 60, (*light.shape, 3)), (0, 0), 4) * 8
    ground = light[..., None] * (1 - shade[..., None] * np.array(colour)) + grain
    truth = ellipse((220, 180), (70, 90), size=GROUND)[..., None]
    pixels = np.rint(np.clip(ground * (1 - truth) + RED * truth, 0, 255)).astype(np.uint8)
    return pixels, np.rint(truth[..., 0] * 255).astype(np.uint8), shade


@pytest.mark.parametrize("strip", [1 << 20, 5000], ids=["at once", "in strips"])
def test_shadow_becomes_black_with_its_density_as_alpha(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRIP", strip)
    pixels, alpha, shade = standing()
    result, notes = composed(pixels, alpha, shadow=True)
    assert not notes
    away = alpha == 0
    near = cv2.dilate(alpha, np.ones((25, 25), np.uint8)) > 0  # near the subject, the shadow is extrapolated
    found = result[..., 3] / 255
    assert abs(found - shade)[away & ~near].max() < 0.08
    assert abs(found - shade)[away].max() < 0.15
    assert found[away].max() > 0.3
    assert not result[away, :3].any()
    assert np.array_equal(result[alpha == 255], np.dstack([pixels, alpha])[alpha == 255])
    assert not composed(pixels, alpha)[0][away].any(), "without the option, the shadow is dropped"


def test_shadow_darkens_the_background() -> None:
    pixels, alpha, shade = standing()
    on_colour, _ = composed(pixels, alpha, shadow=True, background="#8090ff")
    alone, _ = composed(pixels, alpha, shadow=True)
    away = alpha == 0
    wanted = np.array((128, 144, 255)) * (1 - alone[..., 3:] / 255.0)
    assert abs(on_colour - wanted)[away].max() <= 1.5
    assert (on_colour[(shade > 0.35) & away, 2] < 200).any()


def test_crop_includes_the_shadow() -> None:
    pixels, alpha, _ = standing()
    with_it, without = (composed(pixels, alpha, shadow=shadow, crop=True, margin=0)[0] for shadow in (True, False))
    assert with_it.shape[1] > without.shape[1] + 60
    whole = composed(pixels, alpha, shadow=True)[0]
    left, top, right, bottom = box_of(whole[..., 3] > SEEN)
    assert with_it.shape[:2] == pytest.approx((bottom - top, right - left), abs=4)
    part = whole[top : top + with_it.shape[0], left : left + with_it.shape[1]]
    common = tuple(slice(0, min(some)) for some in zip(part.shape, with_it.shape, strict=True))
    assert abs(part[common][..., 3].astype(int) - with_it[common][..., 3]).mean() < 4


def test_canvas_scales_the_shadow_with_the_subject() -> None:
    pixels, alpha, _ = standing()
    small, large = (composed(pixels, alpha, shadow=True, crop=True, canvas=side)[0][..., 3] for side in (200, 800))
    assert abs(cv2.resize(large, (200, 200), interpolation=cv2.INTER_AREA).astype(int) - small).mean() < 2


def darkened(pixels: Pixels, centre: tuple[float, float]) -> Pixels:
    patch = cv2.GaussianBlur(DEEP * ellipse(centre, (40, 20), size=GROUND).astype(np.float32), (0, 0), 6)
    return np.rint(pixels * (1 - patch[..., None])).astype(np.uint8)


def test_dark_patch_elsewhere_is_not_kept_with_the_shadow() -> None:
    pixels, alpha, shade = standing()
    result, notes = composed(darkened(pixels, (420, 60)), alpha, shadow=True)
    assert not notes
    assert not result[:120, 320:, 3].any()
    assert result[(shade > 0.35) & (alpha == 0), 3].min() > 50


@pytest.mark.parametrize(
    ("pixels", "alpha"),
    [
        standing(colour=(0, 0, 0))[:2],
        standing(colour=(1, 0.2, 0))[:2],
        standing("texture")[:2],
        (darkened(standing(colour=(0, 0, 0))[0], (420, 60)), standing()[1]),
        (darkened(standing(colour=(0, 0, 0))[0], (300, 120)), standing()[1]),
        tuple(part[:240] for part in standing()[:2]),
    ],
    ids=[
        "no shadow",
        "a coloured object",
        "a backdrop too rough",
        "a dark patch elsewhere",
        "a dark patch behind its head",
        "feet outside the image",
    ],
)
def test_nothing_but_a_shadow_of_the_subject_is_kept(pixels: Pixels, alpha: Grey) -> None:
    result, notes = composed(pixels, alpha, shadow=True)
    assert notes == [NO_SHADOW]
    assert np.array_equal(result, composed(pixels, alpha)[0])


MEASURE = """
import json, sys, cv2, numpy as np
from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.worker.operations.remove_background.compose import compose
cv2.setNumThreads(1)
options = RembgRemoveBackground(**json.loads(sys.argv[1]))
pixels = np.full((8333, 12000, 3), 120, np.uint8)
small = cv2.GaussianBlur(cv2.circle(np.zeros((320, 320), np.uint8), (160, 150), 120, 255, -1), (0, 0), 1.5)
alpha = cv2.resize(small, (12000, 8333))
def memory(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
result = compose(pixels, alpha, options, None, [])
print(memory("VmHWM") - before - result.nbytes / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("options", [{"background": "#ffffff", "shadow": True}, {"crop": True, "canvas": 1000}], ids=str)
def test_hundred_megapixels_need_little_more_memory_than_image_and_result(options: dict[str, Any]) -> None:
    command = [sys.executable, "-c", MEASURE, json.dumps(options)]
    took = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert float(took) < 150, "MB"


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    channels=st.sampled_from([3, 4]),
    levels=st.sampled_from([2, 256]),
    seed=st.integers(0, 9),
    behind=st.sampled_from([None, (1, 1), (50, 3)]),
    options=st.fixed_dictionaries(
        {
            "canvas": st.sampled_from([None, 16, 100]),
            "margin": st.sampled_from([0, 0.05, 0.5]),
            "shadow": st.booleans(),
        }
    ),
)
def test_result_of_random_images_is_well_formed(
    size: tuple[int, int], channels: int, levels: int, seed: int, behind: tuple[int, int] | None, options: dict[str, Any]
) -> None:
    drawn = np.random.default_rng(seed).integers(0, levels, (size[1], size[0], channels + 1))
    drawn = (drawn * (255 // (levels - 1))).astype(np.uint8)
    pixels, alpha = np.ascontiguousarray(drawn[..., 1:]), np.ascontiguousarray(drawn[..., 0])
    picture = None if behind is None else np.full((*behind, 3), 77, np.uint8)
    result, notes = composed(pixels, alpha, picture, crop=True, **options)
    again, _ = composed(pixels, alpha, picture, crop=True, **options)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert result.shape[2] == (4 if behind is None else 3)
    assert np.array_equal(result, again)
    if options["canvas"] and EMPTY not in notes:
        assert result.shape[:2] == (options["canvas"], options["canvas"])
