"""How many images per second a child computes and its device could compute, by lane, and how large its batches are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

MEMORY = 30.0
"""Seconds of work after which a measurement counts for 1/e."""


@dataclass
class _Lane:
    images: float = 0.0
    seconds: float = 0.0
    samples: float = 0.0
    fastest: float = 0.0
    growth: float = 1.0
    batch: int = 0
    computed: int = 0


class Speed:
    """Smoothed rates of computing. Failed and reused images and idle time don't count. Thread-safe.

    `siblings` children, including this one, share the device. `clock` is in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, siblings: int = 1) -> None:
        self._siblings, self._clock = siblings, clock
        self._lock = Lock()
        self._lanes: dict[str, _Lane] = {}
        self._since: float | None = None
        self._latest: str | None = None

    def resume(self) -> None:
        """There is work, if there was none."""
        with self._lock:
            self._since = self._clock() if self._since is None else self._since

    def pause(self) -> None:
        """There is no work."""
        with self._lock:
            self._since = None

    def ran(self, lane: str, images: int, batch: int, busy: float, growth: float = 1.0) -> None:
        """A batch of `batch` samples has run for `busy` seconds, which completed `images` images.

        The next one may be `growth` times as large as any so far.
        """
        with self._lock:
            now = self._clock()
            seconds, self._since = now - (now if self._since is None else self._since), now
            known = self._lanes.setdefault(lane, _Lane())
            fading = math.exp(-seconds / MEMORY)
            known.images, known.seconds = known.images * fading + images, known.seconds * fading + seconds
            known.samples, self._latest = known.samples * fading + batch, lane
            known.fastest = max(known.fastest * fading, batch / busy if busy > 0 else 0.0)
            known.batch, known.computed, known.growth = batch, known.computed + images, growth

    def rates(self) -> dict[str, float]:
        """Images per second of each lane in which an image has been computed."""
        with self._lock:
            return {lane: known.images / known.seconds for lane, known in self._lanes.items() if known.images and known.seconds}

    def pace(self, lane: str | None = None) -> float:
        """Images per second of a lane that the device could take from this child, judging by its fastest recent batch; 0 if
        unknown.

        That is more than it computes while it has to wait or batches are not full. While batches still grow, the next one is
        assumed to take no longer: otherwise a fast device would wait for downloads after each step. Without a lane, the
        latest one counts.
        """
        with self._lock:
            known = self._lanes.get(lane or self._latest or "")
            if known is None or not known.samples:
                return 0.0
            return known.growth * known.fastest * known.images / known.samples / self._siblings

    def computed(self, lane: str) -> int:
        """Images of a lane computed so far."""
        with self._lock:
            return self._lanes[lane].computed if lane in self._lanes else 0

    def batch(self, lane: str) -> int:
        """Samples in the latest batch of a lane."""
        with self._lock:
            return self._lanes[lane].batch if lane in self._lanes else 0
