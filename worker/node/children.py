"""State that a node's parent shares with its child processes."""

from __future__ import annotations

import os
from multiprocessing import Value
from multiprocessing.sharedctypes import RawArray

import psutil


class Children:
    """Shared memory of the parent and its `count` children; created before the fork."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pids = RawArray("i", count)
        self._failures, self._status = Value("i", 0), Value("i", 1)
        self._stopping = Value("b", 0)

    def loaded(self, index: int) -> None:
        """Called by child `index` after loading its engines."""
        self._pids[index] = os.getpid()
        with self._failures.get_lock():
            self._failures.value = 0

    def failed(self, status: int) -> int:
        """Called by a child that could not load its engines; returns the number of failures in a row.

        `status` is the exit status that the failure calls for.
        """
        with self._failures.get_lock():
            self._status.value = status
            self._failures.value += 1
            return int(self._failures.value)

    def failure(self) -> int | None:
        """The exit status for the node after a failure to load; None if the last child succeeded."""
        return int(self._status.value) if self._failures.value else None

    def ready(self) -> int:
        """The number of running children that have loaded their engines."""
        return sum(pid > 0 and psutil.pid_exists(pid) for pid in self._pids)

    def stop(self) -> None:
        """Called by the parent: children finish their current images and release the rest of their chunks."""
        self._stopping.value = 1

    def stopping(self) -> bool:
        """Whether the parent has called `stop`."""
        return bool(self._stopping.value)
