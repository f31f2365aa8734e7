"""What a line reports to whoever counts; by default, nobody does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from imagemill.shared.messages import ItemResult

if TYPE_CHECKING:  # a node's parent imports this module, but no numpy
    from imagemill.worker.line.batching import Recipe
    from imagemill.worker.line.waits import Cause


class Meter:
    """Counts nothing. worker/node/metrics.py has the one that counts for Prometheus."""

    def recorded(self, operation: str, result: ItemResult, how: str) -> None:
        """An image has its result; `how` is computed, reused, kept or failed."""

    def ran(self, recipe: Recipe, parts: Sequence[int], seconds: float) -> None:
        """A batch has run on the device for this many seconds, in parts of these sizes."""

    def waited(self, cause: Cause, seconds: float) -> None:
        """The device has waited."""

    def store_failed(self, code: str) -> None:
        """A store did not take or give an image."""

    def store_waits(self, waits: bool) -> None:
        """Whether images wait for a service that does not respond."""
