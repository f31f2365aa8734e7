"""The quality check: flags, repairs, and that a repair never makes a result worse."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.shared.messages import Job
from imagemill.shared.quality import Measures
from imagemill.worker.checking.measures import Pair
from imagemill.worker.checking.quality import Checked, check, lacking, sharpened
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.operations.base import Evidence, Spec, Work
from tests.unit.worker.checking.samples import all_of, blurred, greyish, tinted
from tests.unit.worker.operations.conformance import PICTURES, hole

SPECS = {
    "remove-background": Spec("remove-background", "opencv", makes_alpha=True),
    "inpaint": Spec("inpaint", "opencv", needs_mask=True),
    "stylize": Spec("stylize", "opencv", restyles=True),
}
PLAIN = Evidence()
LIMITS = {"least_sharpness": 0.6, "most_cast": 2.0}


def job(operation: str, **quality: Any) -> Job:
    fields = {"operation": operation, "output": {"url": "s3://results/x"}, "policy": {"quality": quality}}
    return Job.model_validate(fields)


def checked(result: Pixels, source: Pixels, operation: str = "stylize", evidence: Evidence = PLAIN, **quality: Any) -> Checked:
    work = Work([], None, notes=["enlarged"], evidence=evidence)
    return check(Picture(result, "jpeg"), Picture(source), work, SPECS[operation], job(operation, **quality))


def total(found: Checked) -> float:
    return sum(found.beyond.values())


def test_check_does_nothing_when_off() -> None:
    pixels = greyish()
    found = checked(pixels, pixels, mode="off")
    assert found.picture.pixels is pixels
    assert (found.notes, found.measures, found.beyond) == (("enlarged",), None, {})


def test_what_is_not_in_the_image_is_not_a_fault() -> None:
    empty = np.zeros((40, 30, 4), np.uint8)
    assert checked(empty, greyish(), "remove-background").beyond
    found = checked(empty, greyish(), "remove-background", Evidence(absent=True))
    assert (found.notes, found.measures, found.beyond) == (("enlarged",), Measures(), {})


@pytest.mark.parametrize(
    ("operation", "measures"),
    [
        ("remove-background", {"sharpness", "kept", "entropy", "cast"}),
        ("inpaint", {"sharpness", "kept", "entropy", "cast"}),
        ("stylize", {"sharpness", "kept", "entropy", "cast", "edges", "look", "before"}),
    ],
)
def test_check_takes_measures_of_operation(operation: str, measures: set[str]) -> None:
    pixels = greyish()
    found = checked(pixels, pixels, operation).measures
    assert found is not None
    assert set(found.model_dump(exclude_none=True)) == measures
    assert (found.kept, found.cast) == (1, 0)


def test_check_measures_alpha_of_cut_out_and_step_around_hole() -> None:
    pixels = greyish()
    alpha = np.zeros(pixels.shape[:2], np.uint8)
    alpha[:, :80], alpha[:, 80:112] = 255, 100
    cut = checked(np.dstack([pixels, alpha]), pixels, "remove-background").measures
    assert cut is not None
    assert (cut.opaque, cut.half) == (0.25, 0.1)
    mask = hole(pixels)
    seam = np.where(mask[..., None] > 0, np.uint8(250), pixels)
    found = checked(seam, seam, "inpaint", Evidence(comparable=False, hole=mask))
    assert set(found.beyond) == {"seam"}
    assert found.measures is not None
    assert set(found.measures.model_dump(exclude_none=True)) == {"sharpness", "kept", "entropy", "step"}


def test_check_compares_sharpness_of_fill_with_surroundings() -> None:
    pixels = greyish()
    mask = hole(pixels)
    smeared = np.where(mask[..., None] > 0, blurred(pixels, 4), pixels)
    for made, least, most in ((pixels, 0.7, 1.4), (smeared, 0.0, 0.1)):
        measures = checked(made, made, "inpaint", Evidence(comparable=False, hole=mask)).measures
        assert measures is not None
        assert measures.kept is not None
        assert least < measures.kept < most


def test_check_compares_subject_only_when_background_was_replaced() -> None:
    pixels = greyish()
    alpha = all_of(pixels)
    alpha[:, 160:] = 0
    blue = np.where(alpha[..., None] > 0, pixels, np.array([0, 0, 255], np.uint8))
    found = checked(blue, pixels, "remove-background", Evidence(alpha=alpha))
    assert found.beyond == {}
    assert found.measures is not None
    assert (found.measures.opaque, found.measures.cast) == (0.5, 0)
    assert "cast" in checked(blue, pixels, "remove-background").beyond


def test_check_skips_comparison_when_not_comparable() -> None:
    pixels = greyish()
    moved = np.ascontiguousarray(tinted(pixels, 30, 30)[100:, 100:])
    measures = checked(moved, pixels, "remove-background", Evidence(comparable=False, alpha=all_of(pixels))).measures
    assert measures is not None
    assert (measures.cast, measures.kept, measures.opaque) == (None, None, 1)


@pytest.mark.parametrize(
    ("spoil", "flag", "note"),
    [
        (lambda pixels: blurred(pixels, 0.8), "blurred", "repaired_sharpness"),
        (lambda pixels: tinted(pixels, 0, 7), "cast", "repaired_cast"),
    ],
)
def test_check_flags_or_repairs_flaw(spoil: Any, flag: str, note: str) -> None:
    pixels = greyish()
    bad = spoil(pixels)
    flagged = checked(bad, pixels, **LIMITS)
    assert (set(flagged.beyond), flagged.notes) == ({flag}, ("enlarged",))
    assert flagged.picture.pixels is bad
    repaired = checked(bad, pixels, mode="repair", **LIMITS)
    assert (repaired.beyond, repaired.notes) == ({}, ("enlarged", note))
    assert repaired.picture.format == "jpeg"
    distances = [np.abs(made.astype(int) - pixels).mean() for made in (repaired.picture.pixels, bad)]
    assert distances[0] < distances[1], "closer to the source than before"


def test_check_measures_no_cast_when_recoloured() -> None:
    pixels = greyish()
    made = checked(tinted(pixels, 0, 7), pixels, "stylize", Evidence(recoloured=True), mode="repair", **LIMITS)
    assert made.measures is not None
    assert (made.measures.cast, made.beyond, made.notes) == (None, {}, ("enlarged",))


def test_check_repairs_two_flaws() -> None:
    pixels = greyish()
    repaired = checked(tinted(blurred(pixels, 0.7), 5, 5), pixels, mode="repair", **LIMITS)
    assert repaired.notes == ("enlarged", "repaired_cast", "repaired_sharpness")
    assert repaired.beyond == {}


@settings(max_examples=40)
@given(
    sigma=st.floats(0, 6),
    tint=st.tuples(st.floats(-40, 40), st.floats(-40, 40)),
    alpha=st.integers(0, 255),
    name=st.sampled_from(["scene", *PICTURES]),
    least=st.floats(0, 3),
)
def test_repair_never_makes_result_worse(sigma: float, tint: tuple[float, float], alpha: int, name: str, least: float) -> None:
    source = PICTURES.get(name, greyish(120, 160))
    result = tinted(source[..., :3], *tint)
    if sigma > 0.2:
        result = blurred(result, sigma)
    if alpha < 255:
        layer = all_of(result)
        layer[::2] = alpha
        result = np.dstack([result, layer])
    before = result.tobytes(), source.tobytes()
    limits = {"least_sharpness": least, "most_cast": 1.0}
    flagged = checked(result, source, **limits)
    repaired = checked(result, source, mode="repair", **limits)
    assert total(repaired) <= total(flagged)
    assert (result.tobytes(), source.tobytes()) == before
    assert repaired.picture.pixels.shape == result.shape
    if len(repaired.notes) == 1:
        assert repaired.picture.pixels is result
    if result.shape[2] == 4:
        assert np.array_equal(repaired.picture.pixels[..., 3], result[..., 3])


def test_repair_leaves_inpainted_picture_unchanged() -> None:
    pixels = greyish()
    mask = hole(pixels)
    smeared = np.where(mask[..., None] > 0, blurred(pixels, 4), pixels)
    found = checked(smeared, smeared, "inpaint", Evidence(comparable=False, hole=mask), mode="repair", least_sharpness=0.6)
    assert set(found.beyond) == {"blurred"}
    assert found.picture.pixels is smeared


def test_repair_leaves_requested_background_unchanged() -> None:
    pixels = greyish()
    alpha = all_of(pixels)
    alpha[:, 160:] = 0
    tint = np.where(alpha[..., None] > 0, tinted(pixels, 0, 20), np.uint8(255))
    found = checked(tint, pixels, "remove-background", Evidence(alpha=alpha), mode="repair")
    assert set(found.beyond) == {"cast"}
    assert found.picture.pixels is tint


def test_sharpening_adds_no_halo_to_cut_out() -> None:
    source = greyish(300, 300)
    alpha = np.zeros((300, 300), np.uint8)
    cv2.circle(alpha, (150, 150), 100, 255, -1)
    cut = np.dstack([np.where(alpha[..., None] > 0, np.uint8(150), np.uint8(0)).repeat(3, axis=2), alpha])
    assert np.array_equal(sharpened(cut, Pair.of(cut, source)), cut), "a flat colour has nothing to sharpen"


@pytest.mark.parametrize("sigma", [0.5, 0.7, 0.9])
def test_sharpening_restores_sharpness_of_source(sigma: float) -> None:
    pixels = greyish(600, 480)
    measures = checked(blurred(pixels, sigma), pixels, mode="repair", least_sharpness=0.8).measures
    assert measures is not None
    assert measures.kept is not None
    assert 0.8 < measures.kept < 1.1


def test_sharpening_in_strips_leaves_no_seams() -> None:
    pixels = blurred(greyish(600, 64), 1)
    pair = Pair.of(pixels, greyish(600, 64))
    amount = lacking(pair)
    assert 0.5 < amount <= 2.5
    whole = pixels + amount * (pixels - cv2.GaussianBlur(pixels.astype(np.float32), (0, 0), 600 / 512))
    assert np.abs(sharpened(pixels, pair) - np.clip(whole, 0, 255)).max() <= 0.6
