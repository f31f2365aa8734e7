"""The outline of a hole, as a report draws it."""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest

from imagemill.shared.messages import LONGEST_OUTLINE, ItemResult
from imagemill.worker.imaging.picture import Grey
from imagemill.worker.operations.inpaint.outline import SIDE, outline
from tests.fills import rectangle_mask


def drawn(path: str, size: tuple[int, int]) -> Grey:
    """The path, filled, at `size` (width, height)."""
    canvas = np.zeros((size[1], size[0]), np.uint8)
    parts = [re.findall(r"(\d+),(\d+)", part) for part in path.split("Z")[:-1]]
    corners = [np.array(part, float) * size / SIDE - 0.5 for part in parts]
    return cv2.fillPoly(canvas, [np.rint(part).astype(np.int32) for part in corners], 255)


def specks(count: int) -> Grey:
    mask = np.zeros((300, 400), np.uint8)
    rng = np.random.default_rng(count)
    mask[rng.integers(0, 300, count), rng.integers(0, 400, count)] = 255
    return mask


DISC = np.where(np.hypot(*np.mgrid[-150:150, -100:300]) < 60, np.uint8(255), np.uint8(0))
TEXT = cv2.putText(DISC * 0, "sale", (60, 190), 1, 9, 255, 14)
RING = np.where(abs(np.hypot(*np.mgrid[-150:150, -200:200]) - 90) < 20, np.uint8(255), np.uint8(0))


@pytest.mark.parametrize(
    ("hole", "wanted"),
    [
        (rectangle_mask(100, 200, slice(20, 41), slice(60, 81)), "M298,195 298,415 408,415 408,195Z"),
        (rectangle_mask(1000, 2000, slice(200, 400), slice(600, 800)), "M299,198 299,402 401,402 401,198Z"),
        (rectangle_mask(100, 100, slice(0, 100), slice(0, 50)), "M5,5 5,995 505,995 505,5Z"),
    ],
    ids=["small", "large", "at the frame"],
)
def test_rectangle_is_outlined_just_outside(hole: Grey, wanted: str) -> None:
    assert outline(hole) == wanted


@pytest.mark.parametrize("hole", [DISC, RING, TEXT], ids=["disc", "ring", "text"])
def test_outline_shows_the_shape(hole: Grey) -> None:
    found = drawn(outline(hole), (hole.shape[1], hole.shape[0])) > 0
    assert (found & (hole > 0)).sum() / (found | (hole > 0)).sum() > 0.6
    assert found[hole > 0].mean() > 0.97


@pytest.mark.parametrize("count", [1, 5, 50, 5000])
def test_outline_is_short_and_reaches_every_part(count: int) -> None:
    path = outline(specks(count))
    assert len(path) <= LONGEST_OUTLINE
    assert drawn(path, (400, 300))[specks(count) > 0].all()
    assert ItemResult(index=0, state="done", filled=path).filled == path


@pytest.mark.parametrize("path", ["M0,0Z" * 100, '"/><script>', "M0,0L1,1"])
def test_a_record_takes_no_other_outline(path: str) -> None:
    with pytest.raises(ValueError, match="filled"):
        ItemResult(index=0, state="done", filled=path)
