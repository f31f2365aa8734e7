"""A rectangular part of an array."""

from __future__ import annotations

from typing import NamedTuple


class Rectangle(NamedTuple):
    """Rows and columns, with absolute bounds: `array[rectangle]` is that part of an array [height, width, ...]."""

    rows: slice
    columns: slice

    @classmethod
    def at(cls, left: int, top: int, width: int, height: int) -> Rectangle:
        """A rectangle from OpenCV's four numbers, in OpenCV's order."""
        return cls(slice(top, top + height), slice(left, left + width))

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def moved(self, down: int, right: int) -> Rectangle:
        rows, columns = (slice(side.start + by, side.stop + by) for side, by in zip(self, (down, right), strict=True))
        return Rectangle(rows, columns)

    def relative_to(self, outer: Rectangle) -> Rectangle:
        """The same rectangle, counted from the top left corner of `outer`."""
        return self.moved(-outer.rows.start, -outer.columns.start)

    def intersection(self, other: Rectangle) -> Rectangle | None:
        """The part that both rectangles share, if any."""
        rows, columns = (slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(self, other, strict=True))
        return Rectangle(rows, columns) if rows.start < rows.stop and columns.start < columns.stop else None
