"""Sizes at which the model works: a few "buckets" near the images' proportions, so that images share batches.

An image is scaled to fit into its bucket without distortion. The rest of the bucket is filled with the image's reflection
and cropped off the result.
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
"""Largest aspect ratio of a bucket: the model was not trained on anything longer."""


def bucket(size: Size, side: int, multiple: int) -> Size:
    """The bucket for an image of `size`: about side * side pixels, both sides a multiple of `multiple`."""
    long, short = max(size), min(size)
    wide, high = min(_buckets(side, multiple), key=lambda sides: abs(math.log(sides[0] * short / (sides[1] * long))))
    return (wide, high) if size[0] >= size[1] else (high, wide)


@cache
def _buckets(side: int, multiple: int) -> tuple[Size, ...]:
    """All landscape buckets, from a square to twice as wide and half as high."""
    widths = range(_near(side, multiple), _near(side * math.sqrt(LONGEST), multiple) + 1, multiple)
    return tuple((width, _near(side * side / width, multiple)) for width in widths)


def _near(length: float, multiple: int) -> int:
    return max(1, math.floor(length / multiple + 0.5)) * multiple


def inside(size: Size, room: Size) -> Size:
    """The largest size with the proportions of `size` that fits into `room`, at least 1 by 1; it may be larger than `size`."""
    width, height = size
    if width * room[1] >= height * room[0]:  # as wide as the room
        return room[0], min(room[1], max(1, (2 * height * room[0] + width) // (2 * width)))
    return min(room[0], max(1, (2 * width * room[1] + height) // (2 * height))), room[1]


def laid_in(rgb: Pixels, room: Size) -> Pixels:
    """RGB uint8 [room height, room width, 3] with the image at the top left and its reflection in the rest."""
    width, height = inside((rgb.shape[1], rgb.shape[0]), room)
    scaled = resize(rgb, (width, height))
    if (width, height) == room:
        return np.ascontiguousarray(scaled)
    return np.asarray(cv2.copyMakeBorder(scaled, 0, room[1] - height, 0, room[0] - width, cv2.BORDER_REFLECT), np.uint8)


def taken_out(filled: Pixels, size: Size) -> Pixels:
    """The part of a bucket's pixels or edges, uint8 [h, w, ...], that an image of `size` occupies."""
    width, height = inside(size, (filled.shape[1], filled.shape[0]))
    return np.ascontiguousarray(filled[:height, :width])


def cropped(pixels: Pixels, proportions: Size) -> Pixels:
    """The largest centred crop of `pixels` [h, w, channels] with these proportions."""
    height, width = pixels.shape[:2]
    wide, high = inside(proportions, (width, height))
    top, left = (height - high) // 2, (width - wide) // 2
    return np.ascontiguousarray(pixels[top : top + high, left : left + wide])
