"""What became of each image of a chunk: one record in the ledger, and counts."""

from __future__ import annotations

from threading import Lock
from typing import Any

from imagemill.shared.errors import WorkerLost
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.messages import ItemResult
from imagemill.worker.line.image import Failed, ImageInFlight, Outcome, Stored


class Records:
    """Writes the records of one job's images, and counts those that were first. Thread-safe.

    `reused` counts the `done` images that were copied from earlier results. `earlier` holds, by index, the attempts that
    ended with their process. `fatal` is why the ledger could not be written to: without a record nothing else matters.
    """

    def __init__(self, ledger: WorkLedger, job: str, node: str) -> None:
        self._ledger, self._job, self._node = ledger, job, node
        self._counting = Lock()
        self.done = self.failed = self.reused = 0
        self.earlier: dict[int, int] = {}
        self.fatal: Exception | None = None

    @property
    def over(self) -> int:
        """How many images are recorded."""
        return self.done + self.failed

    def record(self, image: ImageInFlight, outcome: Outcome) -> None:
        """Record an image that is stored or has failed; one that was not begun stays open."""
        if isinstance(outcome, Stored):
            first = self._record(
                image,
                state="done",
                output=outcome.output,
                output_bytes=outcome.bytes,
                output_size=outcome.size,
                notes=outcome.notes,
                quality=outcome.measures,
            )
            if first and outcome.how == "reused":
                with self._counting:
                    self.reused += 1
        elif isinstance(outcome, Failed):
            error = outcome.error
            image.tries = 0 if isinstance(error, WorkerLost) else max(1, image.tries, error.tries)
            self._record(
                image, state="failed", code=error.code, message=error.message, retryable=error.retryable, notes=image.notes
            )

    def _record(self, image: ImageInFlight, **outcome: Any) -> bool:
        """Whether this was the image's first record."""
        index = image.item.index
        result = ItemResult(
            index=index,
            attempts=self.earlier.get(index, 0) + image.tries,
            batch=image.batch,
            seconds=image.seconds,
            node=self._node,
            **image.source,
            **outcome,
        )
        try:
            first = self._ledger.record(self._job, result)
        except Exception as error:  # noqa: BLE001  # the line raises it
            self.fatal = error
            return False
        with self._counting:
            self.done += first and result.state == "done"
            self.failed += first and result.state == "failed"
        return first
