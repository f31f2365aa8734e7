"""One image on its way through the line, and how many decoded pixels may be on it at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Condition, Lock
from typing import Any

from shared.errors import ImageError, InternalError
from shared.messages import Item
from shared.quality import flagged
from worker.operations.base import REPAIRED_SEED, Picture, Work
from worker.quality import Checked


@dataclass
class Passage:
    """One image on its way through the line."""

    item: Item
    tries: int = 0
    pixels: int = 0
    picture: Picture | None = None
    work: Work | None = None
    outputs: list[Any] = field(default_factory=list)
    missing: int = 0
    checked: Checked | None = None  # the best result so far
    error: ImageError | None = None
    cache_key: str | None = None  # None: its result is not to be remembered
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to this image's seconds of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 4)

    def begin(self, work: Work) -> None:
        """What is to be run now."""
        self.work, self.missing, self.outputs = work, len(work.samples), [None] * len(work.samples)

    def keep(self, checked: Checked) -> None:
        """Keep a result, if it is better than the one of an earlier try."""
        if self.checked is None:
            self.checked = checked
        elif checked.better_than(self.checked):
            self.checked = replace(checked, notes=(*checked.notes, REPAIRED_SEED))

    @property
    def found(self) -> dict[str, Any]:
        """What its record says of the result: notes and measures."""
        if self.checked is not None:
            return {"notes": (*self.checked.notes, *flagged(self.checked.beyond)), "quality": self.checked.measures}
        return {"notes": tuple(self.work.notes)} if self.work is not None else {}


class PixelBudget:
    """How many decoded pixels may be held at a time; first come, first served.

    An image larger than the whole budget is let in alone.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._used = 0
        self._closed = False
        self._turn = Lock()  # one waits at a time, so that small images can't overtake a large one for ever
        self._changed = Condition()

    def acquire(self, pixels: int) -> None:
        """Wait until there is room."""
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._closed or self._used == 0 or self._used + pixels <= self._total)
            if self._closed:
                raise InternalError("the line was stopped")
            self._used += pixels

    def release(self, pixels: int) -> None:
        """Make room again."""
        with self._changed:
            self._used -= pixels
            self._changed.notify_all()

    def close(self) -> None:
        """Turn away whoever waits, since nobody will make room any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
