"""Control pictures drawn with OpenCV."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from imagemill.shared.diffusion_models import FAMILIES
from imagemill.shared.options.stylize import DiffusionStylize
from imagemill.worker.imaging.picture import Pixels
from imagemill.worker.operations.stylize.controls import KINDS, drawn, line_art_of, scribble_of


def sketch(darkness: int, width: int = 2) -> Pixels:
    """A light page, 100 by 120, with a dark line from top to bottom, as RGB."""
    page = np.full((100, 120, 3), 220, np.uint8)
    page[:, 60 : 60 + width] = 220 - darkness
    return page


def test_each_family_has_a_controlnet_for_each_kind() -> None:
    assert all(set(family.controlnets) == set(KINDS) for family in FAMILIES.values())


@pytest.mark.parametrize("darkness", [20, 60, 200])
def test_scribble_is_white_on_a_dark_line_and_black_elsewhere(darkness: int) -> None:
    strokes = scribble_of(sketch(darkness))
    assert set(np.unique(strokes)) <= {0, 255}
    assert strokes[:, 60:62].all() == (darkness >= 60), "faint lines are no strokes"
    assert not strokes[:, :50].any()
    assert not strokes[:, 72:].any()


@pytest.mark.parametrize("darkness", [40, 200])
def test_line_art_has_its_usual_line_at_half_brightness(darkness: int) -> None:
    lines = line_art_of(sketch(darkness))
    assert np.abs(lines[:, 60:62].astype(int) - 127).max() <= 1
    assert not lines[:, :40].any()


def test_darker_lines_are_stronger_in_line_art() -> None:
    page = sketch(200)
    page[:, 20:22] = 120
    lines = line_art_of(page).astype(int)
    assert lines[50, 60] > lines[50, 20] > 40


def test_a_light_line_on_a_dark_page_is_neither_stroke_nor_line() -> None:
    page = 255 - sketch(200)
    assert not scribble_of(page)[:, 60:62].any()
    assert not line_art_of(page)[:, 60:62].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (64, 72)])
def test_every_kind_draws_pictures_of_every_size(kind: Any, shape: tuple[int, int]) -> None:
    flat = np.full((*shape, 3), 130, np.uint8)
    picture = drawn(kind, flat, DiffusionStylize())
    assert picture.dtype == np.uint8
    assert picture.shape[:2] == shape
    assert np.array_equal(picture, flat if kind == "tile" else np.zeros(shape, np.uint8)), "a flat picture has no lines"
