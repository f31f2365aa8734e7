"""Renews the lease of the current chunk, and signals when to stop working on it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Thread
from typing import Literal

from imagemill.shared.errors import ServiceUnavailable
from imagemill.shared.ledger.leasing import Lease, WorkLedger

log = logging.getLogger(__name__)
Reason = Literal["cancelled", "lost", "stopping"]

RENEWAL_SECONDS = 1.0
"""Interval between renewals, and so the delay until workers notice that a job is cancelled."""


@dataclass
class LeaseKeeper:
    """Context manager that renews a lease in a background thread, and calls `tell` after each renewal.

    Sets `reason`, then `stop`, when the job is cancelled, the lease is lost, or this node is `stopping`.
    """

    ledger: WorkLedger
    lease: Lease
    lease_seconds: float
    stop: Event
    stopping: Callable[[], bool]
    tell: Callable[[], None]
    reason: Reason | None = None

    def __enter__(self) -> LeaseKeeper:
        self._finished = Event()
        self._thread = Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished.set()
        self._thread.join()

    def _keep(self) -> None:
        renewed = time.monotonic()
        while not self._finished.wait(RENEWAL_SECONDS):
            try:
                answer = self.ledger.renew(self.lease)
            except ServiceUnavailable as error:
                log.warning("lease not renewed", extra={"action": "renew", "job": self.lease.job, "reason": error.message})
                answer = "ok" if time.monotonic() - renewed < self.lease_seconds else "lost"
            else:
                renewed = time.monotonic()
                self.tell()  # only while Redis responds: otherwise it would block, and the lease could expire meanwhile
            if answer != "ok" or self.stopping():
                self.reason = "stopping" if answer == "ok" else answer
                self.stop.set()
            if answer != "ok":
                return
