"""What points and boxes say should be cut out."""

from __future__ import annotations

from imagemill.shared.errors import BadMask
from imagemill.shared.options.base import Box, Point
from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.worker.operations.base import Inputs

CORNERS = (2, 3)
"""Segment Anything's labels for a box; those of points are their own."""

Size = tuple[int, int]
Place = tuple[float, float]


def prompts_of(inputs: Inputs[RembgRemoveBackground], size: Size) -> tuple[list[Place], list[int]]:
    """Places (x, y) in an image of `size` (width, height), in pixels, and their labels.

    Those of the row, or else of the job, or else the centre. Raises BadMask for one outside the image.
    """
    row, job = inputs.item, inputs.options
    points, boxes = (row.points, row.boxes) if row.points or row.boxes else (job.points, job.boxes)
    if not points and not boxes:
        points = (Point(x=size[0] // 2, y=size[1] // 2),)
    prompts: tuple[Point | Box, ...] = (*points, *boxes)
    places = [place for one in prompts for place in _places(one, size)]
    return places, [point.label for point in points] + [*CORNERS] * len(boxes)


def _places(one: Point | Box, size: Size) -> list[Place]:
    """A point, or the corners of a box."""
    across, down = size if one.unit == "fraction" else (1, 1)
    numbers = (one.x, one.y) if isinstance(one, Point) else (one.x, one.y, one.width, one.height)
    if one.x * across > size[0] or one.y * down > size[1]:
        what = f"the {type(one).__name__.lower()} {','.join(f'{number:g}' for number in numbers)}"
        raise BadMask(f"{what} lies outside the image, which is {size[0]}x{size[1]}")
    corner = one.x * across, one.y * down
    if isinstance(one, Point):
        return [corner]
    return [corner, ((one.x + one.width) * across, (one.y + one.height) * down)]
