"""Sizes that the model works at: few, so that images share batches, each near the proportions of its images.

A picture is scaled to lie in its bucket whole, undistorted; what is left over of the bucket is filled with its mirror image
and taken away afterwards.
"""

from __future__ import annotations

import math
from functools import cache

import cv2
import numpy as np

from imagemill.worker.imaging.picture import Pixels
from imagemill.worker.imaging.scale import resize

Size = tuple[int, int]
"""(width, height) in pixels."""

LONGEST = 4
"""A bucket's longer side is at most so many times its shorter one: the model has seen nothing like what goes beyond."""


def bucket(size: Size, side: int, multiple: int) -> Size:
    """The size for pictures of proportions like `size`: about side * side pixels, both sides a multiple of `multiple`."""
    long, short = max(size), min(size)
    wide, high = min(_buckets(side, multiple), key=lambda sides: abs(math.log(sides[0] * short / (sides[1] * long))))
    return (wide, high) if size[0] >= size[1] else (high, wide)


@cache
def _buckets(side: int, multiple: int) -> tuple[Size, ...]:
    """All that lie across: from a square to twice as wide and half as high."""
    widths = range(_near(side, multiple), _near(side * math.sqrt(LONGEST), multiple) + 1, multiple)
    return tuple((width, _near(side * side / width, multiple)) for width in widths)


def _near(length: float, multiple: int) -> int:
    return max(1, math.floor(length / multiple + 0.5)) * multiple


def inside(size: Size, room: Size) -> Size:
    """The largest size of `size`'s proportions that lies in `room`; at least 1 by 1. Smaller pictures are enlarged."""
    width, height = size
    if width * room[1] >= height * room[0]:  # as wide as the room
        return room[0], min(room[1], max(1, (2 * height * room[0] + width) // (2 * width)))
    return min(room[0], max(1, (2 * width * room[1] + height) // (2 * height))), room[1]


def laid_in(rgb: Pixels, room: Size) -> Pixels:
    """RGB uint8 [room height, room width, 3] with the picture at its top left and its mirror image beyond."""
    width, height = inside((rgb.shape[1], rgb.shape[0]), room)
    scaled = resize(rgb, (width, height))
    if (width, height) == room:
        return np.ascontiguousarray(scaled)
    return np.asarray(cv2.copyMakeBorder(scaled, 0, room[1] - height, 0, room[0] - width, cv2.BORDER_REFLECT), np.uint8)


def taken_out(made: Pixels, size: Size) -> Pixels:
    """The part of a bucket's picture or edges, uint8 [h, w, ...], that a picture of `size` lay in."""
    width, height = inside(size, (made.shape[1], made.shape[0]))
    return np.ascontiguousarray(made[:height, :width])


def cropped(pixels: Pixels, proportions: Size) -> Pixels:
    """The largest part of a picture [h, w, channels] with these proportions, from its middle."""
    height, width = pixels.shape[:2]
    wide, high = inside(proportions, (width, height))
    top, left = (height - high) // 2, (width - wide) // 2
    return np.ascontiguousarray(pixels[top : top + high, left : left + wide])
