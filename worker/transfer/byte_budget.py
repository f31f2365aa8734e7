"""How many bytes of downloaded files a process may hold."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from threading import Lock


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
        """Reserve bytes if there is room and nobody waits for it. Who needs `more` does not queue behind those who wait."""
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
        """Wait until there is room; first come, first served. What is larger than everything waits until it is alone."""
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


def _grant(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
