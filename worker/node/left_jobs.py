"""The jobs that a child leaves to others for a while."""

from __future__ import annotations

import logging
import time

from imagemill.shared.ledger.leasing import WAIT_SECONDS, WorkLedger
from imagemill.worker.line.context import Context
from imagemill.worker.node.parts import Lack
from imagemill.worker.node.shares import Jobs

log = logging.getLogger(__name__)

REPEAT_SECONDS = WAIT_SECONDS - 5.0
"""After this time it is said again why a job waits, if it is still there."""
MOST_LACKS = 1000


class LeftJobs:
    """Jobs that need what is not here, or does not respond. For the feeder's thread; others may only call `leave`."""

    def __init__(self, ledger: WorkLedger, jobs: Jobs) -> None:
        self._ledger, self._jobs = ledger, jobs
        self._until: dict[str, float] = {}
        self._lacks: dict[str, tuple[Context, Lack]] = {}

    def __bool__(self) -> bool:
        return bool(self._until)

    def current(self) -> list[str]:
        """The jobs that it leaves now. One that lacked something is taken again as soon as that is there."""
        for job, (context, _) in list(self._lacks.items()):
            if job in self._until and self._jobs.lack(context) is None:
                del self._lacks[job]
                self._until = {other: until for other, until in self._until.items() if other != job}
        now = time.monotonic()
        self._until = {job: until for job, until in self._until.items() if until > now}
        return list(self._until)

    def leave(self, job: str, seconds: float) -> None:
        """Leave a job to others for so long."""
        self._until = {**self._until, job: time.monotonic() + seconds}  # anew, since another thread may read it

    def leave_for(self, lack: Lack, context: Context) -> None:
        """Leave a job to others until what is lacking is here, and say so if they can't work on it, either."""
        if self._lacks.get(context.job, (None, None))[1] != lack:
            fields = {"action": "feed", **context.log_fields, "reason": f"this node {lack.what}: {lack.why}"}
            log.warning("job left to other nodes", extra=fields)
        if len(self._lacks) >= MOST_LACKS:
            self._lacks.clear()
        self._lacks[context.job] = context, lack
        self.leave(context.job, REPEAT_SECONDS)
        reason = self._jobs.why_waiting(context, lack)
        if reason is not None:
            self._ledger.report_wait(context.job, reason)
