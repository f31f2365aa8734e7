"""The hole: from a mask image and boxes to one map of the pixels to fill, and the fade of the fill around them.

Maps of a whole image use one byte per pixel. Distances take four, so they are computed one block at a time.
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
from imagemill.worker.operations.inpaint.outline import outline
from imagemill.worker.operations.inpaint.rectangle import Rectangle

AnyInpaint = TypeVar("AnyInpaint", bound=InpaintOptions)

EMPTY = "empty_mask"
LARGE = "large_mask"
LARGE_SHARE = 0.3
"""Masks that cover more of the image than this are noted: the surroundings then say little about what belongs in the hole."""

ASPECT = 0.02
"""A mask whose aspect ratio differs from the image's by more than this share is rejected."""

ROUNDS = 8
"""Rounds of merging rectangles before giving up; each takes a third of a second on 64 megapixels."""

OPAQUE, SURROUNDED = 250, 0.9
"""A hole is surrounded by opaque pixels if this share of those around it has at least this alpha."""

BLOCK = 1024  # side in pixels of the blocks in which distances are computed
STRIP = 256  # rows blended at once: the floats take four times the bytes of the picture


@dataclass(frozen=True)
class Hole:
    """What to fill in an image; `opacity` [height, width] uint8 is that of the fill, 255 in the hole itself."""

    opacity: Grey
    outline: str
    notes: list[str]
    evidence: Evidence


def find_hole(size: tuple[int, int], inputs: Inputs[AnyInpaint]) -> Hole | Untouched:
    """The hole in an image of `size` (width, height), feathered as the options ask; Untouched if the mask is empty.

    Raises BadMask as `build_mask` does.
    """
    mask = build_mask(size, inputs)
    masked = cv2.countNonZero(mask)
    if not masked:
        return Untouched((*inputs.mask_notes, EMPTY))
    notes = [*inputs.mask_notes, *[LARGE] * (masked > LARGE_SHARE * mask.size)]
    # The source still shows what had to be removed, so the check can't compare the result with it.
    return Hole(feathered(mask, inputs.options.mask_feather), outline(mask), notes, Evidence(comparable=False, hole=mask))


def build_mask(size: tuple[int, int], inputs: Inputs[AnyInpaint]) -> Grey:
    """The mask of an image of `size` (width, height): uint8 [height, width], 255 where it is filled, 0 elsewhere.

    It combines the mask's pixels above `mask_threshold` with the boxes of the item and the job, grown by `mask_dilate`
    pixels. Raises BadMask if there is neither a mask nor a box, if the mask's aspect ratio differs from the image's, if a
    box lies outside the image, if everything is masked, or if nothing is left of a mask that is not black.
    """
    options = inputs.options
    boxes = (*inputs.item.boxes, *options.boxes)
    if inputs.mask is None and not boxes:
        raise BadMask("no mask and no boxes: give a mask (--mask, or a mask column in the list) or boxes")
    if inputs.mask is None:
        mask = np.zeros((size[1], size[0]), np.uint8)
    else:
        _, thresholded = cv2.threshold(_scaled(inputs.mask, size), options.mask_threshold, 255, cv2.THRESH_BINARY)
        mask = np.asarray(thresholded, np.uint8)
        if inputs.mask.any() and not mask.any():
            raise BadMask(_nothing_left(inputs.mask, size, options.mask_threshold))
    for box in boxes:
        mask[_in_pixels(box, size)] = 255
    if options.mask_dilate:
        mask = _dilated(mask, options.mask_dilate)
    if mask.all():
        raise BadMask("the mask and boxes cover the whole image, leaving nothing to fill it from")
    return mask


def _scaled(mask: Grey, size: tuple[int, int]) -> Grey:
    height, width = mask.shape
    if (width, height) == size:
        return mask
    if abs(width * size[1] / (height * size[0]) - 1) > ASPECT:
        turned = abs(height * size[1] / (width * size[0]) - 1) <= ASPECT
        raise BadMask(
            f"the mask is {width}x{height} but the image is {size[0]}x{size[1]}: "
            + (
                "turn the mask upright, as the image is shown"
                if turned
                else "their aspect ratios differ, so draw it on the image"
            )
        )
    return np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)


def _nothing_left(mask: Grey, size: tuple[int, int], threshold: int) -> str:
    if mask.max() <= threshold:
        return f"the mask is not black, but nothing in it is brighter than {mask.max()}: lower mask_threshold={threshold}"
    return f"the mask is not black, but nothing is left of it at the image's size, {size[0]}x{size[1]}: enlarge what it shows"


def _in_pixels(box: Box, size: tuple[int, int]) -> Rectangle:
    """A box rounded to whole pixels, at least one; it may extend past the right and bottom edges of the image."""
    across, down = size if box.unit == "fraction" else (1, 1)
    left, top = round(box.x * across), round(box.y * down)
    right = max(left + 1, round((box.x + box.width) * across))
    bottom = max(top + 1, round((box.y + box.height) * down))
    if left >= size[0] or top >= size[1]:
        numbers = f"{box.x:g},{box.y:g},{box.width:g},{box.height:g}"
        raise BadMask(f"the box {numbers} lies outside the image, which is {size[0]}x{size[1]}")
    return Rectangle(slice(top, bottom), slice(left, right))


def distance_to(mask: Grey) -> NDArray[np.float32]:
    """Pixels from each pixel's centre to the nearest masked one, 0 inside the mask; [height, width]."""
    return np.asarray(cv2.distanceTransform((mask == 0).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE), np.float32)


def _distances(mask: Grey, reach: int) -> Iterator[tuple[Rectangle, NDArray[np.float32]]]:
    """The blocks with masked pixels within `reach` pixels, and their distances, which are exact up to `reach`."""
    for top in range(0, mask.shape[0], BLOCK):
        for left in range(0, mask.shape[1], BLOCK):
            above, before = min(top, reach), min(left, reach)
            around = mask[top - above : top + BLOCK + reach, left - before : left + BLOCK + reach]
            if around.any():
                distance = distance_to(around)[above : above + BLOCK, before : before + BLOCK]
                yield Rectangle.at(left, top, BLOCK, BLOCK), distance


def _dilated(mask: Grey, pixels: int) -> Grey:
    dilated = mask.copy()
    for block, distance in _distances(mask, pixels):
        dilated[block][distance <= pixels] = 255
    return dilated


def feathered(mask: Grey, feather: int) -> Grey:
    """Opacity of the fill in each pixel: 255 in the hole, falling to 0 more than `feather` pixels outside it."""
    if feather == 0:
        return mask
    opacity = mask.copy()
    for block, distance in _distances(mask, feather):
        within = distance <= feather  # opacity is at least 1 there
        opacity[block][within] = np.rint(255 - distance[within] * np.float32(255 / (feather + 1)))
    return opacity


def fill_mask(opacity: Grey) -> Grey:
    """The pixels that an engine has to fill: 255 in the hole and in the fade around it, 0 elsewhere."""
    threshold = 254 if opacity.all() else 0  # a fade as wide as the image would leave nothing to fill from
    return np.asarray(cv2.threshold(opacity, threshold, 255, cv2.THRESH_BINARY)[1], np.uint8)


def shrunk(mask: Grey, size: tuple[int, int]) -> Grey:
    """A mask at a smaller `size` (width, height), with every pixel that any masked pixel was averaged into.

    If that is every pixel, only those that hold more of the mask than the minimum.
    """
    share = cv2.resize(mask, size, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.threshold(share, float(share.min()), 255, cv2.THRESH_BINARY)[1], np.uint8)


def blend(target: Pixels, fill: NDArray[np.uint8] | NDArray[np.float32], opacity: Grey) -> None:
    """Lay `fill` [h, w, 3] over `target` [h, w, 3], in place; pixels of opacity 0 stay bit-identical."""
    for top in range(0, len(target), STRIP):
        rows = slice(top, top + STRIP)
        weight = opacity[rows, :, None] / np.float32(255)
        blended = np.rint(target[rows] + (fill[rows] - target[rows].astype(np.float32)) * weight).astype(np.uint8)
        np.copyto(target[rows], blended, where=weight > 0)


def reveal(pixels: Pixels, opacity: Grey) -> None:
    """Make visible, in place, what was rubbed out of RGBA `pixels` [h, w, 4]: parts of the hole in opaque surroundings."""
    if pixels.shape[2] != 4 or not ((pixels[..., 3] < 128) & (opacity == 255)).any():
        return
    alpha = pixels[..., 3]
    _, labels = cv2.connectedComponents((opacity > 0).astype(np.uint8), connectivity=8)
    wider = cv2.dilate(labels.astype(np.float32), np.ones((5, 5), np.uint8)).astype(np.int32)
    rim = (labels == 0) & (wider > 0)
    around, opaque = (np.bincount(wider[part], minlength=labels.max() + 1) for part in (rim, rim & (alpha >= OPAQUE)))
    inside = (opaque >= SURROUNDED * np.maximum(around, 1))[labels] & (labels > 0)
    np.copyto(alpha, np.maximum(alpha, opacity), where=inside)


def rectangles_around(mask: Grey, margin: float) -> list[Rectangle]:
    """Rectangles that cover every hole with `margin` pixels around it; overlapping ones are merged.

    If merging takes too long (thousands of specks, each merger reaching the next), one rectangle around everything.
    """
    pad = math.ceil(margin)
    # Dilation joins specks that lie close together, which bounds the memory for outlines.
    covered = np.asarray(cv2.dilate(mask, np.ones((2 * pad + 1, 2 * pad + 1), np.uint8)), np.uint8)
    for _ in range(ROUNDS):
        outlines, _ = cv2.findContours(covered, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        rectangles = [Rectangle.at(*bounds) for bounds in sorted(tuple(cv2.boundingRect(outline)) for outline in outlines)]
        merged = np.zeros_like(covered)
        for rectangle in rectangles:
            merged[rectangle] = 255
        if cv2.countNonZero(merged) == cv2.countNonZero(covered):
            return rectangles
        covered = merged
    return [Rectangle.at(*cv2.boundingRect(covered))]
