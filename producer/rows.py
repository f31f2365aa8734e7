"""The rows of a list, as read and before they are checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from imagemill.shared.urls import shown

MAX_SHOWN = 160
"""Characters of a bad row that are kept for messages."""
MOST_NAMED = 5
"""Skipped files that are named; all are counted."""
SOURCE_NAMES = ("source", "url", "image")
FIELDS = (*SOURCE_NAMES, "mask", "control_image", "boxes", "points", "name")


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row as read. `fields` may hold source, mask, control_image, boxes, points and name, whose values aren't checked yet."""

    place: str
    fields: dict[str, Any]
    root: str | None = field(default=None, compare=False)
    """URL of the folder or prefix that was given and holds the image; None for a row of a list."""
    columns: dict[str, str] | None = field(default=None, compare=False)
    """A table's cells by column, in lower case; for the names of results."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """An invalid row. `text` is its beginning, without the query strings of URLs."""

    place: str
    reason: str
    text: str


Rows = Iterator[SourceRow | BadRow]


@dataclass
class Skipped:
    """Files in folders and under prefixes that are not images: how many, and the names of the first."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count a file."""
        self.count += 1
        if len(self.names) < MOST_NAMED:
            self.names.append(cut(name))


def refused(row: SourceRow, reason: str) -> BadRow:
    """A row that was read but is invalid."""
    return BadRow(row.place, reason, cut(str(row.fields.get("source", ""))))


def cut(text: str) -> str:
    """The beginning of a row or name for messages, without the query strings of URLs."""
    text = shown(text)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
