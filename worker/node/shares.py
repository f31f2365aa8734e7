"""What the feeder keeps: shares in the line; and what it needs to know of jobs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from imagemill.shared.engines import split_lane
from imagemill.shared.errors import ModelUnavailable
from imagemill.shared.ledger.leasing import ManifestDue, Share
from imagemill.worker.line.context import Context
from imagemill.worker.line.image import ImageInFlight
from imagemill.worker.line.pixel_budget import PixelBudget
from imagemill.worker.node.parts import Lack


def engine_of(lane: str) -> tuple[str, str]:
    """The operation and engine of a lane."""
    return split_lane(lane)[:2]


class Jobs(Protocol):
    """What the feeder needs to know of jobs; the child does."""

    def open(self, job: str, budget: PixelBudget) -> Context:
        """A new context. Raises an ImagemillError if this child can't work on the job."""

    def write_manifest(self, due: ManifestDue) -> None:
        """Write the manifest of a job that is over."""

    def lanes(self) -> list[str]:
        """The lanes that this child can work in now."""

    def report_fault(self, lane: str, error: ModelUnavailable, since: float) -> None:
        """Take a lane out of service, or a part that was used in it, unless its files have changed `since` (monotonic) the
        attempt to use it began.
        """

    def lack(self, context: Context) -> Lack | None:
        """What a job needs beside its model and this node has not got, or can't use."""

    def why_waiting(self, context: Context, lack: Lack) -> str | None:
        """Why a job waits that this node can't work on; None if another one can."""

    def roomy(self) -> bool:
        """Whether models don't have to take turns, because all that are needed stay open."""

    def grows(self, lane: str) -> bool:
        """Whether larger batches are faster in this lane."""

    def call_for_shift(self, lane: str) -> None:
        """Call some child of this node to its next shift, in this lane."""

    def progress(self, *now: tuple[Context, int]) -> None:
        """Called every few seconds during a shift with a job in progress, if any, and its images in the line."""


@dataclass
class Held:
    """A share in the line."""

    share: Share
    context: Context
    images: list[ImageInFlight]
    started: float = field(default_factory=time.monotonic)
    began: float = field(default_factory=time.time)
    waits: dict[str, float] = field(default_factory=dict)
    """How long the device had worked and waited when it began (Waits.so_far)."""
    returned: set[int] = field(default_factory=set)
    """Indexes that the ledger has got back."""

    @property
    def lane(self) -> str:
        return self.context.spec.lane

    @property
    def log_fields(self) -> dict[str, Any]:
        """What log lines say of the share."""
        return {"action": "share", **self.context.log_fields, "share": f"{self.share.number}"}

    def outcome(self) -> dict[str, Any]:
        """What the log says at its end."""
        codes = dict(Counter(image.code for image in self.images if image.code is not None))
        fields = {**self.log_fields, "images": len(self.images), "failed": sum(codes.values()), "codes": codes}
        return {**fields, "returned": len(self.returned), "seconds": round(time.monotonic() - self.started, 3)}

    def left(self) -> list[ImageInFlight]:
        """The images that are in the line."""
        return [image for image in self.images if image.place != "over"]

    def divided(self) -> tuple[list[int], list[int]]:
        """Indexes of the images that are in the line, and of those that have left it without a record and are still leased."""
        left, undone = [], []
        for image in self.images:  # each is asked once, because it may leave the line meanwhile
            if image.place != "over":
                left.append(image.item.index)
            elif not image.recorded and image.item.index not in self.returned:
                undone.append(image.item.index)
        return left, undone


def ahead(held: Iterable[Held]) -> list[ImageInFlight]:
    """The images that are not begun, in the order in which they were taken."""
    return [image for one in held for image in one.images if image.place in ("queued", "fetching")]
