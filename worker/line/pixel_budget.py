"""How many decoded pixels a child may hold at once."""

from __future__ import annotations

from collections.abc import Callable
from threading import Condition, Lock

from imagemill.worker.line.stopped import GLANCE, Stopped


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

    def acquire(self, pixels: int, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait until there is room. Raises Stopped once the budget is closed or `stopped()` is true."""

        def over() -> bool:
            return self._closed or stopped()

        while not self._turn.acquire(timeout=GLANCE):
            if over():
                raise Stopped
        try:
            with self._changed:
                while not over():
                    if self._used == 0 or self._used + pixels <= self._total:
                        self._used += pixels
                        return
                    self._changed.wait(GLANCE)
        finally:
            self._turn.release()
        raise Stopped

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
