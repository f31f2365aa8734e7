"""The ledger as producers use it: submit, steer, cancel and retry jobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from imagemill.shared.connection import now_ms
from imagemill.shared.errors import JobNotFound
from imagemill.shared.ledger.reading import ReadLedger
from imagemill.shared.ledger.scripts import key, pack
from imagemill.shared.messages import Item, Job, Priority

SUBMITTING_SECONDS = 3600
"""Redis forgets an unsealed job after this, in case its producer died."""


class SubmitLedger(ReadLedger):
    """Writes jobs."""

    scripts = (*ReadLedger.scripts, "seal", "cancel", "pause", "prioritize", "retry", "reopen")

    def open_job(self, job: str, spec: Job) -> None:
        """Start a job. Workers see none of it until `seal`."""
        fields = {
            "spec": spec.model_dump_json(),
            "state": "submitting",
            "lane": spec.lane,
            "priority": spec.policy.priority,
            "owner": spec.policy.owner or f"~{job}",  # no name may start with ~
            "created": now_ms(self._redis),
        }
        self._write(key(job), fields)

    def add_packs(self, job: str, packs: Iterable[tuple[int, Sequence[Item]]]) -> None:
        """Write packs, given as (number, items), in one round trip. Pack n holds the items with an index from n * PACK on."""
        self._write(key(job, "packs"), {number: pack(items) for number, items in packs})

    def seal(self, job: str, *, size: int, total: int, duplicates: Mapping[int, int]) -> None:
        """Mark the job as complete; from now on its images are handed out.

        `size` is the highest index + 1; `total` counts rows, duplicates included; `duplicates` maps an item's index to how many
        later rows share its result.
        """
        self._write(key(job, "duplicates"), duplicates)
        policy = self.spec(job).policy
        times = _ms(policy.not_before), _ms(policy.until), self._rise_ms
        if not self._script("seal", job, size, total, sum(duplicates.values()), self._ttl, *times):
            raise JobNotFound(f"job {job} took longer than {SUBMITTING_SECONDS} s to submit and was forgotten; submit it again")

    def discard(self, job: str) -> None:
        """Delete a job that was never sealed."""
        self._redis.delete(key(job), key(job, "packs"), key(job, "duplicates"))

    def cancel(self, job: str) -> bool:
        """Hand out nothing more of a job; it is over as soon as nothing of it runs. False if there is nothing to cancel."""
        self.spec(job)
        return bool(self._script("cancel", job))

    def pause(self, job: str) -> bool:
        """Hand out nothing of a job until `resume`. False if it is over."""
        self.spec(job)
        return bool(self._script("pause", job, 1))

    def resume(self, job: str) -> bool:
        """End a pause. False if the job is over."""
        self.spec(job)
        return bool(self._script("pause", job, 0))

    def prioritize(self, job: str, priority: Priority) -> bool:
        """Move a job to another priority. False if it is over."""
        self.spec(job)
        return bool(self._script("prioritize", job, priority, self._rise_ms))

    def retry(self, job: str) -> int:
        """Forget the failures of an ended job and put it back in line; returns the number of images to redo."""
        if not self.status(job).over:
            return 0
        for items in self._lists(job):
            own = [item.index for item in items if item.duplicate_of is None]
            results = zip(own, self._results(job, own), strict=True)
            failed = [index for index, result in results if result is not None and result.state == "failed"]
            if failed:
                self._script("retry", job, *failed)
        return int(self._script("reopen", job, self._rise_ms))

    def _write(self, name: str, fields: Mapping[Any, Any]) -> None:
        """Write fields that Redis forgets unless the job is sealed."""
        if fields:
            with self._redis.pipeline() as pipe:
                pipe.hset(name, mapping=fields)
                pipe.expire(name, SUBMITTING_SECONDS)
                pipe.execute()


def _ms(time: datetime | None) -> int:
    return int(time.timestamp() * 1000) if time else 0
