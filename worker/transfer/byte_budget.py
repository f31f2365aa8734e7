"""How many bytes of downloaded files a process may hold."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from threading import Lock
from typing import Self


@dataclass(eq=False)
class _Waiter:
    wanted: int
    loop: asyncio.AbstractEventLoop
    granted: asyncio.Future[None]


class ByteBudget:
    """Counts reserved bytes up to `total`; thread-safe. Only a single reservation may exceed it, when there is no other."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._lock = Lock()
        self._waiting: deque[_Waiter] = deque()

    def try_reserve(self, wanted: int, *, more: bool = False) -> bool:
        """Reserve bytes if there is room and nobody is waiting for it. A caller that needs `more` doesn't queue behind
        those waiting."""
        with self._lock:
            fits = self._fits(wanted) and (more or not self._waiting)
            if fits:
                self.used += wanted
            return fits

    def take(self, wanted: int) -> None:
        """Reserve bytes even if there is no room: for those who must not wait for others."""
        with self._lock:
            self.used += wanted

    async def reserve(self, wanted: int) -> None:
        """Wait until there is room; first come, first served. A reservation larger than the total waits until it is
        alone."""
        with self._lock:
            if self._fits(wanted) and not self._waiting:
                self.used += wanted
                return
            loop = asyncio.get_running_loop()
            waiter = _Waiter(wanted, loop, loop.create_future())
            self._waiting.append(waiter)
        try:
            await waiter.granted
        except asyncio.CancelledError:
            with self._lock:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
                else:  # granted at the same time
                    self.used -= wanted
                self._admit()
            raise

    def release(self, unwanted: int) -> None:
        """Give reserved bytes back."""
        with self._lock:
            self.used -= unwanted
            self._admit()

    def _fits(self, wanted: int) -> bool:
        return self.used == 0 or self.used + wanted <= self.total

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0].wanted):
            waiter = self._waiting.popleft()
            self.used += waiter.wanted
            waiter.loop.call_soon_threadsafe(_grant, waiter.granted)


class NoRoom(Exception):
    """A download has to wait for room and begin again."""


class Claim:
    """What one download holds of a budget; given back when the block ends, except for what it keeps.

    With `wait=False`, it takes what it needs, even if there is no room.
    """

    def __init__(self, budget: ByteBudget, most: int, *, wait: bool = True) -> None:
        self._budget, self._most, self._wait = budget, most, wait
        self._lock = Lock()
        self._held, self._over = 0, False
        self.lacks = 0
        """The number of bytes there was no room for."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True  # a thread may still be reading for a download that was cancelled
        self.keep(0)

    def covers(self, size: int, *, announced: bool = False) -> bool:
        """Whether `size` bytes are reserved; if they aren't yet, they are if there is room."""
        with self._lock:
            more = size - self._held
            if more <= 0 or self._over:
                return not self._over
            if not self._wait:
                self._budget.take(more)
            elif not self._budget.try_reserve(more, more=self._held > 0):
                self.lacks = size if announced and not self._held else self._most
                return False
            self._held += more
            return True

    async def wait(self) -> None:
        """Wait for the room that was lacking, while holding nothing, so that others can go on."""
        wanted, self.lacks = self.lacks, 0
        self.keep(0)
        await self._budget.reserve(wanted)
        self._held = wanted

    def keep(self, size: int) -> int:
        """Give back all but `size` bytes, which are the caller's from now on."""
        with self._lock:
            if self._held > size:
                self._budget.release(self._held - size)
            self._held = 0
        return size


def _grant(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
