"""Turns of the child processes that share a GPU."""

from __future__ import annotations

import fcntl
import os
import weakref
from types import TracebackType


class Turn:
    """A context that one process at a time can enter. Create it before the fork.

    Batches of two processes at the same time would each take twice as long and twice the memory. While a child waits for its
    turn, its next batch fills. The kernel takes the turn back from a process that dies: fcntl(2), record locks.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("turn")
        weakref.finalize(self, os.close, self._file)

    def __enter__(self) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_EX)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN)
