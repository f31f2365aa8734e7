"""What became of each image: one record in the ledger, and a tally."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from threading import Lock
from typing import Any

from imagemill.shared.errors import InternalError, WorkerLost
from imagemill.shared.ledger.leasing import Record, WorkLedger
from imagemill.shared.log_fields import working_on
from imagemill.shared.messages import ItemResult
from imagemill.shared.tracing import Traces, span_id
from imagemill.worker.line.image import Failed, ImageInFlight, Outcome, Stored
from imagemill.worker.line.meter import Meter
from imagemill.worker.line.recorder import Entry, Recorder

log = logging.getLogger(__name__)

MOST_JOBS = 5
"""Jobs that a tally names."""
MOST_CODES = 5
"""Error codes that a tally names, of each job."""
MOST_LINES, LINES_PER_SECOND = 100, 5
"""Failures that a process logs at once, and in the long run."""


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
    """Writes the records of images, and counts those that were first in `tally`, which the caller may replace.

    `on_error` is called, in any thread, with an error that can't be recorded: a bug.
    """

    def __init__(self, ledger: WorkLedger, node: str, meter: Meter | None = None, traces: Traces | None = None) -> None:
        self._node, self._traces = node, traces
        self.meter = meter or Meter()
        self.on_error: Callable[[BaseException], object] = _log_error
        self._recorder = Recorder(ledger, self._failed)
        self._lock, self._lines, self._refilled = Lock(), float(MOST_LINES), time.monotonic()
        self.tally = Tally()

    def record(self, image: ImageInFlight, outcome: Outcome, done: Callable[[ImageInFlight], object]) -> None:
        """Record an image that is stored or has failed; one that was not begun stays open.

        `done` is called once, whatever happens: in a thread of ours when the record is written, or at once if there is none.
        What can't be recorded, because of a bug or of text that is not valid UTF-8, is recorded as a failure.
        """
        if not isinstance(outcome, Stored | Failed):
            done(image)
            return
        try:
            result, record = self._record(image, outcome)
        except Exception as error:  # noqa: BLE001  # a bug
            self._failed(error)
            done(image)
            return
        image.drop_pixels()  # the record may have to wait for Redis

        def written(first: bool | None) -> None:
            try:
                if first is not None:
                    self._written(image, outcome, result, first=first)
            finally:
                done(image)

        self._recorder.add(Entry(record, image.context.stop, written, image.context.cache))

    def close(self, seconds: float) -> bool:
        """Write what waits, and end the thread; False if that takes longer than this."""
        return self._recorder.close(seconds)

    def _failed(self, error: BaseException) -> None:
        self.on_error(error)

    def _record(self, image: ImageInFlight, outcome: Stored | Failed) -> tuple[ItemResult, Record]:
        job = image.context.job
        try:
            result = self._result(image, outcome)
            return result, Record.of(job, result)
        except ValueError as error:  # pydantic's and those of encoding
            with working_on(**image.log_fields):
                log.exception("result can't be recorded", extra={"action": "record"})
            failure = Failed(InternalError(f"the result can't be recorded: {type(error).__name__}"))
            result = ItemResult(index=image.item.index, attempts=image.earlier + 1, node=self._node, **_fields(failure))
            return result, Record.of(job, result)

    def _written(self, image: ImageInFlight, outcome: Stored | Failed, result: ItemResult, *, first: bool) -> None:
        """The image has a record; if this is its `first`, it counts."""
        image.recorded = True
        if first:
            how = outcome.how if isinstance(outcome, Stored) and result.code is None else "failed"
            self.tally.count(result, image.context.job, reused=how == "reused")
            self.meter.recorded(image.context.spec.operation, result, how)
            if result.code is not None:
                image.code = result.code
                with working_on(**image.log_fields):
                    self._log_failure(image, result)
        if self._traces is not None and image.spans:
            self._trace(self._traces, image, result)

    def _trace(self, traces: Traces, image: ImageInFlight, result: ItemResult) -> None:
        """A span for the image, within that of its share, and one for each stage."""
        job, stages = image.context.job, image.spans or []
        fields = {"item": image.item.id, "code": result.code, "batch": result.batch}
        share = span_id(job, image.share)
        parent = traces.record(job, "image", stages[0][1], parent=share, error=result.code, fields=fields)
        for stage, start, end in stages:
            traces.record(job, stage, start, end, parent=parent)

    def _log_failure(self, image: ImageInFlight, result: ItemResult) -> None:
        """One line per image, but not so many that a bad list fills the disk; the share's line counts them all."""
        now = time.monotonic()
        with self._lock:
            self._lines = min(MOST_LINES, self._lines + (now - self._refilled) * LINES_PER_SECOND) - 1
            self._refilled, silent = now, self._lines < 0
            self._lines = max(0.0, self._lines)
        if not silent:
            fields = dict(action="record", item=image.item.id, code=result.code, reason=result.message)
            log.warning("image failed", extra={**fields, "attempts": result.attempts, "retryable": result.retryable})

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


def _log_error(error: BaseException) -> None:
    log.error("recording failed", exc_info=error, extra={"action": "record"})


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
        filled=outcome.filled,
    )
