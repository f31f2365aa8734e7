"""How many decoded pixels a child may hold at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
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

    An image larger than the whole budget gets in when it is alone. Pictures that many images need are kept in addition, as long
    as they take no more than half of the room.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._used = 0
        self._closed = False
        self._waiting: deque[_Waiting] = deque()
        self._kept: dict[Hashable, tuple[int, Callable[[], None]]] = {}
        self._dropped: deque[Hashable] = deque()
        self._lock = Lock()

    @property
    def waiting(self) -> int:
        """How many images wait for room."""
        return len(self._waiting)

    def enter_now(self, pixels: int) -> bool:
        """Take room for this many pixels if there is room and nobody is waiting for it."""
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

    def keep(self, key: Hashable, pixels: int, forget: Callable[[], None]) -> None:
        """Count a picture that stays in memory. When there is too little room, the oldest ones go first: `forget` is called."""
        forgotten = []
        with self._lock:
            self._kept[key] = pixels, forget
            surplus = self._kept_pixels() - self._total // 2
            for old in list(self._kept)[:-1]:  # whoever has just decoded one needs it
                if surplus > 0:
                    pixels, forget = self._kept.pop(old)
                    forgotten.append(forget)
                    surplus -= pixels
        for forget in forgotten:
            forget()

    def drop(self, key: Hashable) -> None:
        """A picture that was kept is no longer in memory. Takes no lock, so that finalizers may call it anywhere."""
        self._dropped.append(key)

    def close(self) -> None:
        """Let nobody in any more, because nobody will make room."""
        with self._lock:
            self._closed = True
            self._waiting.clear()

    def look(self) -> None:
        """While there is room, let in whoever is first in line; also those that are no longer wanted."""
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
        return not self._used or self._used + self._kept_pixels() + pixels <= self._total

    def _kept_pixels(self) -> int:
        while self._dropped:
            self._kept.pop(self._dropped.popleft(), None)
        return sum(pixels for pixels, _ in self._kept.values())
