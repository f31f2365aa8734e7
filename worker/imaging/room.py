"""How many pixels a process decodes at once: decoders need several times the memory of the picture that they return."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

PIXELS_AT_ONCE = 64_000_000


class Room:
    """Room for `total` units of work at once. Thread-safe. Work larger than that gets in when it is alone."""

    def __init__(self, total: int = PIXELS_AT_ONCE) -> None:
        self._total = total
        self._used = 0
        self._changed = Condition()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """Wait for room, and take it while inside. Whoever is inside must not ask for more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + amount <= self._total)
            self._used += amount
        try:
            yield
        finally:
            with self._changed:
                self._used -= amount
                self._changed.notify_all()
