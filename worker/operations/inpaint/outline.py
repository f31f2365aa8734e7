"""The outline of a hole, short enough for the record of an image: reports draw it over the image before and after."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from imagemill.shared.messages import LONGEST_OUTLINE
from imagemill.worker.imaging.picture import Grey
from imagemill.worker.imaging.scale import fit

SIDE = 1000  # of the image, in the outline's units
DETAIL = 500  # longest side in pixels at which the outline is traced


def outline(hole: Grey) -> str:
    """The outlines of all parts of `hole` [height, width], which is above 0 in some pixels, as the path of an SVG.

    The path's units are thousandths of the image's width and height. Details, and gaps between parts that lie close
    together, are left out as far as it takes to stay below LONGEST_OUTLINE characters.
    """
    height, width = hole.shape
    size = fit((width, height), DETAIL)
    small = np.ceil(cv2.resize((hole > 0).astype(np.float32), size, interpolation=cv2.INTER_AREA)).astype(np.uint8)
    for coarse in (1, 2, 4, 8, 16, 32):
        parts, _ = cv2.findContours(_joined(small, coarse), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        path = _path([cv2.approxPolyDP(part, max(1, coarse / 2), closed=True) for part in parts], size)
        if len(path) <= LONGEST_OUTLINE:
            return path
    left, top, right, bottom = _bounds(small)
    return _path([np.array([[left, top], [right, top], [right, bottom], [left, bottom]])], size)


def _joined(shape: Grey, reach: int) -> Grey:
    """The shape with a rim of half of `reach` pixels at least, so that a coarser outline lies outside it; narrow gaps close."""
    return np.asarray(cv2.erode(cv2.dilate(shape, _square(reach)), _square((reach - 1) // 2), borderValue=(1,)), np.uint8)


def _square(reach: int) -> Grey:
    return np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)


def _bounds(shape: Grey) -> tuple[int, int, int, int]:
    left, top, width, height = cv2.boundingRect(shape)
    return left, top, left + width - 1, top + height - 1


def _path(parts: Sequence[np.ndarray], size: tuple[int, int]) -> str:
    lines = (np.rint((part.reshape(-1, 2) + 0.5) * SIDE / size).astype(int).tolist() for part in parts)
    return "".join("M" + " ".join(f"{x},{y}" for x, y in line) + "Z" for line in lines)
