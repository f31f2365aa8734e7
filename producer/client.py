"""The Python API: submit, follow, retry and cancel jobs.

from imagemill import Client, Job, Output, load_settings, read_sources

with Client(load_settings()) as client:
    rows = read_sources(["list.csv"], s3=client.s3)
    submission = client.submit(rows, Job(operation="stylize", output=Output(url="s3://results/sketches")))
    client.wait(submission.job)
    for row in client.results(submission.job):
        print(row.source, row.output or row.message)
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Self

from imagemill.producer.sources import BadRow, SourceRow
from imagemill.producer.submission import ListCheck, Submission, chunk_size, new_job_id
from imagemill.shared.errors import BrokerUnavailable, UsageError
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.submitting import SubmitLedger
from imagemill.shared.messages import MANIFEST, Chunk, Item, ItemResult, Job, JobStatus, Node, Row
from imagemill.shared.queues import queue_name
from imagemill.shared.s3 import S3Client, make_client, make_signer, presign
from imagemill.shared.settings import Settings

if TYPE_CHECKING:
    from imagemill.shared.broker import Publisher

__all__ = ["Client", "Submission"]

log = logging.getLogger("imagemill.client")

CHUNKS_PER_WRITE = 64
"""Chunks written to the ledger in one round trip."""


class Client:
    """Submits and follows jobs. Uses Redis, and S3 only for prefixes and links.

    Every method raises BrokerUnavailable if Redis can't be reached, and JobNotFound if the job does not
    exist or has expired. Must not be shared across a fork.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ledger, self._fleet = SubmitLedger.of(settings), Fleet.of(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._ledger.close()
        self._fleet.close()

    def s3(self) -> S3Client:
        """An S3 client for `read_sources`."""
        return make_client(self._settings.s3)

    # --- submitting -------------------------------------------------------------------------

    def submit(self, sources: Iterable[SourceRow | BadRow], spec: Job, *, skip_invalid: bool = False) -> Submission:
        """Queue a job for every image of a list, which is streamed into the ledger.

        Nothing is queued until the last row is checked. If rows are invalid and not skipped, or none is valid,
        InvalidSource is raised with the first 1000 invalid rows in `rows`. A row with the same source, mask, boxes
        and name as an earlier one shares its result. An interrupted list (an error, Ctrl-C) is discarded.
        """
        queue = queue_name(spec.operation, spec.lane, spec.policy.priority)
        listening = [node for node in self._fleet.nodes() if queue in node.queues]
        job, checked = new_job_id(), ListCheck()
        items = checked.accepted(sources, spec, skip_invalid)
        self._ledger.open_job(job, spec)
        try:
            self._write(job, items, checked, self._fleet.rates(queue), sum(node.children for node in listening))
            if not checked.total or (checked.bad_count and not skip_invalid):
                raise checked.error()
            self._ledger.seal(job, chunks=len(checked.images), total=checked.total, duplicates=checked.duplicates)
        except BaseException:
            self._discard(job)
            raise
        chunks = (Chunk(job=job, number=number, images=images) for number, images in enumerate(checked.images))
        self._publish(job, chunks, spec)
        return Submission(
            job=job,
            total=checked.total,
            chunks=len(checked.images),
            duplicates=sum(checked.duplicates.values()),
            invalid=checked.bad,
            invalid_count=checked.bad_count,
            nodes=len(listening),
        )

    def _write(self, job: str, items: Iterator[Item], checked: ListCheck, rates: list[float], workers: int) -> None:
        """Write the list's items to the ledger, in chunks."""
        size = chunk_size(None, rates, workers)
        enough = workers * size  # a full chunk for every worker; only a shorter list must be cut by its length
        head = list(islice(items, enough))
        size = chunk_size(len(head) if len(head) < enough else None, rates, workers)
        rest = chain(head, items)
        chunks = enumerate(iter(lambda: list(islice(rest, size)), []))
        while batch := list(islice(chunks, CHUNKS_PER_WRITE)):
            checked.images += [sum(item.duplicate_of is None for item in chunk) for _, chunk in batch]
            self._ledger.add_chunks(job, batch)

    def _discard(self, job: str) -> None:
        """Discard an unfinished list."""
        try:
            self._ledger.discard(job)
        except BrokerUnavailable as error:
            extra = {"action": "discard", "job": job, "error": str(error)}
            log.warning("unfinished list not discarded; it will expire", extra=extra)

    def _publish(self, job: str, chunks: Iterable[Chunk], spec: Job) -> None:
        """Publish chunks that are in the ledger. If that fails, the workers' reaper publishes them later."""
        try:
            self._publisher.publish((chunk, spec) for chunk in chunks)
        except BrokerUnavailable as error:
            extra = {"action": "publish", "job": job, "error": str(error)}
            log.warning("job recorded but not published; a worker will publish it", extra=extra)

    # --- following --------------------------------------------------------------------------

    def status(self, job: str) -> JobStatus:
        """A job's state and counts."""
        return self._ledger.status(job)

    def spec(self, job: str) -> Job:
        """A job as it was submitted."""
        return self._ledger.spec(job)

    def jobs(self) -> list[JobStatus]:
        """The latest jobs, newest first."""
        return self._ledger.jobs()

    def nodes(self) -> list[Node]:
        """The running worker nodes."""
        return self._fleet.nodes()

    def memory(self) -> dict[str, tuple[float, int]]:
        """Each recently active GPU node's peak share of memory in use, and its number of batches that exceeded 90 %."""
        return self._fleet.memory()

    def unserved(self, jobs: Iterable[JobStatus]) -> set[str]:
        """The ids of unfinished jobs that no running node can take."""
        offered = {queue for node in self.nodes() for queue in node.queues}
        wanted = {job.job: queue_name(job.operation, job.lane, job.priority) for job in jobs if not job.over}
        return {job for job, queue in wanted.items() if queue not in offered}

    def results(self, job: str) -> Iterator[Row]:
        """Stream every image of a job with its result so far, in the list's order."""
        return self._ledger.rows(job)

    def watch(self, job: str, *, every: float = 1.0) -> Iterator[tuple[JobStatus, list[ItemResult]]]:
        """A job's status with new results: immediately, when results arrive, and at least every `every` seconds.

        Ends when the job is over and all results have been yielded; the last status is final. After a retry,
        an image's new result may be yielded more than once, but the counts in the status are always correct.
        """
        place, over, wait = "0", False, 0.0
        while True:
            before = place
            place, results = self._ledger.follow(job, since=before, wait=wait)
            if over and place == before:
                return
            status = self._ledger.status(job)
            yield status, results
            over = status.over
            wait = 0.0 if over else every

    def wait(self, job: str, timeout: float | None = None) -> JobStatus:
        """Wait until the job is over or `timeout` seconds have passed, and return its status."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        for status, _ in self.watch(job, every=1.0 if timeout is None else min(1.0, max(0.05, timeout))):
            if status.over or time.monotonic() >= deadline:
                break
        return status

    # --- changing ---------------------------------------------------------------------------

    def retry(self, job: str) -> int:
        """Queue the failed and cancelled images of a finished job again; returns their number.

        Raises UsageError if the job is not over.
        """
        status = self._ledger.status(job)
        if not status.over:
            raise UsageError(f"job {job} is still {status.state}; only finished jobs can be retried")
        chunks = self._ledger.retry(job)
        self._publish(job, chunks, self._ledger.spec(job))
        return sum(chunk.images for chunk in chunks)

    def cancel(self, job: str) -> JobStatus:
        """Cancel a job. Workers stop within seconds; images already being processed may still finish."""
        if self._ledger.cancel(job) == "stopped":
            self._publish(job, [Chunk(job=job, number=MANIFEST, images=0)], self._ledger.spec(job))
        return self._ledger.status(job)

    def link(self, row: Row, seconds: int) -> str:
        """A public link to a result in S3, valid for `seconds` (at most seven days); for a file, its URL.

        Raises UsageError if the image has no result.
        """
        if row.output is None:
            raise UsageError(f"image {row.item} has no result: it is {row.state}")
        return presign(self._signer, row.output, seconds) if row.output.startswith("s3://") else row.output

    # --- created on first use ---------------------------------------------------------------

    @cached_property
    def _publisher(self) -> Publisher:
        from imagemill.shared.broker import Publisher, make_app  # importing Celery takes longer than most commands run

        return Publisher(make_app(self._settings))

    @cached_property
    def _signer(self) -> Any:
        return make_signer(self._settings.s3)
