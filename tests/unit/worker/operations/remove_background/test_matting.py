from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.shared.errors import MissingExtra
from imagemill.worker.imaging.picture import Grey, Pixels
from imagemill.worker.operations.remove_background import matting
from imagemill.worker.operations.remove_background.matting import FAILED, TIMED_OUT, TOO_LARGE, matted, trimap

FRONT, BACK = (190, 60, 40), (225, 230, 240)
SIZE = (260, 200)


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    """Import pymatting, which may compile for up to a minute, before any test that has a deadline."""
    import pymatting  # noqa: F401


def furry(fore: tuple[int, int, int] = FRONT) -> tuple[Pixels, Any, Grey]:
    """A disc with protruding hairs: image, true alpha 0..1, and the blurred uint8 matte that a model would give."""
    x, y = (SIZE[0] // 2, SIZE[1] // 2)
    drawn = np.zeros((4 * SIZE[1], 4 * SIZE[0]), np.uint8)
    cv2.circle(drawn, (4 * x, 4 * y), 200, 255, -1)
    for angle in np.arange(0, 2 * np.pi, 0.13):
        end = (round(4 * x + 250 * np.cos(angle)), round(4 * y + 250 * np.sin(angle)))
        cv2.line(drawn, (4 * x, 4 * y), end, 255, 5)
    truth = cv2.resize(drawn, SIZE, interpolation=cv2.INTER_AREA) / 255
    noise = np.random.default_rng(0).normal(0, 1, (*truth.shape, 3))
    pixels = np.array(fore) * truth[..., None] + np.array(BACK) * (1 - truth[..., None]) + noise
    seen = cv2.GaussianBlur((truth * 255).astype(np.uint8), (0, 0), 4)
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8), truth, seen


def run(pixels: Pixels, alpha: Grey, most: int = 1_000_000, seconds: float = 60) -> tuple[Grey, list[str]]:
    notes: list[str] = []
    before = alpha.copy()
    result = matted(pixels, alpha, notes, most=most, seconds=seconds)
    assert np.array_equal(alpha, before), "the input is never changed"
    return result, notes


def test_matting_restores_hairs_that_the_matte_blurs() -> None:
    pixels, truth, seen = furry()
    result, notes = run(pixels, seen)
    assert not notes
    assert abs(result / 255 - truth).mean() < 0.25 * abs(seen / 255 - truth).mean()


def test_matting_smears_less_into_a_texture_than_with_rembgs_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, truth, seen = furry()
    texture = np.random.default_rng(1).integers(0, 256, (SIZE[1] // 2, SIZE[0] // 2, 3), np.uint8)
    behind = cv2.resize(texture, SIZE, interpolation=cv2.INTER_NEAREST)
    pixels = np.where(truth[..., None] > 0.5, pixels, behind)
    errors = []
    for margin, prior in ((matting.MARGIN, matting.PRIOR), (10, 0)):
        monkeypatch.setattr(matting, "MARGIN", margin)
        monkeypatch.setattr(matting, "PRIOR", prior)
        errors.append(abs(run(pixels, seen)[0] / 255 - truth).mean())
    assert errors[0] < 0.8 * errors[1]


def test_matting_in_bands_equals_matting_the_whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    from pymatting import estimate_alpha_cf

    monkeypatch.setattr(matting, "PRIOR", 0)  # which pymatting doesn't have
    pixels, _, seen = furry()
    pixels, seen = np.ascontiguousarray(pixels[:, :150]), np.ascontiguousarray(seen[:, :150])  # cut off at one side
    front, back = trimap(seen)
    whole = estimate_alpha_cf(pixels / 255, np.where(front, 1.0, np.where(back, 0.0, 0.5)))
    for band in (7, 64):
        monkeypatch.setattr(matting, "BAND", band)
        result, notes = run(pixels, seen)
        assert not notes
        assert abs(result - whole * 255).max() <= 1


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    seed=st.integers(0, 99),
    sure=st.just((240, 10, 10)) | st.tuples(st.integers(120, 255), st.integers(0, 120), st.integers(0, 20)),
)
def test_trimap_equals_rembgs(size: tuple[int, int], seed: int, sure: tuple[int, int, int]) -> None:
    from scipy.ndimage import binary_erosion

    drawn = cv2.resize(np.random.default_rng(seed).integers(0, 256, (3, 3), np.uint8), size, interpolation=cv2.INTER_LINEAR)
    alpha = np.where(drawn > 150, 255, np.where(drawn < 110, 0, drawn)).astype(np.uint8)
    square = np.ones((sure[2], sure[2]), np.uint8) if sure[2] else None
    front, back = trimap(alpha, *sure)
    assert np.array_equal(front, binary_erosion(alpha > sure[0], structure=square))
    assert np.array_equal(back, binary_erosion(alpha < sure[1], structure=square, border_value=1))


@pytest.mark.parametrize(
    ("most", "seconds", "note"),
    [(SIZE[0] * SIZE[1] - 1, 60, TOO_LARGE), (SIZE[0] * SIZE[1], 60, None), (1_000_000, 1e-9, TIMED_OUT)],
    ids=["above the cap", "at the cap", "no time"],
)
def test_matting_returns_the_matte_with_a_note_above_the_cap_or_after_the_deadline(
    most: int, seconds: float, note: str | None
) -> None:
    pixels, _, seen = furry()
    result, notes = run(pixels, seen, most, seconds)
    assert notes == ([note] if note else [])
    assert np.array_equal(result, seen) == (note is not None)


def test_matting_is_too_large_when_more_than_a_quarter_of_the_cap_is_unsure() -> None:
    pixels, _, seen = furry()
    vague = np.clip(seen, 60, 255).astype(np.uint8)
    vague[:20], vague[20:, :20] = 0, 0
    assert run(pixels, vague, SIZE[0] * SIZE[1])[1] == [TOO_LARGE]


@pytest.mark.parametrize("ticks", [2, 4, 5], ids=["the matrix", "the preconditioner", "the solver"])
def test_deadline_stops_every_stage(ticks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix, the preconditioner and the solver check the clock, which advances a second on each reading."""
    clock = iter(range(1_000_000))
    monkeypatch.setattr(matting.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(matting, "PACE", 0)
    pixels, _, seen = furry()
    threads = threading.active_count()
    result, notes = run(pixels, seen, seconds=ticks + 0.5)
    assert notes == [TIMED_OUT]
    assert result is seen
    assert next(clock) == ticks + 2, "the clock is not read again after the deadline"
    assert threading.active_count() == threads


def test_preconditioner_is_not_started_without_enough_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import pymatting

    monkeypatch.setattr(matting, "PACE", 1.0)
    monkeypatch.setattr(pymatting, "ichol", lambda *_, **__: pytest.fail("started"))
    assert run(*furry()[::2])[1] == [TIMED_OUT]


def _raises(*_: Any, **__: Any) -> Any:
    raise ValueError("not positive definite")


@pytest.mark.parametrize("name", ["ichol", "cg", "cf_laplacian"])
def test_matting_returns_the_matte_with_a_note_when_the_solver_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pymatting

    monkeypatch.setattr(pymatting, name, _raises)
    pixels, _, seen = furry()
    result, notes = run(pixels, seen)
    assert notes == [FAILED]
    assert result is seen


def shapes() -> Iterator[tuple[str, Grey]]:
    yield "only a faint subject", np.full((60, 80), 100, np.uint8)
    thin = np.zeros((60, 80), np.uint8)
    thin[:, 40:42] = 255
    yield "too thin to be certain", thin


@pytest.mark.parametrize("alpha", [alpha for _, alpha in shapes()], ids=[name for name, _ in shapes()])
def test_matting_keeps_the_matte_when_no_pixel_is_certain(alpha: Grey) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*alpha.shape, 3), np.uint8)
    result, notes = run(pixels, alpha)
    assert notes == [FAILED]
    assert np.array_equal(result, alpha)


def test_matting_keeps_a_thin_part_next_to_the_subject() -> None:
    alpha = np.zeros((120, 160), np.uint8)
    alpha[20:100, 20:90] = 255
    alpha[20:100, 130:134] = 255
    pixels = np.where(alpha[..., None] > 0, FRONT, BACK).astype(np.uint8)
    result, notes = run(pixels, alpha)
    assert not notes
    assert np.array_equal(result[:, 115:], alpha[:, 115:])


def test_transparent_pixels_of_the_source_are_certain_background() -> None:
    pixels, _, seen = furry()
    opaque = np.full(seen.shape, 255, np.uint8)
    opaque[:, 150:] = 0
    result, notes = run(np.dstack([pixels, opaque]), cv2.multiply(seen, opaque, scale=1 / 255))
    assert not notes
    assert not result[:, 150:].any()
    assert result[100, 130] == 255


def test_importing_compose_does_not_import_the_matting_libraries() -> None:
    code = (
        "import sys; import imagemill.worker.operations.remove_background.compose; "
        "assert not {'numba', 'scipy', 'pymatting', 'rembg'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_matting_without_the_extra_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymatting", None)
    pixels, _, seen = furry()
    with pytest.raises(MissingExtra, match=r"pip install 'imagemill\[rembg\]'"):
        run(pixels, seen)
