"""The ledger as producers use it: submit, cancel and retry jobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from imagemill.shared.connection import now_ms
from imagemill.shared.errors import JobNotFound
from imagemill.shared.ledger.reading import ReadLedger
from imagemill.shared.ledger.scripts import key, pack
from imagemill.shared.messages import Chunk, Item, Job
from imagemill.shared.queues import manifest_queue, queue_name

SUBMITTING_SECONDS = 3600
"""Redis forgets an unsealed job after this, in case its producer died."""


class SubmitLedger(ReadLedger):
    """Writes jobs."""

    scripts = ("seal", "cancel", "retry")

    def open_job(self, job: str, spec: Job) -> None:
        """Start a job. Workers see none of it until `seal`."""
        fields = {
            "spec": spec.model_dump_json(),
            "state": "submitting",
            "queue": queue_name(spec.operation, spec.lane, spec.policy.priority),
            "manifest_queue": manifest_queue(spec.operation, spec.lane),
            "created": now_ms(self._redis),
        }
        self._write(key(job), fields)

    def add_chunks(self, job: str, chunks: Iterable[tuple[int, Sequence[Item]]]) -> None:
        """Write chunks, given as (number, items), in one round trip."""
        self._write(key(job, "chunks"), {number: pack(items) for number, items in chunks})

    def seal(self, job: str, *, chunks: int, total: int, duplicates: dict[int, int]) -> None:
        """Mark the job as complete; from now on its chunks count as published.

        `total` counts rows, duplicates included; `duplicates` maps an item's index to how many
        later rows share its result.
        """
        self._write(key(job, "duplicates"), duplicates)
        if not self._script("seal", job, chunks, total, sum(duplicates.values()), self._ttl):
            raise JobNotFound(f"job {job} took longer than {SUBMITTING_SECONDS} s to submit and was forgotten; submit it again")

    def discard(self, job: str) -> None:
        """Delete a job that was never sealed."""
        self._redis.delete(key(job), key(job, "chunks"), key(job, "duplicates"))

    def cancel(self, job: str) -> Literal["over", "stopping", "stopped"]:
        """Stop what has not started. 'over' if there is nothing to stop; after 'stopped' the manifest is due."""
        self.spec(job)
        answer: Literal["over", "stopping", "stopped"] = ("over", "stopping", "stopped")[self._script("cancel", job)]
        return answer

    def retry(self, job: str) -> list[Chunk]:
        """Forget the failures of an ended job. Returns the chunks to publish, each with the number of images to redo."""
        if not self.status(job).over:
            return []
        chunks = []
        for number, items in self._chunks(job):
            own = [item.index for item in items if item.duplicate_of is None]
            results = self._results(job, own)
            failed = [index for index, result in zip(own, results, strict=True) if result is None or result.state == "failed"]
            if failed:
                self._script("retry", job, number, *failed)
                chunks.append(Chunk(job=job, number=number, images=len(failed)))
        return chunks

    def _write(self, name: str, fields: Mapping[Any, Any]) -> None:
        """Write fields that Redis forgets unless the job is sealed."""
        if fields:
            with self._redis.pipeline() as pipe:
                pipe.hset(name, mapping=fields)
                pipe.expire(name, SUBMITTING_SECONDS)
                pipe.execute()
