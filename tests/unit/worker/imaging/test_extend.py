"""Colours for what is hidden."""

from __future__ import annotations

import numpy as np
import pytest

from imagemill.worker.imaging.extend import extended

DISTANCE = np.hypot(*np.mgrid[-40:40, -60:60])


def cut_out(hidden: tuple[int, int, int]) -> np.ndarray:
    """A disc, red at the left and blue at the right, with a soft edge, over colours that nobody sees."""
    alpha = np.clip((24 - DISTANCE) * 32, 0, 255).astype(np.uint8)
    colours = np.where(np.arange(120)[None, :, None] < 60, np.uint8([200, 20, 20]), np.uint8([20, 20, 200])).repeat(80, 0)
    return np.dstack([np.where(alpha[..., None] > 0, colours, np.uint8(hidden)), alpha])


@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 255, 255), (0, 255, 0)])
def test_hidden_pixels_get_their_neighbours_colours(hidden: tuple[int, int, int]) -> None:
    pixels = cut_out(hidden)
    found = extended(pixels)
    seen = pixels[..., 3] > 0
    assert np.array_equal(found[seen], pixels[seen][:, :3]), "what is seen stays as it is"
    near = ~seen & (DISTANCE < 28) & (abs(np.arange(120) - 60) > 12)[None]
    wanted = np.where(np.arange(120)[None, :, None] < 60, [200, 20, 20], [20, 20, 200]).repeat(80, 0)
    assert np.abs(found.astype(int) - wanted)[near].max() < 60
    assert found[~seen][:, 1].max() <= 24, "nothing of the hidden colour"


@pytest.mark.parametrize("alpha", [0, 255])
def test_pictures_without_hidden_or_without_visible_pixels_stay_as_they_are(alpha: int) -> None:
    pixels = cut_out((0, 255, 0))
    pixels[..., 3] = alpha
    assert np.array_equal(extended(pixels), pixels[..., :3])
    assert np.array_equal(extended(pixels[..., :3]), pixels[..., :3])
