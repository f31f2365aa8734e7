"""The memory in which one child keeps models open, whichever of its engines opened them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CPU_SHARE = 1 / 4
"""Share of main memory for the models of all children of a node: images need room there, too."""
GPU_SHARE = 1 / 2
"""Share of a child's part of a GPU for its models; its batches take most of the rest."""
SETTLED_SECONDS = 60.0


def main_memory() -> int:
    """Bytes of this machine's memory, or of the container's if that is less."""
    import psutil  # the tools image has none

    total = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):  # not cgroup v2, or the limit is `max`
        total = min(total, int(CGROUP_LIMIT.read_text()))
    return total


class ModelMemory:
    """The open models of one child, the least recently used first. For one thread, that of the device.

    They may take `limit` bytes together; the one in use may take more, so with a limit of 0 or None there is always one.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.loads = 0
        """How many models have been opened so far."""
        self._dropped_at = 0.0
        self._open: OrderedDict[Hashable, tuple[int, Callable[[], None]]] = OrderedDict()

    @property
    def taken(self) -> int:
        """Bytes of the open models."""
        return sum(size for size, _ in self._open.values())

    @property
    def roomy(self) -> bool:
        """Whether models don't have to take turns, because none had to go lately."""
        return not self._dropped_at or time.monotonic() - self._dropped_at > SETTLED_SECONDS

    def used(self, key: Hashable) -> None:
        """An open model is used again."""
        self._open.move_to_end(key)

    def make_room(self, size: int, keep: Hashable = None) -> None:
        """Drop models until one of this many bytes fits, or none is left but the one to keep."""
        while self.taken + size > (self.limit or 0) and self._drop(keep):
            pass

    def opened(self, key: Hashable, size: int, drop: Callable[[], None]) -> None:
        """A model has been opened; `drop` closes it. Others go if it is larger than expected."""
        self.loads += 1
        self._open[key] = size, drop
        self.make_room(0, key)

    def resized(self, key: Hashable, size: int) -> None:
        """An open model now takes this many bytes. Others are closed if there is no room for it."""
        self._open[key] = size, self._open[key][1]
        self.make_room(0, key)

    def close(self, key: Hashable) -> None:
        """Drop a model that can't be used any more, if it is open."""
        if key in self._open:
            self._open.pop(key)[1]()

    def clear(self, keep: Hashable = None) -> bool:
        """Drop all models but the one to keep; returns whether there were any."""
        dropped = self._drop(keep)
        while self._drop(keep):
            pass
        return dropped

    def _drop(self, keep: Hashable) -> bool:
        """Drop the model that was used least recently; returns whether there was one beside the one to keep."""
        key = next((key for key in self._open if key != keep), None)
        if key is None:
            return False
        _, drop = self._open.pop(key)
        self._dropped_at = time.monotonic()
        drop()
        return True
