from __future__ import annotations

import numpy as np
import pytest

from imagemill.worker.imaging import picture
from imagemill.worker.imaging.picture import flatten, rgb_of


@pytest.mark.parametrize("background", [0, 128, 255])
def test_flatten_rounds_every_level_and_alpha_to_nearest(background: int) -> None:
    level, alpha = np.meshgrid(np.arange(256), np.arange(256))
    pixels = np.dstack([level, level, level, alpha]).astype(np.uint8)
    exact = (level * alpha + background * (255 - alpha)) / 255
    assert (flatten(pixels, background) == np.rint(exact)[:, :, None]).all()


def test_flatten_returns_rgb_unchanged() -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    assert flatten(pixels, 255) is pixels


def test_flatten_gives_same_pixels_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (7, 5, 4), np.uint8)
    whole = flatten(pixels, 128)
    monkeypatch.setattr(picture, "_STRIP", 10)
    assert (flatten(pixels, 128) == whole).all()


def test_rgb_of_reads_hexadecimal_colour() -> None:
    assert rgb_of("#00fF7a") == (0, 255, 122)
