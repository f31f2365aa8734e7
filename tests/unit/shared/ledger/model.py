"""What the ledger should contain: a model of jobs and shares, without order or clocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from imagemill.shared.messages import PRIORITIES, Priority


@dataclass
class SharedOut:
    """A share: the images that its child still has, recorded or not."""

    child: int
    number: int
    images: set[int]
    alone: bool
    ghosts: bool
    """Whether it holds indexes of no image, or of duplicates."""
    silent: bool = False


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
    state: str = "active"
    paused: bool = False
    cancelled: bool = False
    expired: bool = False
    lapsed: bool = False
    ghosts: bool = False
    manifest: str | None = None
    """`due` or `leased`, until it is written."""
    free: set[int] = field(default_factory=set)
    suspects: set[int] = field(default_factory=set)
    shares: dict[int, SharedOut] = field(default_factory=dict)
    lost: list[SharedOut] = field(default_factory=list)
    tried: dict[int, int] = field(default_factory=dict)
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

    def count(self, state: str) -> int:
        rows = [1 + self.duplicates.get(index, 0) for index, known in self.results.items() if known == state]
        late = [1 + self.duplicates.get(index, 0) for index in self.open] if self.lapsed and state == "failed" else []
        return sum(rows) + sum(late)

    def record(self, index: int, state: str) -> bool:
        """Returns whether the result is new."""
        if not self.active or index in self.results:
            return False
        self.results[index] = state
        self.suspects.discard(index)
        if not self.open:
            self.finish_if_over()
        return True

    def end_share(self, share: SharedOut) -> None:
        del self.shares[share.number]
        self.finish_if_over()

    def bury(self, share: SharedOut) -> None:
        if self.active:
            self.suspects |= share.images & self.open
            self.ghosts |= share.ghosts
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
            self.tried.pop(index, None)
            self.free.add(index)
        self.shares.clear()
        self.lost.clear()  # a child learns that its share is lost long before anyone retries the job
        self.state, self.manifest, self.order = "active", None, order
        self.paused = self.later = self.cancelled = self.expired = self.lapsed = False
        self.rises = self.priority == "low"
        return len(again)
