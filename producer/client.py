"""The Python API: submit, follow, steer and retry jobs.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from imagemill.producer.advice import advice
from imagemill.producer.explaining import explained
from imagemill.producer.sources import BadRow, SourceRow
from imagemill.producer.submission import ListCheck, Submission, check_name, new_job_id
from imagemill.producer.times import check_times
from imagemill.producer.writing import Writing
from imagemill.shared.dead import DeadLetters
from imagemill.shared.errors import BrokerUnavailable, UsageError
from imagemill.shared.fleet import Fleet
from imagemill.shared.forecast import Waiting, plan
from imagemill.shared.ledger.scripts import PACK
from imagemill.shared.ledger.submitting import SubmitLedger
from imagemill.shared.messages import DeadLetter, ItemResult, Job, JobStatus, Node, Priority, Row
from imagemill.shared.s3 import S3Client, make_client, make_signer, presign
from imagemill.shared.settings import Settings
from imagemill.shared.tracing import open_traces, span_id

if TYPE_CHECKING:
    from imagemill.shared.broker import Publisher

__all__ = ["Client", "Submission"]

log = logging.getLogger("imagemill.client")

Lost: TypeAlias = Callable[[BrokerUnavailable], None]
"""Called when Redis can't be reached: it waits and returns, and Redis is tried again, or it raises."""

PACKS_PER_WRITE = 64
"""Packs written to the ledger in one round trip."""


class Client:
    """Submits and follows jobs. Uses Redis, and S3 only for prefixes and links.

    Every method raises BrokerUnavailable if Redis can't be reached, and JobNotFound if the job does not
    exist or has expired. Must not be shared across a fork.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._traces = settings, open_traces(settings)
        self._ledger, self._fleet = SubmitLedger.of(settings), Fleet.of(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if self._traces is not None:
            self._traces.close()
        self._ledger.close()
        self._fleet.close()

    def s3(self) -> S3Client:
        """An S3 client for `read_sources`."""
        return make_client(self._settings.s3)

    # --- submitting -------------------------------------------------------------------------

    def submit(
        self, sources: Iterable[SourceRow | BadRow], spec: Job, *, skip_invalid: bool = False, name: str | None = None
    ) -> Submission:
        """Queue a job for every image of a list, which is streamed into the ledger.

        Nothing is queued until the last row is checked. If rows are invalid and not skipped, or none is valid,
        InvalidSource is raised with the first 1000 invalid rows in `rows`. A row with the same source, mask,
        control image, boxes, points and name as an earlier one shares its result. An interrupted list (an error, Ctrl-C)
        is discarded.

        `name` becomes the job's id. Under a name, an interrupted list is kept for an hour: submit the same list with the same
        name again to continue. If all of it is queued, nothing is queued twice. The times of the first submission stay.
        Raises NameTaken if the job of this name has another list or other options, and InvalidOption for an invalid name, or
        for a deadline in the past or before the job may begin.
        """
        began = time.time()
        check_times(spec.policy)
        job, checked = new_job_id() if name is None else check_name(name), ListCheck()
        writing = Writing(self._ledger, job, keep=name is not None)
        with writing:
            self._ledger.open_job(job, spec)
            items = checked.accepted(sources, spec, skip_invalid)
            packs = ((number, list(group)) for number, group in groupby(items, key=lambda item: item.index // PACK))
            while batch := list(islice(packs, PACKS_PER_WRITE)):
                self._ledger.add_packs(job, batch)
                writing.images += sum(len(items) for _, items in batch)
            if not checked.total or (checked.bad_count and not skip_invalid):
                raise checked.error()
            writing.sealing = True
            new = self._ledger.seal(job, size=checked.size, total=checked.total, duplicates=checked.duplicates)
        fields = {"action": "submit", "job": job, "owner": spec.policy.owner, "images": checked.total, "lane": spec.lane}
        log.info("job submitted", extra=fields)
        if self._traces is not None and new:
            self._traces.record(job, "submit", began, span=span_id(job), fields=fields)
        nodes = self._wake(job, spec.lane, checked.total)
        return Submission(
            job=job,
            total=checked.total,
            duplicates=sum(checked.duplicates.values()),
            invalid=checked.bad,
            invalid_count=checked.bad_count,
            nodes=None if nodes is None else sum(spec.lane in node.lanes for node in nodes),
            advice=None if nodes is None else advice(spec.lane, nodes, spec.options.companions()),
            before=not new,
            warnings=checked.warnings,
        )

    def _wake(self, job: str, lane: str, images: int) -> list[Node] | None:
        """Wake up workers for a job that is in the ledger, at most one child per image; returns the running nodes if known.

        If that fails, a node does it within seconds.
        """
        nodes = None
        try:
            nodes = self._fleet.nodes()
            children = sum(node.children for node in nodes if lane in node.lanes)
            self._publisher.wake(lane, max(1, min(images, children)))
        except BrokerUnavailable as error:
            extra = {"action": "publish", "job": job, "reason": str(error)}
            log.warning("job recorded, but no worker was woken up; one will find it within seconds", extra=extra)
        return nodes

    # --- following --------------------------------------------------------------------------

    def status(self, job: str) -> JobStatus:
        """A job's state and counts; cheap. `explain` adds what depends on other jobs and on the nodes."""
        return self._ledger.status(job)

    def explain(self, jobs: Iterable[JobStatus]) -> list[JobStatus]:
        """The same jobs with their position in line, why they wait, and when they are expected to start and end.

        The forecast assumes that nothing changes and that the nodes of each lane work on that lane alone.
        """
        jobs, nodes = list(jobs), self.nodes()
        offered = {lane for node in nodes for lane in node.lanes}
        faults = {lane: f": out of service on {node.node}, {why}" for node in nodes for lane, why in node.faults.items()}
        lineups = {lane: self._ledger.lineup(lane) for lane in {job.lane for job in jobs if not job.over}}
        turns = {lane: plan(lineup.jobs) for lane, lineup in lineups.items()}
        return [job if job.over else explained(job, turns[job.lane], lineups[job.lane].speed, offered, faults) for job in jobs]

    def forecast(self, spec: Job, images: int) -> tuple[int, float | None, float | None]:
        """The nodes that could work on a new job of this many images, and the seconds until its start and end, if known."""
        nodes, lineup = sum(spec.lane in node.lanes for node in self.nodes()), self._ledger.lineup(spec.lane)
        owner = spec.policy.owner or "~new"  # no name may start with ~
        weight = next((job.weight for job in lineup.jobs if job.owner == owner), 1.0)
        turn = plan([*lineup.jobs, Waiting("~new", owner, weight, spec.policy.priority, images)])["~new"]
        if not nodes or lineup.speed <= 0:
            return nodes, None, None
        return nodes, turn.begins / lineup.speed, turn.ends / lineup.speed

    def spec(self, job: str) -> Job:
        """A job as it was submitted."""
        return self._ledger.spec(job)

    def jobs(self) -> list[JobStatus]:
        """The latest jobs, newest first."""
        return self._ledger.jobs()

    def nodes(self) -> list[Node]:
        """The running worker nodes."""
        return self._fleet.nodes()

    def gpus(self) -> dict[str, tuple[int | None, int]]:
        """By host, the number of GPUs expected (None: not set) and present."""
        return self._fleet.gpus()

    def memory(self) -> dict[str, tuple[float, int]]:
        """Each recently active GPU node's peak share of memory in use, and its number of batches that exceeded 90 %."""
        return self._fleet.memory()

    def rates(self, nodes: Sequence[Node]) -> dict[str, dict[str, float]]:
        """Images per second of each node by lane, as measured; without lanes in which it has not computed images."""
        rates: dict[str, dict[str, float]] = {node.node: {} for node in nodes}
        for lane in sorted({lane for node in nodes for lane in node.lanes}):
            for child, rate in self._fleet.rates(lane).items():
                node = child.rpartition("/")[0]
                if node in rates:
                    rates[node][lane] = rates[node].get(lane, 0.0) + rate
        return rates

    def dead(self) -> list[DeadLetter]:
        """What in Redis could not be read and was set aside, newest first; at most 1,000 entries."""
        letters = DeadLetters.of(self._settings)
        try:
            return letters.entries()
        finally:
            letters.close()

    def unserved(self, jobs: Iterable[JobStatus]) -> set[str]:
        """The ids of unfinished jobs that no running node can take."""
        offered = self._offered()
        return {job.job for job in jobs if not job.over and job.lane not in offered}

    def _offered(self) -> set[str]:
        return {lane for node in self.nodes() for lane in node.lanes}

    def results(self, job: str, *, lost: Lost | None = None) -> Iterator[Row]:
        """Stream every image of a job with its result so far, in the list's order.

        With `lost`, an outage of Redis is survived, and no image is left out or repeated.
        """
        first = 0
        while True:
            try:
                for row in self._ledger.rows(job, first=first):
                    yield row
                    first = row.index + 1
            except BrokerUnavailable as error:
                if lost is None:
                    raise
                lost(error)
            else:
                return

    def watch(self, job: str, *, every: float = 1.0, lost: Lost | None = None) -> Iterator[tuple[JobStatus, list[ItemResult]]]:
        """A job's status with new results: immediately, when results arrive, and at least every `every` seconds.

        With `lost`, an outage of Redis is survived, and no result is left out. Ends when the job is over and all results have
        been yielded; the last status is final. After a retry, an image's new result may be yielded more than once, but the
        counts in the status are always correct.
        """
        place, over, wait = "0", False, 0.0
        while True:
            try:
                reached, results = self._ledger.follow(job, since=place, wait=wait)
                if over and reached == place:
                    return
                status = self._ledger.status(job)
            except BrokerUnavailable as error:
                if lost is None:
                    raise
                lost(error)
                continue
            place = reached
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
        """Queue the failed, expired and cancelled images of a finished job again; returns their number.

        Raises UsageError if the job is not over.
        """
        status = self._ledger.status(job)
        if not status.over:
            raise UsageError(f"job {job} is still {status.state}; only finished jobs can be retried")
        images = self._ledger.retry(job)
        if images:
            self._wake(job, self._ledger.spec(job).lane, images)
        return images

    def cancel(self, job: str) -> JobStatus:
        """Cancel a job: no more of its images begin, and it is over as soon as none is running."""
        self._ledger.cancel(job)
        return self._ledger.status(job)

    def pause(self, job: str) -> JobStatus:
        """Begin nothing more of a job until `resume`; images on a device are finished. Raises UsageError if it is over."""
        return self._steered(job, self._ledger.pause(job), "paused")

    def resume(self, job: str) -> JobStatus:
        """Continue a paused job. Raises UsageError if it is over."""
        resumed = self._ledger.resume(job)
        if resumed:
            status = self._ledger.status(job)
            self._wake(job, status.lane, status.waiting)
        return self._steered(job, resumed, "resumed")

    def prioritize(self, job: str, priority: Priority) -> JobStatus:
        """Move a job to another priority. Raises UsageError if it is over."""
        return self._steered(job, self._ledger.prioritize(job, priority), "moved to another priority")

    def _steered(self, job: str, changed: bool, what: str) -> JobStatus:
        status = self._ledger.status(job)
        if not changed:
            raise UsageError(f"job {job} is {status.state}; only waiting or running jobs can be {what}")
        return status

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
