"""The hole: from a mask image and boxes to one map of what is filled, and how the fill fades out around it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from shared.errors import BadMask
from shared.options import Box, OpencvInpaint
from worker.operations.base import Grey, Inputs

ASPECT = 0.02
"""A mask whose proportions differ by more than this share does not belong to its image."""

ROUNDS = 8
"""Merging regions is given up after so many; each costs half a second on 64 megapixels."""


@dataclass(frozen=True)
class Region:
    """A rectangle of the image."""

    rows: slice
    columns: slice


def build_mask(size: tuple[int, int], inputs: Inputs) -> Grey:
    """The hole of an image of `size` (width, height): uint8 [height, width], 255 where it is filled, 0 elsewhere.

    The mask's pixels above `mask_threshold`, the item's and the job's boxes, grown by `mask_dilate` pixels.
    Raises BadMask where there is neither mask nor box, where the mask's proportions are not the image's, where a
    box lies outside the image, and where nothing would be left to fill from.
    """
    options: OpencvInpaint = inputs.options
    boxes = (*inputs.item.boxes, *options.boxes)
    if inputs.mask is None and not boxes:
        raise BadMask("nothing says what to fill: give a mask (--mask, or a mask column in the list) or boxes")
    hole = np.zeros((size[1], size[0]), np.uint8)
    if inputs.mask is not None:
        hole[_at_size(inputs.mask, size) > options.mask_threshold] = 255
    for box in boxes:
        hole[_place(box, size)] = 255
    if options.mask_dilate and hole.any():
        hole[distance_to(hole) <= options.mask_dilate] = 255
    if hole.all():
        raise BadMask("the mask and boxes cover the whole image, so nothing is left to fill it from")
    return hole


def _at_size(mask: Grey, size: tuple[int, int]) -> Grey:
    height, width = mask.shape
    if (width, height) == size:
        return mask
    if abs(width * size[1] / (height * size[0]) - 1) > ASPECT:
        raise BadMask(f"the mask is {width}x{height} and the image {size[0]}x{size[1]}: their proportions differ")
    return np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)


def _place(box: Box, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a box, rounded to whole pixels (at least one) and clipped to the image."""
    across, down = size if box.unit == "fraction" else (1, 1)
    left, top = round(box.x * across), round(box.y * down)
    right = max(left + 1, round((box.x + box.width) * across))
    bottom = max(top + 1, round((box.y + box.height) * down))
    if left >= size[0] or top >= size[1]:
        given = f"{box.x:g},{box.y:g},{box.width:g},{box.height:g}"
        raise BadMask(f"the box {given} lies outside the image, which is {size[0]}x{size[1]}")
    return slice(top, bottom), slice(left, right)


def distance_to(hole: Grey) -> NDArray[np.float32]:
    """Pixels from each pixel's centre to the nearest one of the hole, 0 inside; [height, width]."""
    return np.asarray(cv2.distanceTransform((hole == 0).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE), np.float32)


def feather_weights(hole: Grey, feather: int) -> NDArray[np.float32]:
    """Share of the fill in each pixel: 1 in the hole, falling to 0 beyond `feather` pixels outside it; [height, width]."""
    if feather == 0:
        return (hole > 0).astype(np.float32)
    if not hole.any():
        return np.zeros(hole.shape, np.float32)
    distance = distance_to(hole)
    return np.asarray(np.where(distance <= feather, 1 - distance / np.float32(feather + 1), 0), np.float32)


def regions(hole: Grey, margin: float) -> list[Region]:
    """Rectangles that cover every hole with `margin` pixels around it; those that overlap are made one.

    Where that would take long (specks in the thousands, each merger reaching the next), one rectangle around all.
    """
    pad = math.ceil(margin)
    covered = (hole > 0).astype(np.uint8)
    for _ in range(ROUNDS):
        count, _, stats, _ = cv2.connectedComponentsWithStats(covered, connectivity=8)
        places = stats[1:count, [cv2.CC_STAT_LEFT, cv2.CC_STAT_TOP, cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]]
        grown = np.zeros_like(covered)
        for left, top, width, height in places.tolist():
            grown[max(0, top - pad) : top + height + pad, max(0, left - pad) : left + width + pad] = 1
        if pad == 0 and np.array_equal(grown, covered):
            return [Region(slice(y, y + height), slice(x, x + width)) for x, y, width, height in places.tolist()]
        covered, pad = grown, 0
    left, top, width, height = cv2.boundingRect(covered)
    return [Region(slice(top, top + height), slice(left, left + width))]
