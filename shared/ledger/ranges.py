"""Sets of image indexes as ranges: `0-32,40-41` is 0 to 31, and 40."""

from __future__ import annotations

from collections.abc import Iterable


def as_ranges(indexes: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted, disjoint ranges (first, last + 1) of these indexes."""
    ranges: list[tuple[int, int]] = []
    for index in sorted(set(indexes)):
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return ranges


def as_text(ranges: Iterable[tuple[int, int]]) -> str:
    """Ranges as the ledger's scripts read them."""
    return ",".join(f"{first}-{last}" for first, last in ranges)


def indexes_in(text: str) -> set[int]:
    """The indexes in ranges given as text."""
    ranges = (part.split("-") for part in text.split(",") if part)
    return {index for first, last in ranges for index in range(int(first), int(last))}
