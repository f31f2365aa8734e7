"""Writes records into the ledger: all that gathered while the last ones were being written, in one call."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Condition, Event, Thread

from imagemill.shared.errors import ServiceUnavailable
from imagemill.shared.ledger.leasing import Record, Recorded, WorkLedger
from imagemill.worker.line.cache import Cache

log = logging.getLogger(__name__)

MOST = 64
"""Records in one call. Redis does nothing else meanwhile, which takes it less than a millisecond."""
INTERVAL = 0.02
"""Seconds between calls while records keep coming: each costs as much as a dozen records. A lone one is written at once."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between attempts while Redis does not take a record."""


@dataclass(eq=False)
class Entry:
    """A record to be written, after what `cache` still has to save. `stop` is set if nothing more of its job should be begun.

    `written` is called once: with whether it is the first record of its image, or with None if a bug prevented it.
    """

    record: Record
    stop: Event
    written: Callable[[bool | None], object]
    cache: Cache | None = None


class Recorder:
    """Writes records in its own thread, which starts with the first one. Thread-safe.

    While Redis is away, records wait: the results exist, and must not be computed twice. `failed` is called, in that thread, if
    something else goes wrong: a bug.
    """

    def __init__(self, ledger: WorkLedger, failed: Callable[[BaseException], object]) -> None:
        self._ledger, self._failed = ledger, failed
        self._waiting: deque[Entry] = deque()
        self._changed, self._closed = Condition(), Event()
        self._thread: Thread | None = None

    def add(self, entry: Entry) -> None:
        """Write a record as soon as possible."""
        with self._changed:
            self._waiting.append(entry)
            if self._thread is None:
                self._closed.clear()
                self._thread = Thread(target=self._serve, name="recorder", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, seconds: float) -> bool:
        """Write what waits, and end the thread; False if that takes longer than this."""
        with self._changed:
            thread = self._thread
            self._closed.set()
            self._changed.notify()
        if thread is not None:
            thread.join(seconds)
        return thread is None or not thread.is_alive()

    def _serve(self) -> None:
        while batch := self._gathered():
            begun = time.monotonic()
            self._write(batch)
            if len(batch) < MOST:
                self._closed.wait(max(0.0, begun + INTERVAL - time.monotonic()))

    def _gathered(self) -> list[Entry]:
        """All that waits; nothing once this is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed.is_set())
            if not self._waiting:
                self._thread = None
            return [self._waiting.popleft() for _ in range(min(MOST, len(self._waiting)))]

    def _write(self, batch: Sequence[Entry]) -> None:
        try:
            for cache in {entry.cache for entry in batch if entry.cache is not None}:
                cache.flush()
            answers: Sequence[Recorded | None] = self._record([entry.record for entry in batch])
        except Exception as error:  # noqa: BLE001  # a bug
            self._failed(error)
            answers = [None] * len(batch)
        for entry, answer in zip(batch, answers, strict=True):
            if answer is not None and answer.stop:
                entry.stop.set()
            try:
                entry.written(answer.first if answer is not None else None)
            except Exception as error:  # noqa: BLE001  # a bug
                self._failed(error)

    def _record(self, records: Sequence[Record]) -> Sequence[Recorded]:
        """Waits for Redis."""
        pause = FIRST_PAUSE
        while True:
            try:
                return self._ledger.record_all(records)
            except ServiceUnavailable as error:
                log.warning("records postponed", extra={"action": "record", "images": len(records), "reason": error.message})
                time.sleep(pause)
                pause = min(LONGEST_PAUSE, 2 * pause)
