"""Which parts of an image go through a network that fills holes: the hole in, tiles out. Nothing here fills anything.

A hole that fits goes into one tile with its surroundings. A long thin one (a scratch, a cable, a caption) is cut into
parts wherever that takes fewer pixels than its bounding box, so time follows the hole and not the image. The sides of
tiles come in steps, so that those of different images are of the same size and share batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.worker.imaging.picture import Grey
from imagemill.worker.operations.inpaint.mask import Region

OVERLAP = 64
"""Pixels over which neighbouring tiles are blended."""
REACH = OVERLAP // 2

CELL = 8
"""The plan is made on squares of so many pixels a side: each is in the hole or not, and belongs to one part of it."""

CONTEXT = 128
"""Pixels that a tile shows around its part of the hole. IOPaint has as many around each box that it crops to."""

STEP = 64
"""Sides of tiles are multiples of it, rounded down: a tile never has more pixels than its part with CONTEXT all around."""

LEAST = CONTEXT - STEP // 2  # pixels of context that are left then; more than half an overlap
NEAR = CONTEXT
"""Holes less than twice as many pixels apart are planned together, since what tiles would show around them overlaps."""

THICK = 4
"""A hole that is thicker than the longest tile's side divided by this is guided where it doesn't fit into one tile."""

STRIP = 512  # rows of the hole looked at a time

Cells = NDArray[np.bool_]


@dataclass(frozen=True)
class Tile:
    """One input of the network. It sees `area` of the image, at `size` (height, width) and padded to multiples of 8.

    Of the hole of region `number` it fills what lies in `core`, and helps to fill what lies around it. It is `reduced`
    if `size` is smaller than the area, else the area is padded below and on the right.
    """

    area: Region
    core: Region
    size: tuple[int, int]
    number: int
    reduced: bool = False


@dataclass(frozen=True)
class Plan:
    """`numbers` [rows, columns] says for each cell to which region its part of the hole belongs, 0 where there is none.

    `guides` are the regions that need a coarse pass first, by number.
    """

    tiles: list[Tile]
    numbers: NDArray[np.int32]
    guides: dict[int, Tile] = field(default_factory=dict)


@dataclass(frozen=True)
class Box:
    """A rectangle of cells."""

    top: int
    left: int
    bottom: int
    right: int


def plan(hole: Grey, *, strategy: str = "auto", longest: int = 1024) -> Plan:
    """Tiles, at most `longest` pixels a side, that cover all that isn't 0 in `hole` [height, width].

    `strategy` is of imagemill.shared.options.inpaint.LamaInpaint; with `whole` there is one tile, as large as the image.
    """
    shape = (hole.shape[0], hole.shape[1])
    cells = in_cells(hole)
    if strategy == "whole":
        everything = Region(slice(0, shape[0]), slice(0, shape[1]))
        return Plan([Tile(everything, everything, _padded(shape), 1)], cells.astype(np.int32))
    numbers, boxes = _regions(cells)
    made = Plan([], numbers)
    limit = longest - 2 * LEAST
    for number, box in enumerate(boxes, 1):
        own = _cut(numbers, box) == number
        whole = _tight(own, Box(0, 0, *own.shape))
        fits = _fits(whole, limit)
        if strategy == "resize" and not fits:
            made.tiles.append(_coarse(_shifted(whole, box), shape, longest, number))
            continue
        if strategy == "auto" and not fits and _thickness(own) > longest / THICK:
            made.guides[number] = _coarse(_shifted(whole, box), shape, longest, number)
        parts = [whole] if strategy == "resize" else _parts(own, whole, limit)
        made.tiles.extend(_around(hole, _shifted(part, box), longest, number) for part in parts)
    return made


def in_cells(hole: Grey) -> Cells:
    """Which cells have some of the hole in them."""
    height, width = hole.shape
    found = np.zeros((-(-height // CELL), -(-width // CELL)), np.bool_)
    for top in range(0, height, STRIP):
        part = (hole[top : top + STRIP] > 0).view(np.uint8)
        for axis in (0, 1):
            part = np.maximum.reduceat(part, np.arange(0, part.shape[axis], CELL), axis=axis)
        found[top // CELL : top // CELL + len(part)] = part
    return found


def weights(
    tiles: Sequence[Tile], numbers: NDArray[np.int32], part: Region
) -> Iterator[tuple[int, Region, NDArray[np.float32]]]:
    """How much each tile counts in a rectangle of the image: its place in `tiles`, where, and weights [h, w].

    They are 1 in its core, fall to 0 over `REACH` pixels around it, and are 0 outside its region; to be divided by
    their sum. So at the border of two cores each counts half, and over twice `REACH` pixels one passes into the other.
    """
    for place, tile in enumerate(tiles):
        where = _common(extent(tile), part)
        if where is not None:
            ramps = (
                _ramp(tile.core.rows, where.rows, REACH),
                _ramp(tile.core.columns, where.columns, REACH),
            )
            yield place, where, np.outer(*ramps) * (owners(numbers, where) == tile.number)


def extent(tile: Tile) -> Region:
    """What a tile fills, or helps to fill."""
    rows, columns = (
        slice(max(core.start - REACH, area.start), min(core.stop + REACH, area.stop))
        for core, area in ((tile.core.rows, tile.area.rows), (tile.core.columns, tile.area.columns))
    )
    return Region(rows, columns)


def _common(one: Region, other: Region) -> Region | None:
    rows, columns = (
        slice(max(first.start, second.start), min(first.stop, second.stop))
        for first, second in ((one.rows, other.rows), (one.columns, other.columns))
    )
    return Region(rows, columns) if rows.start < rows.stop and columns.start < columns.stop else None


def owners(numbers: NDArray[np.int32], where: Region) -> NDArray[np.int32]:
    """For each pixel of a rectangle the number of its cell."""
    rows, columns = (np.arange(side.start, side.stop) // CELL for side in (where.rows, where.columns))
    return np.asarray(numbers[rows[:, None], columns], np.int32)


def _ramp(core: slice, where: slice, reach: int) -> NDArray[np.float32]:
    at = np.arange(where.start, where.stop)
    outside = np.maximum(np.maximum(core.start - at, at - core.stop + 1), 0)
    return np.asarray(1 - outside / (reach + 1), np.float32)


def _regions(cells: Cells) -> tuple[NDArray[np.int32], list[Box]]:
    """Each cell's region, from 1 on, or 0; and per region a box that it lies in."""
    reach = NEAR // CELL
    merged = cv2.dilate(cells.view(np.uint8), np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))
    count, found, stats, _ = cv2.connectedComponentsWithStats(merged, connectivity=8)
    numbers = np.where(cells, found, 0).astype(np.int32)
    edges = stats[1:count, [cv2.CC_STAT_TOP, cv2.CC_STAT_LEFT, cv2.CC_STAT_HEIGHT, cv2.CC_STAT_WIDTH]].tolist()
    return numbers, [Box(top, left, top + height, left + width) for top, left, height, width in edges]


# --- a region into parts ----------------------------------------------------------------------------------------------


def _parts(own: Cells, whole: Box, limit: int) -> list[Box]:
    """Boxes that hold all of a region and don't meet, each small enough for a tile: few pixels in all, greedily."""
    done, open_ = [], [whole]
    while open_:
        box = open_.pop()
        cut = min(_halves(own, box, limit), key=lambda halves: sum(_cost(half, limit) for half in halves), default=None)
        if cut is None or (_fits(box, limit) and sum(_cost(half, limit) for half in cut) >= _cost(box, limit)):
            done.append(box)
        else:
            open_.extend(cut)
    return done


def _halves(own: Cells, box: Box, limit: int) -> Iterator[tuple[Box, Box]]:
    """Ways to cut a box in two, both shrunk to what they hold: in the middle, or at a gap, of each side."""
    inside = _cut(own, box)
    for at in _places(np.any(inside, axis=1), limit):
        at += box.top
        yield _tight(own, Box(box.top, box.left, at, box.right)), _tight(own, Box(at, box.left, box.bottom, box.right))
    for at in _places(np.any(inside, axis=0), limit):
        at += box.left
        yield _tight(own, Box(box.top, box.left, box.bottom, at)), _tight(own, Box(box.top, at, box.bottom, box.right))


def _places(filled: Cells, limit: int) -> list[int]:
    """Where to cut a side whose ends are filled: into as few parts as fit; or in the most central of its wide gaps."""
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


def _tight(own: Cells, box: Box) -> Box:
    """The smallest box around what a box holds, which is something."""
    inside = _cut(own, box)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    return Box(box.top + int(rows[0]), box.left + int(columns[0]), box.top + int(rows[-1]) + 1, box.left + int(columns[-1]) + 1)


def _cost(box: Box, limit: int) -> int:
    """Pixels of the tile around a box, or of as many as it takes."""
    lengths = ((box.bottom - box.top) * CELL, (box.right - box.left) * CELL)
    height, width = (_side(length) if length <= limit else length + -(-length // limit) * 2 * CONTEXT for length in lengths)
    return height * width


def _fits(box: Box, limit: int) -> bool:
    return max(box.bottom - box.top, box.right - box.left) * CELL <= limit


def _thickness(own: Cells) -> float:
    """Twice the distance from the innermost pixel of a region to its rim; beyond the image there is nothing to see."""
    depth = cv2.distanceTransform(own.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return 2 * CELL * float(depth.max()) if not own.all() else float("inf")


def _cut(array: NDArray[Any], box: Box) -> NDArray[Any]:
    return array[box.top : box.bottom, box.left : box.right]


def _shifted(box: Box, by: Box) -> Box:
    return Box(box.top + by.top, box.left + by.left, box.bottom + by.top, box.right + by.left)


# --- a part into a tile -----------------------------------------------------------------------------------------------


def _around(hole: Grey, part: Box, longest: int, number: int) -> Tile:
    """The tile around a part, which is measured to the pixel now."""
    rows, columns = slice(part.top * CELL, part.bottom * CELL), slice(part.left * CELL, part.right * CELL)
    left, top, width, height = cv2.boundingRect(hole[rows, columns])
    core = Region(slice(rows.start + top, rows.start + top + height), slice(columns.start + left, columns.start + left + width))
    area = Region(
        _placed(core.rows, min(_side(height), longest), hole.shape[0]),
        _placed(core.columns, min(_side(width), longest), hole.shape[1]),
    )
    return Tile(area, core, _padded((area.rows.stop - area.rows.start, area.columns.stop - area.columns.start)), number)


def _coarse(box: Box, shape: tuple[int, int], longest: int, number: int) -> Tile:
    """One tile for a region that is too large for one: reduced, and with CONTEXT around it at the reduced size."""
    sides = [(slice(box.top * CELL, min(box.bottom * CELL, shape[0])), shape[0])]
    sides.append((slice(box.left * CELL, min(box.right * CELL, shape[1])), shape[1]))
    shrink = max(side.stop - side.start for side, _ in sides) / (longest - 2 * CONTEXT)
    context = round(2 * CONTEXT * shrink)
    areas = [_placed(side, side.stop - side.start + context, extent) for side, extent in sides]
    shrink = max(area.stop - area.start for area in areas) / longest  # less where the image ends before the context
    height, width = (max(16, round((area.stop - area.start) / shrink / 8) * 8) for area in areas)
    return Tile(Region(*areas), Region(*(side for side, _ in sides)), (height, width), number, reduced=True)


def _side(length: int) -> int:
    return (length + 2 * CONTEXT) // STEP * STEP


def _placed(core: slice, length: int, extent: int) -> slice:
    """`length` pixels around `core`, moved and cut so that they lie within `extent`."""
    start = max(0, min(core.start - (length - (core.stop - core.start)) // 2, extent - length))
    return slice(start, min(start + length, extent))


def _padded(shape: tuple[int, int]) -> tuple[int, int]:
    height, width = (max(16, -(-side // 8) * 8) for side in shape)
    return height, width
