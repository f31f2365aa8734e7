"""How many decoded pixels a child may hold at a time."""

from __future__ import annotations

from threading import Condition, Lock

from imagemill.shared.errors import InternalError


class PixelBudget:
    """How many decoded pixels may be held at a time; first come, first served.

    An image larger than the whole budget is let in alone.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._used = 0
        self._closed = False
        self._turn = Lock()  # one waits at a time, so that small images can't overtake a large one for ever
        self._changed = Condition()

    def acquire(self, pixels: int) -> None:
        """Wait until there is room."""
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._closed or self._used == 0 or self._used + pixels <= self._total)
            if self._closed:
                raise InternalError("the line was stopped")
            self._used += pixels

    def release(self, pixels: int) -> None:
        """Make room again."""
        with self._changed:
            self._used -= pixels
            self._changed.notify_all()

    def close(self) -> None:
        """Turn away whoever waits, since nobody will make room any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
