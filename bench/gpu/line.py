"""The flow with fake network, store and ledger; decoding, preparing and encoding are real."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from imagemill.shared.ledger.leasing import Record, Recorded
from imagemill.shared.messages import Item, ItemResult, Job
from imagemill.shared.settings import Settings
from imagemill.worker.imaging.codec import Encoded
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.context import Context
from imagemill.worker.line.image import ImageInFlight
from imagemill.worker.line.line import Line
from imagemill.worker.line.records import Records
from imagemill.worker.operations.base import AnyOperation

GET, PUT = 0.1, 0.05
"""Seconds per download and per upload."""


def through_the_line(
    operation: AnyOperation, spec: Job, files: Sequence[bytes], images: int, sizes: BatchSizes | None = None
) -> float:
    """Images per second of a job of `images` images, which are `files` over and over. Fails if an image fails."""
    ledger = _Ledger()
    settings = Settings(_env_file=None)  # type: ignore[call-arg]
    line = Line(settings, Records(ledger, "bench"))  # type: ignore[arg-type]
    context = Context.of(
        "bench",
        spec,
        settings,
        operation=operation,
        sizes=sizes or BatchSizes(),
        fetcher=_Fetcher(files),
        store=_Store(),  # type: ignore[arg-type]
        budget=line.budget,
    )
    items = (Item(index=number, source=f"https://bench.example/{number}.jpg") for number in range(images))
    flying = [ImageInFlight(item, context) for item in items]
    start = time.perf_counter()
    line.enter(flying)
    line.device.run(math.inf, lambda: any(image.place != "over" for image in flying))
    seconds = time.perf_counter() - start
    line.abandon()
    failed = [result for result in ledger.results if result.state == "failed"]
    assert not failed, f"{len(failed)} images failed: {failed[0].message}"
    assert len(ledger.results) == images
    return images / seconds


@dataclass
class _Fetched:
    data: bytes
    tries: int = 1


class _Fetcher:
    """Returns the files in turn, each after a delay."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self._files = files

    def fetch(self, source: str, **_: Any) -> _Fetched:
        time.sleep(GET)
        number = int(source.rpartition("/")[2].removesuffix(".jpg"))
        return _Fetched(self._files[number % len(self._files)])


class _Store:
    """Accepts each result after a delay and keeps none."""

    def check(self) -> None: ...

    def put(self, key: str, data: bytes | Encoded, content_type: str) -> str:
        time.sleep(PUT)
        return f"s3://bench/{key}"


class _Ledger:
    def __init__(self) -> None:
        self.results: list[ItemResult] = []

    def record_all(self, records: Sequence[Record]) -> list[Recorded]:
        self.results += [ItemResult.model_validate_json(record.text) for record in records]
        return [Recorded(first=True, stop=False)] * len(records)
