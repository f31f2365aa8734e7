"""How many decoded pixels a child may hold at once."""

from __future__ import annotations

from threading import Condition, Lock

from imagemill.shared.errors import InternalError


class PixelBudget:
    """Room for `total` decoded pixels, given out first come, first served. Thread-safe.

    An image larger than the whole budget gets in when it is alone.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._used = 0
        self._closed = False
        self._turn = Lock()  # one waits at a time, so that small images can't keep overtaking a large one
        self._changed = Condition()

    def acquire(self, pixels: int) -> None:
        """Wait until there is room. Raises InternalError once the budget is closed."""
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._closed or self._used == 0 or self._used + pixels <= self._total)
            if self._closed:
                raise InternalError("the line was stopped")
            self._used += pixels

    def release(self, pixels: int) -> None:
        """Give room back."""
        with self._changed:
            self._used -= pixels
            self._changed.notify_all()

    def close(self) -> None:
        """Turn away everyone who is waiting, because nobody will release anything any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
