"""What the ledger should contain: a model of jobs and shares, without order or clocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

from imagemill.shared.messages import PRIORITIES, Priority


@dataclass
class SharedOut:
    """A share: the images that its child still has, recorded or not."""

    child: int
    number: int
    images: set[int]
    indexes: set[int]
    """With those of no image, or of duplicates."""
    deaths: float
    alone: bool
    """Whether a suspect is run all by itself."""
    silent: bool = False


@dataclass
class Group:
    """Images that were in the same processes that died, with indexes of no image."""

    deaths: float
    indexes: set[int]


@dataclass
class ModelJob:
    """A job. Every open image is free, a suspect, or in one share."""

    id: str
    lane: str
    owner: str | None
    priority: Priority
    order: int
    images: set[int]
    duplicates: dict[int, int]
    later: bool
    until: bool
    attempts: int
    state: str = "active"
    paused: bool = False
    cancelled: bool = False
    expired: bool = False
    lapsed: bool = False
    manifest: str | None = None
    """`due` or `leased`, until it is written."""
    free: set[int] = field(default_factory=set)
    groups: list[Group] = field(default_factory=list)
    shares: dict[int, SharedOut] = field(default_factory=dict)
    lost: list[SharedOut] = field(default_factory=list)
    died_alone: set[int] = field(default_factory=set)
    results: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = set(self.images)
        self.rises = self.priority == "low"

    @property
    def rank(self) -> int:
        return PRIORITIES.index(self.priority)

    @property
    def active(self) -> bool:
        return self.state == "active"

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    @property
    def waits(self) -> bool:
        """Whether its images may be handed out."""
        return self.active and not (self.paused or self.later or self.cancelled or self.expired)

    @property
    def open(self) -> set[int]:
        return self.images - set(self.results)

    @property
    def suspects(self) -> list[tuple[int, set[int]]]:
        """The groups that hold an open image: their deaths, and the indexes without a result."""
        return [(group.deaths, group.indexes - set(self.results)) for group in self.groups if group.indexes & self.open]

    def next_group(self) -> tuple[int, set[int]]:
        """Take the first group; any before it hold no open image."""
        first = self.suspects[0]
        place = next(place for place, group in enumerate(self.groups) if group.indexes & self.open)
        del self.groups[: place + 1]
        return first

    def count(self, state: str) -> int:
        rows = [1 + self.duplicates.get(index, 0) for index, known in self.results.items() if known == state]
        late = [1 + self.duplicates.get(index, 0) for index in self.open] if self.lapsed and state == "failed" else []
        return sum(rows) + sum(late)

    def record(self, index: int, state: str) -> bool:
        """Returns whether the result is new."""
        if not self.active or index in self.results:
            return False
        self.results[index] = state
        if not self.open:
            self.finish_if_over()
        return True

    def end_share(self, share: SharedOut) -> None:
        del self.shares[share.number]
        self.finish_if_over()

    def bury(self, share: SharedOut, weight: float) -> None:
        if self.active:
            left, deaths = sorted(share.indexes - set(self.results)), share.deaths + weight
            most = ceil(len(left) / 2) if deaths + 1 < self.attempts else 1
            self.groups += [Group(deaths, set(left[place : place + most])) for place in range(0, len(left), most or 1)]
            self.died_alone |= share.images if share.alone else set()
        self.lost.append(share)
        self.end_share(share)

    def finish_if_over(self) -> None:
        if not self.active or (self.shares and (self.open or self.cancelled)):
            return
        if self.cancelled:
            self.finish("cancelled")
        elif not self.open:
            self.finish("finishing")
        elif self.expired:
            self.lapsed = True
            self.finish("done" if "done" in self.results.values() else "failed")

    def finish(self, state: str) -> None:
        self.state, self.manifest, self.until, self.rises = state, "due", False, False
        for group in self.groups:
            group.indexes -= set(self.results)

    def end(self) -> None:
        """The manifest is written."""
        self.manifest = None
        if self.state == "finishing":
            self.state = "done" if self.count("done") else "failed"

    def retry(self, order: int) -> int:
        """Returns the number of images to redo."""
        again = {index for index in self.images if self.results.get(index) != "done"}
        if not self.over or not again:
            return 0
        for index in again & set(self.results):
            del self.results[index]
            self.died_alone.discard(index)
            self.free.add(index)
        self.shares.clear()
        self.lost.clear()  # a child learns that its share is lost long before anyone retries the job
        self.state, self.manifest, self.order = "active", None, order
        self.paused = self.later = self.cancelled = self.expired = self.lapsed = False
        self.rises = self.priority == "low"
        return len(again)
