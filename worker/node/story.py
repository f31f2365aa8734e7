"""What logs and traces say about a job's shares on this node."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from imagemill.shared.errors import ImagemillError
from imagemill.shared.ledger.leasing import Share, WorkLedger
from imagemill.shared.tracing import Traces, span_id
from imagemill.worker.line.context import Context
from imagemill.worker.line.waits import Waits
from imagemill.worker.node.shares import Held

log = logging.getLogger(__name__)

WHY = {"stop": "the job is paused, cancelled or over", "lost": "the lease was lost"}


class Story:
    """Logs shares as they begin, stop and end."""

    def __init__(self, ledger: WorkLedger, traces: Traces | None, waits: Waits) -> None:
        self._ledger, self._traces, self._waits = ledger, traces, waits

    def begun(self, held: Held) -> None:
        """A share goes into the line."""
        held.waits = self._waits.so_far()
        share, traced = held.share, self._traces.images if self._traces is not None else 0
        for image in held.images[:traced]:
            image.spans = []
        if share.number % 10_000 == 1:
            self._job_begun(share, held.context)
        log.info("share begun", extra={**held.log_fields, "images": len(held.images), "deaths": share.deaths})

    def _job_begun(self, share: Share, context: Context) -> None:
        """A job's first share is handed out: say what it waited for."""
        try:
            status = self._ledger.status(context.job)
        except ImagemillError:  # work goes on without this line
            return
        if round(1000 * (status.starts or 0)) != share.number // 10_000:  # the number after 9999 is 0
            return
        submitted = datetime.fromtimestamp(status.created, UTC).isoformat(timespec="milliseconds")
        fields = dict(submitted=submitted, waited=status.seconds, images=status.total, lane=context.spec.lane)
        log.info("job begun", extra={"action": "job", **context.log_fields, **fields, "priority": status.priority})
        if self._traces is not None:
            due = context.spec.policy.not_before
            waits = max(status.created, due.timestamp() if due else 0.0)
            self._traces.record(context.job, "wait", waits, fields={"lane": context.spec.lane})

    def stopped(self, held: Held, verdict: str) -> None:
        """No more images of a share begin."""
        if not held.context.stop.is_set():
            log.info("share stopped", extra={**held.log_fields, "reason": WHY[verdict]})

    def ended(self, held: Held) -> None:
        """Nothing of a share is left in the line. What the device waited for meanwhile may be due to other shares, too."""
        log.info(
            "share given back" if held.returned else "share done",
            extra={**held.outcome(), "waits": self._waits.since(held.waits)},
        )
        if self._traces is not None:
            job, number = held.share.job, f"{held.share.number}"
            fields = {"share": number, "images": len(held.images), "returned": len(held.returned)}
            self._traces.record(job, "share", held.began, span=span_id(job, number), fields=fields)
