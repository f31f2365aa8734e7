"""How many decoded pixels a child may hold at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

Go = Callable[[int], None]


@dataclass(frozen=True)
class _Waiting:
    pixels: int
    go: Go
    unwanted: Callable[[], bool]


class PixelBudget:
    """Room for `total` decoded pixels, given out first come, first served. Thread-safe; nobody waits in a thread.

    An image larger than the whole budget gets in when it is alone.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._used = 0
        self._closed = False
        self._waiting: deque[_Waiting] = deque()
        self._lock = Lock()

    @property
    def waiting(self) -> int:
        """How many images wait for room."""
        return len(self._waiting)

    def enter_now(self, pixels: int) -> bool:
        """Take room for so many pixels if there is some and nobody waits for it."""
        with self._lock:
            if self._closed or self._waiting or not self._fits(pixels):
                return False
            self._used += pixels
            return True

    def enter(self, pixels: int, go: Go, unwanted: Callable[[], bool] = lambda: False) -> None:
        """Call `go` with the pixels granted as soon as there is room: now, or in the thread that makes room.

        It is granted 0 if it has become `unwanted`, and isn't called at all once the budget is closed.
        """
        with self._lock:
            if self._closed:
                return
            self._waiting.append(_Waiting(pixels, go, unwanted))
        self.look()

    def release(self, pixels: int) -> None:
        """Give room back."""
        with self._lock:
            self._used -= pixels
        self.look()

    def close(self) -> None:
        """Let nobody in any more, because nobody will make room."""
        with self._lock:
            self._closed = True
            self._waiting.clear()

    def look(self) -> None:
        """Let in whoever is first in line, while there is room, and those that are unwanted by now."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
                first = self._waiting[0]
                granted = 0 if first.unwanted() else first.pixels
                if granted and not self._fits(granted):
                    return
                self._waiting.popleft()
                self._used += granted
            first.go(granted)

    def _fits(self, pixels: int) -> bool:
        return not self._used or self._used + pixels <= self._total
