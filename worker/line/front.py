"""Threads for what comes before the device, so that a slow source server holds up nobody but its own images."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition, Thread

from imagemill.worker.line.image import ImageInFlight

Step = Callable[[ImageInFlight], None]

SLOW_SECONDS = 2.0
"""A host is slow while one of its downloads takes longer, and after one that did."""
GLANCE = 0.25
"""Seconds between two looks at whether a download has become slow, while images wait."""
MOST_HOSTS = 1000
"""Slow hosts remembered; beyond that, the oldest is forgotten."""


@dataclass
class _Running:
    image: ImageInFlight
    since: float = field(default_factory=time.monotonic)

    @property
    def slow(self) -> bool:
        return "fetch" not in self.image.seconds and time.monotonic() - self.since > SLOW_SECONDS


class Front:
    """Takes steps with images in `threads` threads, and in as many more with images from slow hosts.

    Hosts take turns; the images of one come in the order in which they were submitted.
    """

    def __init__(self, threads: int) -> None:
        self._each = threads
        self._waiting: dict[str, deque[tuple[Step, ImageInFlight]]] = {}
        self._running: list[_Running] = []
        self._slow: dict[str, None] = {}
        self._changed = Condition()
        self._threads: list[Thread] = []
        self._closed = False

    def submit(self, step: Step, image: ImageInFlight) -> None:
        """Take this step with an image as soon as it is its turn. It must not raise."""
        with self._changed:
            self._waiting.setdefault(image.host, deque()).append((step, image))
            idle = len(self._threads) - len(self._running)
            if idle < sum(map(len, self._waiting.values())) and len(self._threads) < 2 * self._each:
                thread = Thread(target=self._serve, name=f"fetch-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify()

    def slow_hosts(self) -> set[str]:
        """Hosts whose downloads take long."""
        with self._changed:
            return self._slow.keys() | {running.image.host for running in self._running if running.slow}

    def close(self) -> None:
        """Begin nothing more."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until nothing is running after `close`."""
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while (taken := self._take()) is not None:
            step, running = taken
            try:
                step(running.image)
            finally:
                self._over(running)

    def _take(self) -> tuple[Step, _Running] | None:
        """Wait for the next image; None once this is closed."""
        with self._changed:
            while not self._closed:
                host = self._next_host()
                if host is not None:
                    waiting = self._waiting.pop(host)
                    step, image = waiting.popleft()
                    if waiting:
                        self._waiting[host] = waiting  # behind the other hosts
                    running = _Running(image)
                    self._running.append(running)
                    return step, running
                self._changed.wait(GLANCE if self._waiting else None)
        return None

    def _next_host(self) -> str | None:
        """The host whose turn it is."""
        if not self._waiting:
            return None
        slow = self.slow_hosts()
        busy = Counter(running.image.host in slow for running in self._running)
        return next((host for host in self._waiting if busy[host in slow] < self._each), None)

    def _over(self, running: _Running) -> None:
        """Learn from a step that is over."""
        host, seconds = running.image.host, running.image.seconds.get("fetch")
        with self._changed:
            self._running = [other for other in self._running if other is not running]
            if seconds is not None:
                self._slow.pop(host, None)
                if seconds > SLOW_SECONDS:
                    self._slow[host] = None
            while len(self._slow) > MOST_HOSTS:
                del self._slow[next(iter(self._slow))]
