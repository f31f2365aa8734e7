"""Decoding masks: every kind of file gives the same mask."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from imagemill.shared.errors import NotAnImage, TooManyPixels, Truncated
from imagemill.worker.imaging.codec import decode_mask
from tests.unit.worker.imaging.samples import SWAPPED, exif, save

HOLE = np.where(np.hypot(*np.mgrid[-24:24, -32:32]) < 12, np.uint8(255), np.uint8(0))
MASKS: dict[str, Callable[[], bytes]] = {
    "grey": lambda: save("png", HOLE),
    "rgb": lambda: save("png", np.dstack([HOLE] * 3)),
    "palette": lambda: save("gif", HOLE),
    "one-bit": lambda: save("png", Image.fromarray(HOLE).convert("1")),
    "16-bit": lambda: save("png", Image.fromarray(HOLE.astype(np.uint16) * 257)),
    "alpha-over-black": lambda: save("png", np.dstack([HOLE * 0] * 3 + [HOLE])),
    "alpha-over-white": lambda: save("png", np.dstack([HOLE * 0 + 255] * 3 + [HOLE])),
    "alpha-over-what-is-hidden": lambda: save("png", np.dstack([255 - HOLE, HOLE // 9, HOLE // 5, HOLE])),
    "painted-on-transparent": lambda: save("webp", np.dstack([HOLE] * 4), lossless=True),
    "grey-with-alpha-1": lambda: save("png", np.dstack([HOLE] * 3 + [HOLE * 0 + 255])),
    "profile": lambda: save("png", np.dstack([HOLE] * 3), icc_profile=SWAPPED),
    "jpeg": lambda: save("jpeg", HOLE, quality=100),
    "tiff": lambda: save("tiff", HOLE),
}


@pytest.mark.parametrize("kind", MASKS)
def test_decode_mask_reads_every_kind_alike(kind: str) -> None:
    found = decode_mask(MASKS[kind](), max_pixels=10_000)
    assert (found.dtype, found.shape) == (np.dtype(np.uint8), HOLE.shape)
    assert found.flags.c_contiguous
    assert np.abs(found.astype(int) - HOLE).max() <= (16 if kind == "jpeg" else 0)


def test_decode_mask_keeps_levels_and_applies_orientation() -> None:
    levels = np.arange(48 * 64).reshape(48, 64).astype(np.uint8)
    assert (decode_mask(save("png", levels), max_pixels=10_000) == levels).all()
    turned = decode_mask(save("png", levels, exif=exif(6)), max_pixels=10_000)
    assert (turned == np.rot90(levels, -1)).all()


def test_decode_mask_uses_brightness_over_black_for_several_colours() -> None:
    strokes = np.zeros((1, 5, 4), np.uint8)
    strokes[0] = [(255, 255, 255, 255), (0, 0, 0, 255), (255, 255, 255, 128), (200, 200, 200, 127), (255, 255, 255, 0)]
    assert decode_mask(save("png", strokes), max_pixels=10).tolist() == [[255, 0, 128, 100, 0]]


def test_decode_mask_raises_errors_of_probe_and_decode() -> None:
    with pytest.raises(TooManyPixels):
        decode_mask(MASKS["grey"](), max_pixels=HOLE.size - 1)
    with pytest.raises(Truncated):
        decode_mask(MASKS["grey"]()[:-20], max_pixels=10_000)
    with pytest.raises(NotAnImage):
        decode_mask(b"<html>", max_pixels=10_000)
