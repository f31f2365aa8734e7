"""Renews the lease of the current chunk, and signals when to stop working on it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Event, Thread
from types import TracebackType
from typing import Literal

from imagemill.shared.errors import ServiceUnavailable
from imagemill.shared.ledger.leasing import Lease, WorkLedger

log = logging.getLogger(__name__)
Reason = Literal["cancelled", "lost", "stopping"]

RENEWAL_SECONDS = 1.0
"""Interval between renewals, and so the delay until workers notice that a job is cancelled."""


class LeaseKeeper:
    """Context manager that renews a lease in a background thread, and calls `tell` after each renewal.

    Sets `reason`, then `stop`, when the job is cancelled, the lease is lost, or this node is `stopping`.
    """

    def __init__(
        self,
        ledger: WorkLedger,
        lease: Lease,
        *,
        lease_seconds: float,
        stop: Event,
        stopping: Callable[[], bool],
        tell: Callable[[], None],
    ) -> None:
        self.reason: Reason | None = None
        self._ledger, self._lease, self._lease_seconds = ledger, lease, lease_seconds
        self._stop, self._stopping, self._tell = stop, stopping, tell
        self._finished = Event()
        self._thread = Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> LeaseKeeper:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finished.set()
        self._thread.join()

    def _keep(self) -> None:
        renewed = time.monotonic()
        while not self._finished.wait(RENEWAL_SECONDS):
            try:
                answer = self._ledger.renew(self._lease)
            except ServiceUnavailable as error:
                log.warning("lease not renewed", extra={"action": "renew", "job": self._lease.job, "reason": error.message})
                answer = "ok" if time.monotonic() - renewed < self._lease_seconds else "lost"
            else:
                renewed = time.monotonic()
                self._tell()  # only while Redis responds: otherwise it would block, and the lease could expire meanwhile
            reason: Reason | None = "stopping" if self._stopping() else None
            if answer != "ok":
                reason = answer
            if reason is not None:
                self.reason = reason
                self._stop.set()
                if reason != "stopping":
                    return
