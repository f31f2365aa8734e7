"""Jobs in a ledger, and the moves of the workers and the reaper."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

from imagemill.shared.ledger.leasing import Lease, WorkLedger
from imagemill.shared.ledger.reading import ReadLedger
from imagemill.shared.ledger.submitting import SubmitLedger
from imagemill.shared.messages import MANIFEST, Item, ItemResult, Job, Output, Policy, Priority

QUEUE = "imagemill.stylize.opencv"
NUMBERS = itertools.count()


def spec(priority: Priority = "normal") -> Job:
    return Job(operation="stylize", output=Output(url="s3://results/x"), policy=Policy(priority=priority))


def item(index: int, duplicate_of: int | None = None) -> Item:
    return Item(index=index, source=f"https://example.com/{index}.jpg", duplicate_of=duplicate_of)


def make_job(producer: SubmitLedger, *sizes: int, duplicates: tuple[int, ...] = (), priority: Priority = "normal") -> str:
    """A sealed job with chunks of these sizes, and a last chunk of duplicates of the items with these indexes."""
    job = f"job-{next(NUMBERS):06d}"
    indexes = iter(range(10_000))
    chunks = [[item(index) for index in itertools.islice(indexes, size)] for size in sizes]
    if duplicates:
        chunks.append([item(next(indexes), first) for first in duplicates])
    producer.open_job(job, spec(priority))
    producer.add_chunks(job, enumerate(chunks))
    total = sum(sizes) + len(duplicates)
    producer.seal(job, chunks=len(chunks), total=total, duplicates={first: duplicates.count(first) for first in duplicates})
    return job


def take(worker: WorkLedger, job: str, number: int = 0, task: str = "t", delivery: int = 1) -> Lease:
    lease = worker.acquire(job, number, task=task, token=f"{task}/{delivery}")
    assert isinstance(lease, Lease)
    return lease


def done(index: int) -> ItemResult:
    return ItemResult(index=index, state="done", output=f"s3://results/x/{index}.png")


def failed(index: int) -> ItemResult:
    return ItemResult(index=index, state="failed", code="not_found", message="no such image")


def work(worker: WorkLedger, job: str, number: int, bad: Collection[int] = ()) -> str:
    """Process a chunk as a worker does, and the manifest after the last one; `bad` images fail."""
    lease = take(worker, job, number)
    for item in lease.items:
        if item.duplicate_of is None:
            worker.record(job, failed(item.index) if item.index in bad else done(item.index))
    answer = worker.complete(lease)
    if answer == "finishing":
        assert worker.complete(take(worker, job, MANIFEST), manifest="s3://results/x/manifest.jsonl") == "ok"
    return answer


def reap(worker: WorkLedger, raw: Any, patience: float = 30.0) -> list[tuple[str, int]]:
    """The chunks that the reaper republishes when its turn comes."""
    raw.delete("imagemill:reaper")
    return [(chunk.job, chunk.number) for chunk in worker.reap("cpu@a", patience=patience)]


def age(raw: Any, job: str, seconds: float, queue: str = QUEUE) -> None:
    """Backdate the publication of a job's waiting chunks."""
    for member in raw.zrange(f"imagemill:waiting:{queue}", 0, -1):
        if member.startswith(f"{job}:"):
            raw.zincrby(f"imagemill:waiting:{queue}", -1000 * seconds, member)


def end_lease(raw: Any, job: str, number: int) -> None:
    raw.zadd("imagemill:leased", {f"{job}:{number}": 1}, xx=True)


def keys(raw: Any, job: str) -> list[str]:
    return sorted(raw.scan_iter(f"imagemill:job:{job}*"))


def counts(ledger: ReadLedger, job: str) -> tuple[str, int, int]:
    status = ledger.status(job)
    return status.state, status.done, status.failed
