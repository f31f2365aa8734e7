"""Which row of a list was the first of its kind, in bounded memory however long the list is."""

from __future__ import annotations

import sqlite3
from functools import cached_property

IN_MEMORY = 100_000
"""Rows kept in memory, at about 110 bytes each; those that follow go to a temporary file."""


class Firsts:
    """Remembers the index of the first row with each digest."""

    def __init__(self, in_memory: int = IN_MEMORY) -> None:
        self._in_memory = in_memory
        self._known: dict[int, int] = {}

    def first(self, digest: str, index: int) -> int:
        """The index of the first row that had this hex digest: `index` itself, or an earlier one."""
        number = int(digest[:16], 16) - 2**63  # 64 bits, signed, as in SQLite
        if number in self._known or len(self._known) < self._in_memory:
            return self._known.setdefault(number, index)
        new = self._file.execute("INSERT OR IGNORE INTO firsts VALUES (?, ?) RETURNING place", (number, index)).fetchone()
        return int((new or self._file.execute("SELECT place FROM firsts WHERE digest = ?", (number,)).fetchone())[0])

    @cached_property
    def _file(self) -> sqlite3.Connection:
        connection = sqlite3.connect("", isolation_level=None)  # a file that SQLite deletes by itself
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("CREATE TABLE firsts (digest INTEGER PRIMARY KEY, place INTEGER)")
        connection.execute("BEGIN")
        return connection
