"""What became of each image: one record in the ledger, and a tally."""

from __future__ import annotations

import logging
import time
from collections import Counter
from threading import Lock
from typing import Any

from imagemill.shared.errors import InternalError, ServiceUnavailable, WorkerLost
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.messages import ItemResult
from imagemill.worker.line.context import Context
from imagemill.worker.line.image import Failed, ImageInFlight, Outcome, Stored

log = logging.getLogger(__name__)

LONGEST_PAUSE = 5.0
MOST_JOBS = 5
"""Jobs that a tally names."""
MOST_CODES = 5
"""Error codes that a tally names, of each job."""


class Tally:
    """How many images were recorded, by what became of them. Thread-safe.

    `reused` counts the `done` images that were copied from earlier results; `jobs` holds a tally of each job.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self.done = self.reused = 0
        self.codes: Counter[str] = Counter()
        self.jobs: dict[str, Tally] = {}

    def count(self, result: ItemResult, job: str, *, reused: bool) -> None:
        """Count an image that has been recorded."""
        with self._lock:
            self._add(result, reused=reused)
            self.jobs.setdefault(job, Tally())._add(result, reused=reused)

    def _add(self, result: ItemResult, *, reused: bool) -> None:
        if result.code is not None:
            self.codes[result.code] += 1
        else:
            self.done, self.reused = self.done + 1, self.reused + reused

    @property
    def failed(self) -> int:
        return self.codes.total()

    def __str__(self) -> str:
        """`160 done, 3 failed (not_found 2, timeout 1)`."""
        if not self.failed:
            return f"{self.done} done"
        named = self.codes.most_common(MOST_CODES)
        others = self.failed - sum(count for _, count in named)
        codes = ", ".join(f"{code} {count}" for code, count in [*named, *([("others", others)] if others else [])])
        return f"{self.done} done, {self.failed} failed ({codes})"

    def ranked(self) -> list[str]:
        """The jobs, those with most failures first."""
        with self._lock:
            return sorted(self.jobs, key=lambda job: (-self.jobs[job].failed, -self.jobs[job].done, job))

    def by_job(self) -> str:
        """`spring: 160 done, 3 failed (not_found 2, timeout 1); autumn: 12 done`."""
        ranked = self.ranked()
        parts = [f"{job}: {self.jobs[job]}" for job in ranked[:MOST_JOBS]]
        if others := len(ranked) - len(parts):
            parts.append(f"and {others} more job{'s' if others > 1 else ''}; in all {self.done} done, {self.failed} failed")
        return "; ".join(parts) or str(self)


class Records:
    """Writes the records of images, and counts those that were first in `tally`, which the caller may replace."""

    def __init__(self, ledger: WorkLedger, node: str) -> None:
        self._ledger, self._node = ledger, node
        self.tally = Tally()

    def record(self, image: ImageInFlight, outcome: Outcome) -> None:
        """Record an image that is stored or has failed; one that was not begun stays open.

        What can't be recorded, because of a bug or of text that is no valid UTF-8, is recorded as a failure.
        """
        if not isinstance(outcome, Stored | Failed):
            return
        try:
            result = self._result(image, outcome)
            first = self._write(image.context, result)
        except ValueError as error:  # pydantic's and those of encoding
            log.exception("result can't be recorded", extra={"action": "record", "job": image.context.job})
            failure = Failed(InternalError(f"the result can't be recorded: {type(error).__name__}"))
            result = ItemResult(index=image.item.index, attempts=image.earlier + 1, node=self._node, **_fields(failure))
            first = self._write(image.context, result)
        if first:
            self.tally.count(result, image.context.job, reused=isinstance(outcome, Stored) and outcome.how == "reused")
        image.recorded = True

    def _result(self, image: ImageInFlight, outcome: Stored | Failed) -> ItemResult:
        fields = _fields(outcome)
        if isinstance(outcome, Failed):
            error = outcome.error
            image.tries = 0 if isinstance(error, WorkerLost) else max(1, image.tries, error.tries)
            fields["notes"] = image.notes
        return ItemResult(
            index=image.item.index,
            attempts=image.earlier + image.tries,
            batch=image.batch,
            seconds=image.seconds,
            node=self._node,
            **image.source,
            **fields,
        )

    def _write(self, context: Context, result: ItemResult) -> bool:
        """Whether this was the image's first record. Waits for Redis: the result exists, and must not be computed twice."""
        pause = 0.1
        while True:
            try:
                return self._ledger.record(context.job, result, context.stop)
            except ServiceUnavailable as error:
                log.warning("record postponed", extra={"action": "record", "job": context.job, "reason": error.message})
                time.sleep(pause)
                pause = min(LONGEST_PAUSE, 2 * pause)


def _fields(outcome: Stored | Failed) -> dict[str, Any]:
    """What the record says of an outcome."""
    if isinstance(outcome, Failed):
        error = outcome.error
        return dict(state="failed", code=error.code, message=error.message, retryable=error.retryable)
    return dict(
        state="done",
        output=outcome.output,
        output_bytes=outcome.bytes,
        output_size=outcome.size,
        notes=outcome.notes,
        quality=outcome.measures,
    )
