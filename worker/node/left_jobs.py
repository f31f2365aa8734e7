"""The jobs that a child leaves to others for a while."""

from __future__ import annotations

import logging
import time

from imagemill.shared.errors import JobNotFound, JobUnreadable
from imagemill.shared.ledger.leasing import WAIT_SECONDS, WorkLedger
from imagemill.worker.line.context import Context
from imagemill.worker.node.parts import Lack
from imagemill.worker.node.shares import Jobs

log = logging.getLogger(__name__)

REPEAT_SECONDS = WAIT_SECONDS - 5.0
"""After this time it is said again why a job waits, if it is still there."""
ACTIVE = ("queued", "running", "paused")


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
        now = time.monotonic()
        over = [job for job, until in self._until.items() if until <= now and not self._still_lacks(job)]
        for job, (context, known) in list(self._lacks.items()):
            lack = self._jobs.lack(context)
            if lack is None:
                self._ledger.end_wait(job)
                over.append(job)
            elif lack != known:
                self.leave_for(lack, context)
        for job in over:
            self._lacks.pop(job, None)
        self._until = {job: until for job, until in self._until.items() if job not in over}
        return list(self._until)

    def leave(self, job: str, seconds: float) -> None:
        """Leave a job to others for so long."""
        self._until = {**self._until, job: time.monotonic() + seconds}  # anew, since another thread may read it

    def leave_for(self, lack: Lack, context: Context) -> None:
        """Leave a job to others until what is lacking is here, and say so if they can't work on it, either."""
        fields = {"action": "feed", **context.log_fields, "reason": f"this node {lack.what}: {lack.why}"}
        log.warning("job left to other nodes", extra=fields)
        self._lacks[context.job] = context, lack
        self._still_lacks(context.job)

    def _still_lacks(self, job: str) -> bool:
        """Say again why a job waits; False if it lacks nothing, or nothing of it is to be done any more but its manifest."""
        if job not in self._lacks:
            return False
        try:
            return self._report(*self._lacks[job])
        except (JobNotFound, JobUnreadable):
            return False

    def _report(self, context: Context, lack: Lack) -> bool:
        status = self._ledger.status(context.job)
        reason = None if status.running else self._jobs.why_waiting(context, lack)
        if reason is not None and status.state in ACTIVE:
            self._ledger.report_wait(context.job, reason)
        self.leave(context.job, REPEAT_SECONDS)
        return status.state in ACTIVE
