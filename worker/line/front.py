"""Which images are downloaded next, and how many at a time: as many as the device needs, without holding up others."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from threading import Lock

from imagemill.worker.line.image import ImageInFlight

SLOW_SECONDS = 2.0
"""A host is slow if its downloads take longer."""
GLANCE = 0.25
"""Seconds between two looks at whether a host has become slow, while images wait."""
MOST_HOSTS = 1000
"""Hosts remembered; beyond that, the oldest is forgotten."""
FEWEST = 16
"""Downloads that may always run at a time, so that the device's rate and the latency become known."""
HEADROOM = 2.0
"""Downloads at a time, relative to what the device needs on average, since latencies vary."""
WEIGHT = 1 / 32
"""Of the latest download in the mean latency."""


@dataclass
class _Host:
    """`answered` is when its latest quick download ended, on the monotonic clock; `slow` tells whether the latest was slow."""

    waiting: deque[ImageInFlight] = field(default_factory=deque)
    running: dict[int, float] = field(default_factory=dict)
    answered: float = -math.inf
    slow: bool = False

    def is_slow(self, now: float) -> bool:
        """Whether its latest download was slow, or one is taking long and none has ended quickly since it began."""
        began = next(iter(self.running.values()), now)
        return self.slow or (now - began > SLOW_SECONDS and self.answered <= began)


class Front:
    """Calls `begin` with each image whose download should start. Thread-safe.

    By Little's law, a device that takes `pace()` images per second needs pace x latency downloads at a time. There are twice
    as many, at least 16, no more than `most`, and no more than `per_host` from one host. Images that are downloaded and not
    yet `prepared` count, too, so that downloads wait for CPUs that fall behind. Slow hosts have as many places again, so
    that they hold up only their own images. Hosts take turns; the images of one come in the order in which they were
    submitted.
    """

    def __init__(self, begin: Callable[[ImageInFlight], None], pace: Callable[[], float], *, most: int, per_host: int) -> None:
        self._begin, self._pace, self._most, self._per_host = begin, pace, most, per_host
        self._hosts: dict[str, _Host] = {}
        self._queue: dict[str, None] = {}  # hosts with images that wait, in turn
        self._slow: set[str] = set()
        self._look_at = 0.0
        self._lock = Lock()
        self._closed = False
        self.fetching = self.fetched = 0
        self.latency = 0.0
        """Smoothed seconds of a download."""

    @property
    def places(self) -> int:
        """How many images may be downloading, or downloaded and not prepared."""
        needed = math.ceil(HEADROOM * self._pace() * self.latency)
        return min(self._most, max(FEWEST, needed))

    def submit(self, images: Iterable[ImageInFlight]) -> None:
        """Download images as soon as it is their turn."""
        with self._lock:
            if self._closed:
                return
            for image in images:
                self._host(image.host).waiting.append(image)
                self._queue.setdefault(image.host)
        self.look()

    def over(self, image: ImageInFlight) -> None:
        """A download is over, successful or not."""
        seconds = image.seconds.get("fetch")
        with self._lock:
            host = self._hosts[image.host]
            del host.running[id(image)]
            self.fetching -= 1
            self.fetched += 1
            if seconds is not None:
                self.latency += (seconds - self.latency) * (WEIGHT if self.latency else 1.0)
                host.slow = seconds > SLOW_SECONDS
                if host.slow:
                    self._slow.add(image.host)
                else:
                    self._slow.discard(image.host)
                    host.answered = time.monotonic()
        self.look()

    def dropped(self, image: ImageInFlight) -> None:
        """An image was not downloaded after all, because it is no longer wanted."""
        with self._lock:
            host = self._hosts.get(image.host)
            if host is not None and host.running.pop(id(image), None) is not None:
                self.fetching -= 1
        self.look()

    def prepared(self) -> None:
        """An image that was downloaded needs no more preparation."""
        with self._lock:
            self.fetched -= 1
        self.look()

    def look(self) -> None:
        """Begin what may begin. Call this several times per second while images wait: hosts become slow without notice."""
        if not self._queue:
            return
        with self._lock:
            found = list(self._next())
        for image in found:
            self._begin(image)

    def slow_hosts(self) -> set[str]:
        """Hosts whose downloads take long."""
        now = time.monotonic()
        with self._lock:
            return {name for name, host in self._hosts.items() if host.is_slow(now)}

    def close(self) -> None:
        """Begin nothing more."""
        with self._lock:
            self._closed = True
            self._queue.clear()

    def _next(self) -> Iterator[ImageInFlight]:
        """Images whose turn it is; they count as running, unless nobody wants them any more."""
        now, places = time.monotonic(), self.places
        if now >= self._look_at:
            self._look_at = now + GLANCE
            self._slow = {name for name, host in self._hosts.items() if host.is_slow(now)}
        slow = sum(len(self._hosts[name].running) for name in self._slow)
        taken = {True: slow, False: self.fetching - slow + self.fetched}
        while self._queue and (name := self._whose_turn(taken, places)) is not None:
            host = self._hosts[name]
            image = host.waiting.popleft()
            del self._queue[name]
            if host.waiting:
                self._queue[name] = None  # behind the other hosts
            if not image.stopped:
                host.running[id(image)] = now
                self.fetching += 1
                taken[name in self._slow] += 1
            yield image

    def _whose_turn(self, taken: dict[bool, int], places: int) -> str | None:
        if sum(taken.values()) >= 2 * places or (taken[False] >= places and (not self._slow or taken[True] >= places)):
            return None
        return next((name for name in self._queue if self._may_begin(name, taken, places)), None)

    def _may_begin(self, name: str, taken: dict[bool, int], places: int) -> bool:
        return taken[name in self._slow] < places and len(self._hosts[name].running) < self._per_host

    def _host(self, name: str) -> _Host:
        if name not in self._hosts and len(self._hosts) >= MOST_HOSTS:
            idle = next((other for other, host in self._hosts.items() if not host.running and not host.waiting), None)
            if idle is not None:
                del self._hosts[idle]
                self._slow.discard(idle)
        return self._hosts.setdefault(name, _Host())
