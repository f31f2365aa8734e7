"""What the child processes that share a GPU tell one another."""

from __future__ import annotations

import fcntl
import json
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

VERSION_BYTES = 8


class Board:
    """Notes, each a JSON value with a name, in memory that processes share. Create it before the fork.

    A process that dies while it writes leaves no lock behind (fcntl(2), record locks), but all notes may be lost.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("board")
        weakref.finalize(self, os.close, self._file)

    @property
    def version(self) -> int:
        """A number that changes with every note. Takes a microsecond."""
        return int.from_bytes(os.pread(self._file, VERSION_BYTES, 0))

    def read(self, name: str) -> Any:
        """The latest note of this name; None if there is none."""
        with self._locked(fcntl.LOCK_SH):
            return self._notes().get(name)

    def write(self, name: str, note: Any) -> None:
        """Replace the note of this name."""
        with self._locked(fcntl.LOCK_EX):
            text = json.dumps({**self._notes(), name: note}).encode()
            version = (self.version + 1).to_bytes(VERSION_BYTES)
            os.ftruncate(self._file, len(version) + len(text))
            os.pwrite(self._file, version + text, 0)

    def _notes(self) -> dict[str, Any]:
        text = os.pread(self._file, os.fstat(self._file).st_size, VERSION_BYTES)
        try:
            notes: dict[str, Any] = json.loads(text or b"{}")
        except ValueError:  # its writer has died
            return {}
        return notes

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        fcntl.lockf(self._file, how)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)
