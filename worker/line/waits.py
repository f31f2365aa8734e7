"""What the device has waited for, in seconds by cause."""

from __future__ import annotations

from typing import Literal

Cause = Literal["work", "fetch", "decode", "batch", "store"]
CAUSES: tuple[Cause, ...] = ("work", "fetch", "decode", "batch", "store")
"""There is no work; nothing is downloaded; nothing is prepared; a batch is not full; results not yet stored take the memory."""


class Waits:
    """Counts seconds; `busy` are those in which the device worked. For one thread, but any may read."""

    def __init__(self) -> None:
        self.busy = 0.0
        self._seconds: dict[Cause, float] = dict.fromkeys(CAUSES, 0.0)

    def add(self, cause: Cause, seconds: float) -> None:
        """The device has waited."""
        self._seconds[cause] += seconds

    def taken(self) -> dict[str, float]:
        """Seconds by cause, and `busy`, since the last call; causes that did not occur are left out."""
        counted = [("busy", self.busy), *self._seconds.items()]
        self.busy, self._seconds = 0.0, dict.fromkeys(CAUSES, 0.0)
        return {name: round(seconds, 3) for name, seconds in counted if seconds >= 0.001}
