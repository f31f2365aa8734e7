"""The line with fake network, store and ledger; decoding, preparing and encoding are real. All use of the line is here."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.figures import Figure, figure
from bench.gpu.card import Busy, Card
from imagemill.shared.ledger.leasing import Record, Recorded
from imagemill.shared.messages import Item, ItemResult, Job
from imagemill.shared.settings import Settings
from imagemill.worker.imaging.codec import Encoded
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.batching import run_parts
from imagemill.worker.line.context import Context
from imagemill.worker.line.image import ImageInFlight
from imagemill.worker.line.line import Line
from imagemill.worker.line.records import Records
from imagemill.worker.operations.base import AnyOperation, Sample
from imagemill.worker.transfer.byte_budget import ByteBudget
from imagemill.worker.transfer.fetch import Fetched
from imagemill.worker.transfer.network import Network

GET, PUT = 0.1, 0.05
"""Seconds per download and per upload."""
BUSY = 0.85
"""Share of the cores above which they are the limit, and not the line."""
PER_CORE = 15
"""Images per core and second that the CPU can be expected to decode and encode, so that no run takes much too long."""


@dataclass(frozen=True)
class Course:
    """A job for the line: `files` over and over. `seconds` is how long the device should take for all of it."""

    operation: AnyOperation
    spec: Job
    files: Sequence[bytes]
    sizes: BatchSizes
    seconds: float = 15.0
    batch_wait: float = 0.05


@dataclass(frozen=True)
class Passage:
    """How a job went through the line: its wall and CPU time, and how large its batches were at most and on average."""

    images: int
    seconds: float
    cpu: float
    largest: int
    mean: float


def learn(operation: AnyOperation, samples: Sequence[Sample[Any, Any]], sizes: BatchSizes) -> None:
    """Run growing batches, as a node does at first, so that `sizes` knows how many samples fit."""
    size = 1
    while size <= len(samples):
        list(run_parts(operation, samples[:size], sizes))
        size *= 2


def end_to_end(card: Card, course: Course, samples: Sequence[Sample[Any, Any]], goal: float | None = 0.95) -> Iterator[Figure]:
    """The line compared with a bare loop over one batch of samples, which is timed before and after.

    The goal is for the line: it does not apply where decoding and encoding keep all cores busy.
    """

    def bare() -> float:
        return len(samples) / card.seconds(lambda: course.operation.run(samples), rounds=10, enough=2.0)

    before = bare()
    rate = min(before, PER_CORE * card.device.threads)
    images = max(2, math.ceil(rate * course.seconds / len(samples))) * len(samples)
    with card.busy() as busy:
        passage = through_the_line(course, 2 * len(samples) if card.small else images, card.device.threads)
    loop = (before + bare()) / 2
    yield from _rows(card, passage, loop, busy, goal)


def _rows(card: Card, passage: Passage, loop: float, busy: Busy, goal: float | None) -> Iterator[Figure]:
    rate, cores = passage.images / passage.seconds, passage.cpu / passage.seconds / card.device.threads
    limited = cores > BUSY
    yield figure("end to end / bare" + " (the cores are the limit)" * limited, rate / loop, "", None if limited else goal)
    yield figure("bare loop", loop, "images/s")
    yield figure("end to end", rate, "images/s")
    yield figure("images in the run", passage.images)
    yield figure("mean batch", passage.mean, "images")
    yield figure("CPU per image, the loop that waits for the device included", passage.cpu / passage.images * 1000, "ms")
    yield figure("share of the cores that was busy", cores)
    if busy.share is not None:
        yield figure("the driver's utilisation, filling and draining included", busy.share)


def through_the_line(course: Course, images: int, threads: int = 2) -> Passage:
    """Take so many images through the line. Fails if one of them fails."""
    ledger = _Ledger()
    settings = Settings(_env_file=None, worker={"batch_wait": course.batch_wait})  # type: ignore[call-arg, arg-type]
    network = Network()
    line = Line(settings, Records(ledger, "bench"), network, threads=threads)  # type: ignore[arg-type]
    context = Context.of(
        "bench",
        course.spec,
        settings,
        operation=course.operation,
        sizes=course.sizes,
        fetcher=_Fetcher(course.files),  # type: ignore[arg-type]
        store=_Store(),  # type: ignore[arg-type]
        budget=line.budget,
    )
    items = (Item(index=number, source=f"https://bench.example/{number}.jpg") for number in range(images))
    flying = [ImageInFlight(item, context) for item in items]
    start, cpu = time.perf_counter(), time.process_time()
    try:
        line.enter(flying)
        line.device.run(math.inf, lambda: any(image.place != "over" for image in flying))
    finally:
        line.abandon()
        line.records.close(60)
        network.close()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    failed = [result for result in ledger.results if result.state == "failed"]
    assert not failed, f"{len(failed)} of {images} images failed: {failed[0].message}"
    assert len(ledger.results) == images, f"{images - len(ledger.results)} of {images} images got lost"
    batches = [image.batch for image in flying]
    return Passage(images, seconds, cpu, max(batches), images / sum(1 / batch for batch in batches))


class _Fetcher:
    """Returns the files in turn, each after a delay."""

    room = ByteBudget(2**40)

    def __init__(self, files: Sequence[bytes]) -> None:
        self._files = files

    def within(self, _: object) -> _Fetcher:
        return self

    async def fetch(self, source: str, **_: Any) -> Fetched:
        await asyncio.sleep(GET)
        number = int(source.rpartition("/")[2].removesuffix(".jpg"))
        return Fetched(self._files[number % len(self._files)], tries=1, room=0)


class _Store:
    """Accepts each result after a delay and keeps none."""

    service = "s3://bench"

    async def check(self) -> None: ...

    async def put(self, key: str, data: bytes | Encoded, content_type: str, **_: str) -> str:
        await asyncio.sleep(PUT)
        return f"s3://bench/{key}"


class _Ledger:
    def __init__(self) -> None:
        self.results: list[ItemResult] = []

    def record_all(self, records: Sequence[Record]) -> list[Recorded]:
        self.results += [ItemResult.model_validate_json(record.text) for record in records]
        return [Recorded(first=True, stop=False)] * len(records)
