"""Which parts of an image go through the network: from a mask to tiles. Nothing here fills any pixels.

A hole that fits goes into one tile with its surroundings. A long thin one (a scratch, a cable, a caption) is cut into
parts wherever that takes fewer pixels than its bounding box, so time depends on the hole and not on the image. Tiles'
sides are multiples of a step, so that tiles of different images often have the same size and share batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.worker.imaging.picture import Grey
from imagemill.worker.operations.inpaint.rectangle import Rectangle

OVERLAP = 64
"""Pixels over which neighbouring tiles are blended."""
REACH = OVERLAP // 2

CELL = 8
"""The hole is planned in square cells of this many pixels a side; a cell belongs to the hole if any of its pixels does."""

CONTEXT = 128
"""Pixels that a tile shows around its part of the hole; IOPaint shows as many around each box that it crops to."""

STEP = 64
"""Tiles' sides are multiples of this, rounded down, so a tile never has more pixels than its part with CONTEXT all around."""

LEAST = CONTEXT - STEP // 2
"""Pixels of context that remain after rounding down; more than half an overlap."""

NEAR = CONTEXT
"""Holes less than twice this many pixels apart are planned together, since the context of their tiles would overlap."""

THICK = 4
"""A hole that needs several tiles gets a guide if it is thicker than a tile's longest side divided by this."""

STRIP = 512  # rows of the mask reduced to cells at once; a multiple of CELL

Cells = NDArray[np.bool_]
Labels = NDArray[np.int32]


@dataclass(frozen=True)
class Tile:
    """One input of the network: `area` of the image at `size` (height, width), a multiple of 8 a side.

    The tile fills the pixels of region `label` in `core`, and contributes to those up to REACH pixels around it. A
    `reduced` tile shows its area at a smaller size; any other is padded below and on the right.
    """

    area: Rectangle
    core: Rectangle
    size: tuple[int, int]
    label: int
    reduced: bool = False

    @property
    def used(self) -> Rectangle:
        """The part of the area for which the tile's output is used: the core and REACH pixels around it."""
        rows, columns = (
            slice(max(core.start - REACH, area.start), min(core.stop + REACH, area.stop))
            for core, area in zip(self.core, self.area, strict=True)
        )
        return Rectangle(rows, columns)


@dataclass(frozen=True)
class Tiling:
    """How an image is cut into tiles.

    `labels` [rows, columns] of cells holds the number of the region that each cell's part of the hole belongs to, or 0
    outside the hole. `guides` maps the labels of regions that need a coarse pass first to its tile.
    """

    tiles: list[Tile]
    labels: Labels
    guides: dict[int, Tile] = field(default_factory=dict)


def plan(hole: Grey, *, strategy: str = "auto", longest: int = 1024) -> Tiling:
    """Tiles, at most `longest` pixels a side, that cover all pixels of `hole` [height, width] above 0.

    `strategy` is that of LamaInpaint (shared/options/inpaint.py); with `whole` there is one tile, as large as the image.
    """
    shape = (hole.shape[0], hole.shape[1])
    cells = cells_of(hole)
    if strategy == "whole":
        image = _all_of(hole)
        return Tiling([Tile(image, image, _padded(shape), 1)], cells.astype(np.int32))
    labels, bounds = _regions(cells)
    tiling = Tiling([], labels)
    limit = longest - 2 * LEAST
    for label, bound in enumerate(bounds, 1):
        region = labels[bound] == label
        corner = (bound.rows.start, bound.columns.start)
        box = _tight(region, _all_of(region))
        fits = _fits(box, limit)
        if strategy == "resize" and not fits:
            tiling.tiles.append(_reduced_tile(box.moved(*corner), shape, longest, label))
            continue
        if strategy == "auto" and not fits and _thickness(region) > longest / THICK:
            tiling.guides[label] = _reduced_tile(box.moved(*corner), shape, longest, label)
        parts = [box] if strategy == "resize" else _parts(region, box, limit)
        tiling.tiles.extend(_full_tile(part.moved(*corner), hole, longest, label) for part in parts)
    return tiling


def cells_of(hole: Grey) -> Cells:
    """Whether each cell contains any pixel of the hole."""
    height, width = hole.shape
    cells = np.zeros((-(-height // CELL), -(-width // CELL)), np.bool_)
    for top in range(0, height, STRIP):
        part = (hole[top : top + STRIP] > 0).view(np.uint8)
        for axis in (0, 1):
            part = np.maximum.reduceat(part, np.arange(0, part.shape[axis], CELL), axis=axis)
        cells[top // CELL : top // CELL + len(part)] = part
    return cells


def labels_at(labels: Labels, place: Rectangle) -> Labels:
    """The region label of each pixel in a rectangle of the image."""
    rows, columns = (np.arange(side.start, side.stop) // CELL for side in place)
    return np.asarray(labels[rows[:, None], columns], np.int32)


def weights(tiles: Sequence[Tile], labels: Labels, part: Rectangle) -> Iterator[tuple[int, Rectangle, NDArray[np.float32]]]:
    """The weight of each tile in a rectangle of the image: its index in `tiles`, the place, and its weights there [h, w].

    A tile weighs 1 in its core, less and less over REACH pixels around it, and 0 outside its region; the caller divides
    by the sum. Two tiles whose cores touch weigh the same at the border, and blend over OVERLAP pixels.
    """
    for index, tile in enumerate(tiles):
        place = tile.used.intersection(part)
        if place is not None:
            down, across = (_ramp(core, side) for core, side in zip(tile.core, place, strict=True))
            yield index, place, np.outer(down, across) * (labels_at(labels, place) == tile.label)


def _ramp(core: slice, side: slice) -> NDArray[np.float32]:
    at = np.arange(side.start, side.stop)
    outside = np.maximum(np.maximum(core.start - at, at - core.stop + 1), 0)
    return np.asarray(1 - outside / (REACH + 1), np.float32)


# --- cells into regions, regions into parts ---------------------------------------------------------------------------


def _regions(cells: Cells) -> tuple[Labels, list[Rectangle]]:
    """The label of each cell's region, from 1 on, or 0 outside the hole; and per region a rectangle of cells around it."""
    reach = NEAR // CELL
    merged = cv2.dilate(cells.view(np.uint8), np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(merged, connectivity=8)
    bounds = [Rectangle.at(*bound) for bound in stats[1:count, : cv2.CC_STAT_AREA].tolist()]
    return np.where(cells, labels, 0).astype(np.int32), bounds


def _parts(region: Cells, box: Rectangle, limit: int) -> list[Rectangle]:
    """Disjoint rectangles of cells that together hold a region, each small enough for a tile; greedily, for few pixels."""
    parts, uncut = [], [box]
    while uncut:
        part = uncut.pop()
        halves = min(_halves(region, part, limit), key=lambda pair: sum(_cost(half, limit) for half in pair), default=None)
        if halves is None or (_fits(part, limit) and sum(_cost(half, limit) for half in halves) >= _cost(part, limit)):
            parts.append(part)
        else:
            uncut.extend(halves)
    return parts


def _halves(region: Cells, box: Rectangle, limit: int) -> Iterator[list[Rectangle]]:
    """Ways to cut a rectangle in two, both halves shrunk to their cells: in the middle, or at a gap, of either side."""
    inside = region[box]
    for name, side, filled in (("rows", box.rows, np.any(inside, axis=1)), ("columns", box.columns, np.any(inside, axis=0))):
        for cut in _cuts(filled, limit):
            halves = slice(side.start, side.start + cut), slice(side.start + cut, side.stop)
            yield [_tight(region, box._replace(**{name: half})) for half in halves]


def _cuts(filled: Cells, limit: int) -> list[int]:
    """Where to cut a side whose ends are filled: for as few parts as fit, and in the most central of its wide gaps."""
    if len(filled) < 2:
        return []
    parts = max(2, -(-len(filled) * CELL // limit))
    middle = len(filled) * (parts // 2) // parts
    steps = np.flatnonzero(np.diff(filled.astype(np.int8)))
    starts, ends = steps[::2] + 1, steps[1::2] + 1
    if not len(starts):
        return [middle]
    wide = 2 * (ends - starts) >= (ends - starts).max()
    centres = ((starts + ends) // 2)[wide]
    return [middle, int(centres[np.abs(centres - middle).argmin()])]


def _tight(region: Cells, box: Rectangle) -> Rectangle:
    """The smallest rectangle around the region's cells in `box`, which must hold some."""
    left, top, width, height = cv2.boundingRect(region[box].view(np.uint8))
    return Rectangle.at(left, top, width, height).moved(box.rows.start, box.columns.start)


def _all_of(array: NDArray[np.generic]) -> Rectangle:
    return Rectangle(slice(0, array.shape[0]), slice(0, array.shape[1]))


def _cost(box: Rectangle, limit: int) -> int:
    """Pixels of the tile around a rectangle of cells, or of all the tiles that it needs."""
    lengths = (cells * CELL for cells in box.shape)
    height, width = (_side(length) if length <= limit else length + -(-length // limit) * 2 * CONTEXT for length in lengths)
    return height * width


def _fits(box: Rectangle, limit: int) -> bool:
    return max(box.shape) * CELL <= limit


def _thickness(region: Cells) -> float:
    """Twice the distance in pixels from the innermost pixel of a region to its rim; infinite if there is no rim."""
    depth = cv2.distanceTransform(region.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return 2 * CELL * float(depth.max()) if not region.all() else float("inf")


# --- parts into tiles -------------------------------------------------------------------------------------------------


def _full_tile(part: Rectangle, hole: Grey, longest: int, label: int) -> Tile:
    """The tile at full size around a part, whose extent is now measured to the pixel."""
    place = _in_pixels(part, hole.shape)
    core = Rectangle.at(*cv2.boundingRect(hole[place])).moved(place.rows.start, place.columns.start)
    lengths = [min(_side(length), longest) for length in core.shape]
    area = Rectangle(*map(_around, core, lengths, hole.shape))
    return Tile(area, core, _padded(area.shape), label)


def _reduced_tile(box: Rectangle, shape: tuple[int, int], longest: int, label: int) -> Tile:
    """One tile for a region that is too large for a full one: reduced, with CONTEXT around it at the reduced size."""
    core = _in_pixels(box, shape)
    context = round(2 * CONTEXT * max(core.shape) / (longest - 2 * CONTEXT))
    area = Rectangle(*map(_around, core, [length + context for length in core.shape], shape))
    shrink = max(area.shape) / longest  # less than for the core with its context if the image ends before
    height, width = (max(16, round(length / shrink / 8) * 8) for length in area.shape)
    return Tile(area, core, (height, width), label, reduced=True)


def _in_pixels(box: Rectangle, shape: tuple[int, ...]) -> Rectangle:
    """A rectangle of cells in pixels, clipped to the image."""
    rows, columns = (slice(side.start * CELL, min(side.stop * CELL, length)) for side, length in zip(box, shape, strict=True))
    return Rectangle(rows, columns)


def _side(length: int) -> int:
    return (length + 2 * CONTEXT) // STEP * STEP


def _around(core: slice, length: int, image_length: int) -> slice:
    """`length` pixels centred on `core`, moved and clipped to lie within the image."""
    start = max(0, min(core.start - (length - (core.stop - core.start)) // 2, image_length - length))
    return slice(start, min(start + length, image_length))


def _padded(shape: tuple[int, int]) -> tuple[int, int]:
    height, width = (max(16, -(-side // 8) * 8) for side in shape)
    return height, width
