"""What the ledger's order means for a job: its position, why it waits, and when it will begin and end."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

from imagemill.shared.forecast import Turn
from imagemill.shared.messages import JobStatus


def explained(
    job: JobStatus, turns: Mapping[str, Turn], speed: float, lanes: Collection[str], faults: Mapping[str, str] = {}
) -> JobStatus:
    """The status with position, reason and forecast.

    `turns` and `speed` (images per second, 0 if unknown) are those of the job's lane; `lanes` are those that nodes offer, and
    `faults` say why others are out of service.
    """
    if job.state not in ("queued", "running", "paused"):
        return job
    turn = turns.get(job.job)
    changes: dict[str, object] = {"why": job.why or _why(job, turn, lanes, faults)}
    if turn is not None:
        changes |= {"position": turn.position, "ahead": max(0, round(turn.ends) - job.waiting)}
    if job.starts is None and job.not_before is not None:
        changes["starts"] = job.not_before
    stands = turn is None and job.waiting > 0  # paused or not yet due
    if speed > 0 and job.lane in lanes and not stands:
        now, begins, ends = time.time(), turn.begins if turn else 0.0, turn.ends if turn else 0.0
        changes["ends"] = now + (ends + job.running) / speed
        if job.starts is None:
            changes["starts"] = now + begins / speed
    return job.model_copy(update=changes)


def _why(job: JobStatus, turn: Turn | None, lanes: Collection[str], faults: Mapping[str, str]) -> str | None:
    if job.lane not in lanes:
        return f"no node offers {job.lane}{faults.get(job.lane, '')}"
    if turn is None or job.running:
        return None
    if turn.begins < 1:
        return "next in line"
    low = "low priority, " if job.priority == "low" else ""
    return f"{low}behind {round(turn.begins):,} images of other jobs"
