"""One image on its way through the line, and how many decoded pixels may be on it at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from imagemill.shared.errors import ImageError
from imagemill.shared.messages import Item
from imagemill.shared.quality import flagged
from imagemill.worker.checking.quality import Checked
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.operations.base import REPAIRED_SEED, Work


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
