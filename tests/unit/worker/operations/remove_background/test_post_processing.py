"""`post_process_mask` against rembg's own function."""

from __future__ import annotations

import warnings

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from imagemill.worker.operations.remove_background import post_processing
from imagemill.worker.operations.remove_background.post_processing import post_processed, rembgs_post_processed

SHAPES = [(1, 1), (1, 9), (7, 40), (130, 90)]


def masks(shape: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """Noise, soft blobs, and the levels at which the blurred mask is cut, where rounding decides."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, shape, np.uint8)
    blobs = cv2.resize(random.integers(0, 256, (4, 4), np.uint8), shape[::-1], interpolation=cv2.INTER_CUBIC)
    return [noise, np.asarray(blobs, np.uint8), *(np.full(shape, level, np.uint8) for level in (0, 126, 127, 128, 255))]


@pytest.mark.parametrize("strip", [1, 1 << 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_mask_equals_rembgs(shape: tuple[int, int], strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rembg imports libraries that warn
        from rembg.bg import post_process
    monkeypatch.setattr(post_processing, "STRIP", strip)
    for mask in masks(shape):
        expected = post_process(mask)
        assert np.array_equal(rembgs_post_processed(mask), expected)
        assert np.count_nonzero(post_processed(mask) != expected) <= 0.01 * mask.size


def test_specks_vanish_and_nothing_is_half_transparent() -> None:
    mask = np.zeros((60, 60), np.uint8)
    mask[20:40, 20:40], mask[5, 5:7], mask[38:42, 38:42] = 255, 255, 128
    result = post_processed(mask)
    assert not result[:15, :15].any()
    assert set(np.unique(result)) == {0, 255}
