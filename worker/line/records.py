"""What became of each image of a chunk: one record in the ledger, and counts."""

from __future__ import annotations

from threading import Lock
from typing import Any

from imagemill.shared.errors import ImageError, WorkerLost
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.messages import ItemResult
from imagemill.worker.line.image import Passage
from imagemill.worker.operations.base import CACHED


class Records:
    """Writes the records of one job's images, and counts those that were first; thread-safe.

    `reused` is how many of the `done` were copied from earlier results. `earlier` holds by index the attempts that ended
    with their process. `fatal` is why the ledger could not be written to, if that happened: without a record nothing else
    matters.
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

    def record_done(self, passage: Passage) -> None:
        self._record(ItemResult(index=passage.item.index, state="done", **self._facts(passage)))

    def record_failure(self, passage: Passage, error: ImageError) -> None:
        passage.error = error
        passage.tries = max(passage.tries, error.tries)
        said: dict[str, Any] = dict(code=error.code, message=error.message, retryable=error.retryable)
        self._record(ItemResult(index=passage.item.index, state="failed", **said, **self._facts(passage)))

    def _facts(self, passage: Passage) -> dict[str, Any]:
        tries = 0 if isinstance(passage.error, WorkerLost) else max(1, passage.tries)
        attempts = self.earlier.get(passage.item.index, 0) + tries
        return {**passage.facts, **passage.found, "attempts": attempts, "seconds": passage.seconds, "node": self._node}

    def _record(self, result: ItemResult) -> None:
        try:
            first = self._ledger.record(self._job, result)
        except Exception as error:  # noqa: BLE001  # raised by who asks for it
            self.fatal = error
            return
        with self._counting:
            self.done += first and result.state == "done"
            self.failed += first and result.state == "failed"
            self.reused += first and CACHED in result.notes
