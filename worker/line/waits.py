"""What the device has waited for, in seconds by cause."""

from __future__ import annotations

from typing import Literal

Cause = Literal["work", "fetch", "decode", "batch", "store", "turn"]
CAUSES: tuple[Cause, ...] = ("work", "fetch", "decode", "batch", "store", "turn")
"""There is no work; nothing is downloaded; nothing is prepared; a batch is not full; results not yet stored take the memory;
another child has the device."""


class Waits:
    """Counts seconds; in those under `busy`, the device worked. Written by one thread, but any may read."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(("busy", *CAUSES), 0.0)

    def add(self, cause: Cause | Literal["busy"], seconds: float) -> None:
        """The device has waited, or worked."""
        self._seconds[cause] += seconds

    def so_far(self) -> dict[str, float]:
        """All seconds, to be passed to `since`."""
        return dict(self._seconds)

    def since(self, earlier: dict[str, float]) -> dict[str, float]:
        """Seconds of work and of waits by cause since `earlier`; what did not occur is left out."""
        spent = {name: seconds - earlier.get(name, 0.0) for name, seconds in self._seconds.items()}
        return {name: round(seconds, 3) for name, seconds in spent.items() if seconds >= 0.001}
