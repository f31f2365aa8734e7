"""imagemill for Python programs: submit, follow, retry and cancel jobs.

with Client(load_settings()) as client:
    rows = read_sources(["list.csv"], s3=client.s3)
    submission = client.submit(rows, Job(operation="stylize", output=Output(url="s3://results/sketches")))
    client.wait(submission.job)
    for row in client.results(submission.job): ...
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Self

from imagemill.producer.sources import BadRow, SourceRow, parse, refused
from imagemill.shared.errors import BrokerUnavailable, InvalidSource, UsageError
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.submitting import SubmitLedger
from imagemill.shared.messages import MANIFEST, Chunk, Item, ItemResult, Job, JobStatus, Node, Row
from imagemill.shared.options.inpaint import InpaintOptions
from imagemill.shared.queues import queue_name
from imagemill.shared.s3 import S3Client, make_client, make_signer, presign
from imagemill.shared.settings import Settings

if TYPE_CHECKING:
    from imagemill.shared.broker import Publisher

log = logging.getLogger("imagemill.client")

CHUNK_SECONDS = 20.0
"""Seconds of one worker's work in a chunk."""
UNKNOWN, SMALLEST, LARGEST = 32, 8, 256
"""Images in a chunk: while no rate is known, and the limits."""
CHUNKS_AT_A_TIME = 64
"""Chunks written to the ledger in one round trip."""
MOST_BAD_ROWS = 1000
"""Bad rows that are kept to be shown; all are counted."""


@dataclass(frozen=True)
class Submission:
    """A job as it was queued. `total` counts the accepted rows, `duplicates` those of them that share another's result."""

    job: str
    total: int
    chunks: int
    duplicates: int
    invalid: list[BadRow]
    """The first of the rows that were left out."""
    invalid_count: int
    nodes: int
    """Live worker nodes that take from this job's queue."""

    @property
    def served(self) -> bool:
        """Whether anybody is there to work on it now; otherwise it waits for a node."""
        return self.nodes > 0


def chunk_size(images: int | None, rates: list[float], nodes: int) -> int:
    """How many images one message holds: about 20 s of one worker's work, from 8 to 256.

    `rates` are images per second as workers on this queue measured them; 32 while there are none.
    A job of `images`, if that is known, is cut so that each of the `nodes` that could work on it gets a share.
    """
    known = sorted(rate for rate in rates if rate > 0 and math.isfinite(rate))
    size = max(SMALLEST, round(min(LARGEST, CHUNK_SECONDS * known[len(known) // 2]))) if known else UNKNOWN
    if images is None or nodes < 1:
        return size
    return max(1, min(size, math.ceil(images / nodes)))


@dataclass
class _List:
    """What is known of a list while it streams in."""

    rows: int = 0
    """Rows so far, bad ones too: the next one's index."""
    total: int = 0
    bad: list[BadRow] = field(default_factory=list)
    bad_count: int = 0
    first: dict[int, int] = field(default_factory=dict)
    """64 bits of an item's digest -> index of the first such item."""
    duplicates: dict[int, int] = field(default_factory=dict)
    images: list[int] = field(default_factory=list)
    """Images to work on, per chunk."""

    def accepted(self, sources: Iterable[SourceRow | BadRow], spec: Job, skip_invalid: bool) -> Iterator[Item]:
        """The items of the good rows; after a bad one, unless `skip_invalid`, the list is only read on to count them."""
        for row in sources:
            item = self._accept(row, spec)
            if item is not None and (skip_invalid or not self.bad_count):
                yield item

    def _accept(self, row: SourceRow | BadRow, spec: Job) -> Item | None:
        """The row's item, or None where the row is bad."""
        index, self.rows = self.rows, self.rows + 1
        if isinstance(row, BadRow):
            self._refuse(row)
            return None
        try:
            item = parse(row, index)
        except InvalidSource as error:
            self._refuse(refused(row, error.message))
            return None
        if isinstance(spec.options, InpaintOptions) and not (
            item.mask or item.boxes or spec.options.mask or spec.options.boxes
        ):
            self._refuse(refused(row, "needs a mask or boxes, its own or the job's"))
            return None
        self.total += 1
        original = self.first.setdefault(int(item.digest[:16], 16), index)
        if original == index:
            return item
        self.duplicates[original] = self.duplicates.get(original, 0) + 1
        return item.model_copy(update={"duplicate_of": original})

    def _refuse(self, row: BadRow) -> None:
        self.bad_count += 1
        if len(self.bad) < MOST_BAD_ROWS:
            self.bad.append(row)

    def error(self) -> InvalidSource:
        """Why nothing was queued."""
        if not self.bad_count:
            return InvalidSource("the list has no images")
        places = "; ".join(f"{row.place}: {row.reason}" for row in self.bad[:3])
        more = f"; and {self.bad_count - 3:,} more" if self.bad_count > 3 else ""
        rows = "1 row" if self.bad_count == 1 else f"{self.bad_count:,} rows"
        return InvalidSource(f"{rows} can't be used, and nothing was queued: {places}{more}", self.bad)


class Client:
    """Submits jobs and follows them; talks to Redis only, and to S3 for prefixes and links.

    Every method raises BrokerUnavailable when Redis can't be reached, and JobNotFound for a job
    that does not exist or has expired. Not to be shared across a fork.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ledger, self._fleet = SubmitLedger.of(settings), Fleet.of(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._ledger.close()
        self._fleet.close()

    def s3(self) -> S3Client:
        """The S3 client, made at the first call; for `read_sources`."""
        return self._s3

    # --- submitting -------------------------------------------------------------------------

    def submit(self, sources: Iterable[SourceRow | BadRow], spec: Job, *, skip_invalid: bool = False) -> Submission:
        """Queue a job on every image of a list, which is streamed into the ledger.

        Nothing is queued before the last row is checked: with bad rows, unless `skip_invalid`, or
        with no good one, it raises InvalidSource with the first 1000 bad rows in `rows`. A row that
        repeats another's source, mask, boxes and name shares its result. A list that breaks off
        (an error, Ctrl-C) leaves nothing behind.
        """
        queue = queue_name(spec.operation, spec.lane, spec.policy.priority)
        listening = [node for node in self._fleet.nodes() if queue in node.queues]
        job = new_job_id()
        self._ledger.open_job(job, spec)
        with self._discarding(job):
            workers = sum(node.children for node in listening)
            seen = self._write(job, sources, spec, skip_invalid, self._fleet.rates(queue), workers)
            if not seen.total or (seen.bad_count and not skip_invalid):
                raise seen.error()
            self._ledger.seal(job, chunks=len(seen.images), total=seen.total, duplicates=seen.duplicates)
        chunks = (Chunk(job=job, number=number, images=images) for number, images in enumerate(seen.images))
        self._publish(job, chunks, spec)
        return Submission(
            job=job,
            total=seen.total,
            chunks=len(seen.images),
            duplicates=sum(seen.duplicates.values()),
            invalid=seen.bad,
            invalid_count=seen.bad_count,
            nodes=len(listening),
        )

    def _write(
        self,
        job: str,
        sources: Iterable[SourceRow | BadRow],
        spec: Job,
        skip_invalid: bool,
        rates: list[float],
        workers: int,
    ) -> _List:
        """Write the list's items to the ledger, in chunks."""
        seen = _List()
        items = seen.accepted(sources, spec, skip_invalid)
        size = chunk_size(None, rates, workers)
        enough = workers * size  # for a whole chunk each; of a shorter list it is worth to know the length
        head = list(islice(items, enough))
        size = chunk_size(len(head) if len(head) < enough else None, rates, workers)
        rest = chain(head, items)
        written: list[tuple[int, list[Item]]] = []
        while chunk := list(islice(rest, size)):
            written.append((len(seen.images), chunk))
            seen.images.append(sum(item.duplicate_of is None for item in chunk))
            if len(written) == CHUNKS_AT_A_TIME:
                self._ledger.add_chunks(job, written)
                written.clear()
        if written:
            self._ledger.add_chunks(job, written)
        return seen

    @contextmanager
    def _discarding(self, job: str) -> Iterator[None]:
        """Whatever goes wrong inside, the unfinished list is forgotten."""
        try:
            yield
        except BaseException:
            try:
                self._ledger.discard(job)
            except BrokerUnavailable as error:
                log.warning(
                    "an unfinished list was left to expire", extra={"action": "discard", "job": job, "error": str(error)}
                )
            raise

    def _publish(self, job: str, chunks: Iterable[Chunk], spec: Job) -> None:
        """Publish chunks that stand in the ledger. Should it fail, the workers' reaper does it."""
        try:
            self._publisher.publish((chunk, spec) for chunk in chunks)
        except BrokerUnavailable as error:
            log.warning(
                "the job is recorded but not published; a worker will publish it",
                extra={"action": "publish", "job": job, "error": str(error)},
            )

    # --- following --------------------------------------------------------------------------

    def status(self, job: str) -> JobStatus:
        """How far a job is."""
        return self._ledger.status(job)

    def spec(self, job: str) -> Job:
        """What was asked for."""
        return self._ledger.spec(job)

    def jobs(self) -> list[JobStatus]:
        """The latest jobs, newest first."""
        return self._ledger.jobs()

    def nodes(self) -> list[Node]:
        """The worker nodes that are alive."""
        return self._fleet.nodes()

    def memory(self) -> dict[str, tuple[float, int]]:
        """Per GPU node that has worked lately: highest share of its memory in use, and batches that took it above 90 %."""
        return self._fleet.memory()

    def unserved(self, jobs: Iterable[JobStatus]) -> set[str]:
        """Of these jobs those that are not over, and that no live node can take."""
        offered = {queue for node in self.nodes() for queue in node.queues}
        wanted = {job.job: queue_name(job.operation, job.lane, job.priority) for job in jobs if not job.over}
        return {job for job, queue in wanted.items() if queue not in offered}

    def results(self, job: str) -> Iterator[Row]:
        """Every image of a job in the list's order, with what became of it so far; streamed."""
        return self._ledger.rows(job)

    def watch(self, job: str, *, every: float = 1.0) -> Iterator[tuple[JobStatus, list[ItemResult]]]:
        """A job's state with the results that are new, at once, whenever some arrive and at least `every` seconds.

        Ends when the job is over and all results were given; the last state is the final one. After a
        retry an image's new result may be given more than once; the state's counts are right throughout.
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
        """The job's state when it is over, or after `timeout` seconds as it is then."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        for status, _ in self.watch(job, every=1.0 if timeout is None else min(1.0, max(0.05, timeout))):
            if status.over or time.monotonic() >= deadline:
                break
        return status

    # --- changing ---------------------------------------------------------------------------

    def retry(self, job: str) -> int:
        """Queue what failed or was cancelled of an ended job once more; how many images.

        Raises UsageError while the job is not over.
        """
        status = self._ledger.status(job)
        if not status.over:
            raise UsageError(f"job {job} is still {status.state}; only a job that is over can be retried")
        chunks = self._ledger.retry(job)
        self._publish(job, chunks, self._ledger.spec(job))
        return sum(chunk.images for chunk in chunks)

    def cancel(self, job: str) -> JobStatus:
        """Stop what has not started; images that are being worked on stop within seconds."""
        if self._ledger.cancel(job) == "stopped":
            self._publish(job, [Chunk(job=job, number=MANIFEST, images=0)], self._ledger.spec(job))
        return self._ledger.status(job)

    def link(self, row: Row, seconds: int) -> str:
        """An address by which anyone can read a result for `seconds`, at most seven days; of a file, its own address.

        Raises UsageError for an image without a result.
        """
        if row.output is None:
            raise UsageError(f"image {row.item} has no result: it is {row.state}")
        return presign(self._signer, row.output, seconds) if row.output.startswith("s3://") else row.output

    # --- made when first needed -------------------------------------------------------------

    @cached_property
    def _publisher(self) -> Publisher:
        from imagemill.shared.broker import Publisher, make_app  # Celery takes longer to import than most commands to run

        return Publisher(make_app(self._settings))

    @cached_property
    def _s3(self) -> Any:
        return make_client(self._settings.s3)

    @cached_property
    def _signer(self) -> Any:
        return make_signer(self._settings.s3)


def new_job_id() -> str:
    """The day in UTC and 32 random bits: `260730-1f0c9a3e`."""
    return f"{datetime.now(UTC):%y%m%d}-{secrets.token_hex(4)}"
