"""The hole: from a mask image and boxes to one map of what is filled, and how the fill fades out around it.

Maps of a whole image are in bytes. Distances take four times as much, so they are looked at a block at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.shared.errors import BadMask
from imagemill.shared.options.base import Box
from imagemill.shared.options.inpaint import InpaintOptions
from imagemill.worker.imaging.picture import Grey, Pixels
from imagemill.worker.operations.base import Evidence, Inputs, Untouched

AnyInpaint = TypeVar("AnyInpaint", bound=InpaintOptions)

EMPTY = "empty_mask"
LARGE = "large_mask"
LARGE_SHARE = 0.3
"""From this share of the image on, what surrounds the hole says little about what belongs into it."""

ASPECT = 0.02
"""A mask whose proportions differ by more than this share does not belong to its image."""

ROUNDS = 8
"""Merging regions is given up after so many; each costs a third of a second on 64 megapixels."""

BLOCK = 1024  # side in pixels of the blocks


@dataclass(frozen=True)
class Region:
    """A rectangle of the image."""

    rows: slice
    columns: slice


@dataclass(frozen=True)
class Hole:
    """What is filled of an image: `shares` [height, width] uint8 is the fill's share in each pixel, 255 in the hole itself."""

    shares: Grey
    notes: list[str]
    evidence: Evidence


def find_hole(size: tuple[int, int], inputs: Inputs[AnyInpaint]) -> Hole | Untouched:
    """The hole of an image of `size` (width, height), faded out as the options ask; Untouched if the mask is empty.

    Raises BadMask as `build_mask` does.
    """
    mask = build_mask(size, inputs)
    filled = cv2.countNonZero(mask)
    if not filled:
        return Untouched((EMPTY,))
    notes = [LARGE] if filled > LARGE_SHARE * mask.size else []
    # The source shows what was to go, so the check can't compare the result with it.
    return Hole(fade(mask, inputs.options.mask_feather), notes, Evidence(comparable=False, hole=mask))


def build_mask(size: tuple[int, int], inputs: Inputs[AnyInpaint]) -> Grey:
    """The hole of an image of `size` (width, height): uint8 [height, width], 255 where it is filled, 0 elsewhere.

    The mask's pixels above `mask_threshold`, the item's and the job's boxes, grown by `mask_dilate` pixels.
    Raises BadMask where there is neither mask nor box, where the mask's proportions are not the image's, where a
    box lies outside the image, and where nothing would be left to fill from.
    """
    options = inputs.options
    boxes = (*inputs.item.boxes, *options.boxes)
    if inputs.mask is None and not boxes:
        raise BadMask("nothing says what to fill: give a mask (--mask, or a mask column in the list) or boxes")
    if inputs.mask is None:
        hole = np.zeros((size[1], size[0]), np.uint8)
    else:
        _, thresholded = cv2.threshold(_at_size(inputs.mask, size), options.mask_threshold, 255, cv2.THRESH_BINARY)
        hole = np.asarray(thresholded, np.uint8)
    for box in boxes:
        hole[_place(box, size)] = 255
    if options.mask_dilate:
        hole = _grown(hole, options.mask_dilate)
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


def _near(hole: Grey, reach: int) -> Iterator[tuple[tuple[slice, slice], NDArray[np.float32]]]:
    """The blocks that have some of the hole within `reach` pixels: rows and columns, and the distances up to `reach`."""
    for top in range(0, hole.shape[0], BLOCK):
        for left in range(0, hole.shape[1], BLOCK):
            above, before = min(top, reach), min(left, reach)
            around = hole[top - above : top + BLOCK + reach, left - before : left + BLOCK + reach]
            if around.any():
                distance = distance_to(around)[above : above + BLOCK, before : before + BLOCK]
                yield (slice(top, top + BLOCK), slice(left, left + BLOCK)), distance


def _grown(hole: Grey, pixels: int) -> Grey:
    grown = hole.copy()
    for place, distance in _near(hole, pixels):
        grown[place][distance <= pixels] = 255
    return grown


def fade(hole: Grey, feather: int) -> Grey:
    """Share of the fill in each pixel, of 255: all in the hole, falling to 0 beyond `feather` pixels outside it."""
    if feather == 0:
        return hole
    shares = hole.copy()
    for place, distance in _near(hole, feather):
        within = distance <= feather  # there, the share is at least 1
        shares[place][within] = np.rint(255 - distance[within] * np.float32(255 / (feather + 1)))
    return shares


def zone_of(shares: Grey) -> Grey:
    """What has to be made up: 255 in the hole and in the fade around it, 0 elsewhere."""
    least = 254 if shares.all() else 0  # a fade as wide as the image leaves nothing to fill from
    return np.asarray(cv2.threshold(shares, least, 255, cv2.THRESH_BINARY)[1], np.uint8)


def shrunk(zone: Grey, size: tuple[int, int]) -> Grey:
    """A zone at a smaller `size` (width, height): each pixel that a part of it was averaged into is in it.

    If that is all of them, those with the most of it.
    """
    share = cv2.resize(zone, size, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.threshold(share, float(share.min()), 255, cv2.THRESH_BINARY)[1], np.uint8)


def mix(target: Pixels, fill: NDArray[np.uint8] | NDArray[np.float32], shares: Grey) -> None:
    """Lay `fill` [h, w, 3] over the RGB of `target`, in place; where its share is 0, the pixel stays bit for bit."""
    weight = shares[..., None] / np.float32(255)
    mixed = np.rint(target + (fill - target.astype(np.float32)) * weight).astype(np.uint8)
    np.copyto(target, mixed, where=weight > 0)


def regions(hole: Grey, margin: float) -> list[Region]:
    """Rectangles that cover every hole with `margin` pixels around it; those that overlap are made one.

    Where that would take long (specks in the thousands, each merger reaching the next), one rectangle around all.
    """
    pad = math.ceil(margin)
    # Specks that lie close together are one from the start, so there is no end of memory for their outlines.
    covered = np.asarray(cv2.dilate(hole, np.ones((2 * pad + 1, 2 * pad + 1), np.uint8)), np.uint8)
    for _ in range(ROUNDS):
        outlines, _ = cv2.findContours(covered, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        places = sorted(tuple(cv2.boundingRect(outline)) for outline in outlines)
        grown = np.zeros_like(covered)
        for left, top, width, height in places:
            grown[top : top + height, left : left + width] = 255
        if cv2.countNonZero(grown) == cv2.countNonZero(covered):
            return [Region(slice(y, y + height), slice(x, x + width)) for x, y, width, height in places]
        covered = grown
    left, top, width, height = cv2.boundingRect(covered)
    return [Region(slice(top, top + height), slice(left, left + width))]
