"""One image on its way down the line, and how its journey can end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from threading import Lock
from typing import Any, Literal

from imagemill.shared.errors import ImageError
from imagemill.shared.messages import Item
from imagemill.shared.quality import Measures, flagged
from imagemill.worker.checking.quality import REPAIRED_SEED, Checked
from imagemill.worker.imaging.codec import Encoded
from imagemill.worker.imaging.headers import Header
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.cache import Remembered
from imagemill.worker.line.context import Context
from imagemill.worker.operations.base import Work
from imagemill.worker.transfer.fetch import Fetched

How = Literal["computed", "kept", "reused"]

CACHED = "cached"
"""The note of a result that was copied from an earlier one."""


@dataclass(frozen=True)
class Stored:
    """The result is in the store: computed, kept as it came, or reused from an earlier job. `size` is (width, height)."""

    how: How
    output: str
    bytes: int
    size: tuple[int, int]
    notes: tuple[str, ...] = ()
    measures: Measures | None = None
    filled: str | None = None


@dataclass(frozen=True)
class Failed:
    """The image can't be done."""

    error: ImageError


@dataclass(frozen=True)
class NotBegun:
    """The line stopped before it got to this image, which stays unrecorded: it is handed out again."""


@dataclass(frozen=True)
class Kept:
    """It needs no work: its file is the result, to be stored."""


@dataclass(frozen=True)
class RunAgain:
    """The check wants another attempt on the device, with the next seed."""


Outcome = Stored | Failed | NotBegun | Kept | RunAgain


@dataclass
class ImageInFlight:
    """One image on its way down the line. A stage reads what earlier stages have set and sets its own part."""

    item: Item
    context: Context = field(repr=False)
    first: bool = False
    """Goes before those that are waiting for the device."""
    deaths: float = 0
    """Attempts that ended with their process; those that ended with their node count half."""
    share: str | None = None
    """Its number as text: it has more digits than some readers of JSON can count."""
    code: str | None = None
    """Of its failure, once it is recorded."""
    tries: int = 0
    """Downloads attempted."""
    fetched_again: bool = False
    """Because its file ended early."""
    source_bytes: int = 0
    held_pixels: int = 0
    """Its share of the pixel budget."""
    batch: int = 1
    """The most samples that went through the model in one pass with one of its own."""
    cache_key: str | None = None
    """None: its result must not be remembered."""
    failure: ImageError | None = None
    """What went wrong with one of its samples on the device."""
    seconds: dict[str, float] = field(default_factory=dict)

    spans: list[tuple[str, float, float]] | None = None
    """Stage, start and end of all work on it, if it is one of those that are traced."""

    data: bytes = field(init=False, repr=False)
    held_bytes: int = 0
    """Of `data`, in the budget of downloaded files."""
    held_mask_bytes: int = 0
    """Of `mask_file`, in that of masks and control images."""
    mask_file: bytes | ImageError | None = field(default=None, repr=False)
    """Of its own mask or control image, or why there is none."""
    mask_pixels: int = 0
    """Of its own mask or control image, in addition to its own."""
    earlier_result: Remembered | None = None
    """Of the same image, to be copied."""
    how: How = "computed"
    filled: str | None = None
    """The outline of what was filled."""
    header: Header = field(init=False)
    picture: Picture = field(init=False, repr=False)
    work: Work[Any, Any, Any] = field(init=False, repr=False)
    outputs: list[Any] = field(init=False, repr=False)
    missing: int = field(init=False, default=0)
    """Samples still on their way to or on the device."""
    made: Picture = field(init=False, repr=False)
    best: Checked = field(init=False, repr=False)
    """The best result so far; a second attempt may beat it."""
    encoded: Encoded = field(init=False, repr=False)

    waits: bool = False
    """For a service that does not respond."""
    own_faults: int = 0
    """Outages that hit this image while its service responded to others."""
    answers_seen: int | None = None
    """How often that service had responded at the latest of them."""
    place: Literal["queued", "fetching", "begun", "over"] = "queued"
    """Until it is begun, it can be withdrawn."""
    recorded: bool = False
    withdrawn: bool = False
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def move(self, place: Literal["fetching", "begun"]) -> bool:
        """Move on; False if it has been withdrawn."""
        with self._lock:
            if not self.withdrawn and self.place != "over":
                self.place = place
            return not self.withdrawn

    def withdraw(self) -> None:
        """Take it out of the line, unless it is begun."""
        with self._lock:
            if self.place in ("queued", "fetching"):
                self.withdrawn, self.place = True, "over"

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to this stage's seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent(stage, time.perf_counter() - start)

    def spent(self, stage: str, seconds: float) -> None:
        """Add time to a stage's seconds that has just passed."""
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 4)
        if self.spans is not None:
            end = time.time()
            self.spans.append((stage, end - seconds, end))

    @cached_property
    def log_fields(self) -> dict[str, Any]:
        """What log lines say of the image's job and share."""
        return {**self.context.log_fields, "share": self.share}

    def start(self, work: Work[Any, Any, Any]) -> None:
        """Take on the work for the next pass over the device."""
        self.work, self.outputs, self.missing = work, [None] * len(work.samples), len(work.samples)
        self.failure = None

    def keep_better(self, checked: Checked) -> None:
        """Keep a checked result unless an earlier attempt's was better."""
        if not self.has_result:
            self.best = checked
        elif checked.better_than(self.best):
            self.best = replace(checked, notes=(*checked.notes, REPAIRED_SEED))

    @cached_property
    def host(self) -> str:
        """Where its source is fetched from."""
        return self.item.source.partition("://")[2].partition("/")[0]

    @property
    def earlier(self) -> int:
        """Attempts that count."""
        return int(self.deaths)

    @property
    def stopped(self) -> bool:
        """Whether nobody wants it to be begun here any more."""
        return self.withdrawn or self.context.stop.is_set()

    @property
    def needed_pixels(self) -> int:
        """What it takes of the pixel budget to be decoded, its own mask or control image included."""
        return self.header.pixels + self.mask_pixels

    @property
    def has_result(self) -> bool:
        """Whether an attempt has come through the check."""
        return "best" in vars(self)

    @property
    def source(self) -> dict[str, Any]:
        """What the record says of the source, as far as it is known."""
        known = {"source_format": self.header.format, "source_size": self.header.size} if "header" in vars(self) else {}
        return {"source_bytes": self.source_bytes, **known}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the submitter should know about the result, flags included."""
        if self.has_result:
            return (*self.best.notes, *flagged(self.best.beyond))
        return tuple(self.work.notes) if "work" in vars(self) else ()

    def keep_file(self, encoded: Encoded) -> None:
        """Only the finished file, its notes and measures are needed from now on: free all pixels, and most of their budget."""
        self.encoded = encoded
        _ = encoded.md5  # now, since the network's thread has better things to do
        self.best = self.best.without_pixels()
        self.drop_file()
        self._free(("picture", "work", "outputs", "made"))
        pixels = min(self.held_pixels, len(encoded.data) // 4)  # a pixel takes about 4 bytes
        self.context.budget.release(self.held_pixels - pixels)
        self.held_pixels = pixels

    def hold(self, fetched: Fetched) -> None:
        """Take on the downloaded file."""
        self.data, self.source_bytes = fetched.data, len(fetched.data)
        self.held_bytes += fetched.room
        self.tries += fetched.tries

    def hold_mask(self, mask: Fetched | ImageError) -> None:
        """Take on its mask, or why there is none."""
        if isinstance(mask, ImageError):
            self.mask_file = mask
        else:
            self.mask_file, self.held_mask_bytes = mask.data, mask.room

    def drop_file(self) -> None:
        """Free the downloaded files."""
        vars(self).pop("data", None)
        self.mask_file = None
        if self.held_mask_bytes:
            self.context.fetcher.mask_room.release(self.held_mask_bytes)
            self.held_mask_bytes = 0
        if self.held_bytes:
            self.context.fetcher.room.release(self.held_bytes)
            self.held_bytes = 0

    def drop_pixels(self) -> None:
        """Free everything large. What the record needs stays."""
        self.drop_file()
        self._free(("picture", "work", "outputs", "made", "best", "encoded"))

    def _free(self, names: Iterable[str]) -> None:
        for name in names:
            vars(self).pop(name, None)
