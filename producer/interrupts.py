"""Ctrl-C and SIGTERM for a program that starts other processes and must stop them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Interrupts:
    """In this context, the first SIGINT raises KeyboardInterrupt, the first SIGTERM SystemExit; later ones are ignored."""

    def __init__(self) -> None:
        self._holding = False
        self._held: int | None = None

    def __enter__(self) -> Interrupts:
        self._before = {which: signal.signal(which, self._handle) for which in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Delay signals until the end of the block, so that no process is started without being registered."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._held is not None:
            self._raise(self._held)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._holding:
            self._held = number
        else:
            self._raise(number)

    def _raise(self, number: int) -> NoReturn:
        for which in self._before:
            signal.signal(which, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)
