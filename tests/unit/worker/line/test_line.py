"""Every image of a chunk ends in one record, or in none if the line is stopped, whatever its neighbours do."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from billiard.exceptions import SoftTimeLimitExceeded

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.errors import BrokerUnavailable, OperationFailed, OutOfMemory
from imagemill.worker.operations.base import Sample
from tests.conftest import photo
from tests.fakes import Invert
from tests.ledgers import Ledger
from tests.services.images import Handler, ImageServer, answers, failing, reply
from tests.unit.worker.line.chunks import SIZE, Bands, Chunk, Faulty, Gate, Masked, pixels, running, source


@pytest.mark.parametrize("operation", [Invert, Bands])
def test_each_image_gets_its_own_result_and_exactly_one_record(operation: type[Invert], chunk: Chunk) -> None:
    items = chunk.photos(20)
    chunk.line(operation(), items).run(items)
    rows = chunk.rows()
    for row in rows:
        assert np.array_equal(pixels(row), 255 - source(row.index))
    assert sorted(chunk.entries()) == list(range(20))
    status = chunk.ledger.status(chunk.job)
    assert (status.done, status.failed) == (20, 0)


def test_chunk_delivered_twice_is_counted_once(chunk: Chunk) -> None:
    items = chunk.photos(4)
    for node, counted in (("here", 4), ("there", 0)):
        line = chunk.line(Invert(), items, node=node)
        line.run(items)
        assert (line.records.done, line.records.failed) == (counted, 0)
    assert sorted(chunk.entries()) == [0, 1, 2, 3]
    assert {row.result.node for row in chunk.rows() if row.result} == {"here"}


def test_record_holds_attempts_sizes_and_seconds_per_stage(chunk: Chunk) -> None:
    chunk.images.routes["/a.png"] = failing(1, 503, photo(1))
    items = chunk.items(["/a.png"])
    chunk.line(Invert(), items).run(items)
    (row,) = chunk.rows()
    result = row.result
    assert result is not None
    assert (result.attempts, result.source_format, result.source_bytes) == (2, "png", len(photo(1)))
    assert result.source_size == result.output_size == (96, 72)
    assert {"fetch", "wait", "decode", "prepare", "run", "finish", "check", "encode", "store"} == result.seconds.keys()


def route(stage: str) -> Any:
    """What the server returns for the image that is to fail at `stage`."""
    if stage == "fetch":
        return answers(404)
    if stage == "decode":
        return photo(1)[:-400]
    return photo(1, 16384, 1) if stage == "encode" else photo(1)


@pytest.mark.parametrize(
    ("stage", "fault", "code"),
    [
        ("fetch", None, "not_found"),
        ("decode", None, "truncated"),
        ("prepare", OperationFailed("no"), "operation_failed"),
        ("prepare", MemoryError("malloc"), "out_of_memory"),
        ("prepare", ZeroDivisionError("by zero"), "internal_error"),
        ("empty", None, "internal_error"),
        ("group", KeyError("no such group"), "internal_error"),
        ("run", OutOfMemory("the device is full"), "out_of_memory"),
        ("run", OperationFailed("no"), "operation_failed"),
        ("run", ZeroDivisionError("by zero"), "internal_error"),
        ("finish", OperationFailed("no"), "operation_failed"),
        ("finish", ZeroDivisionError("by zero"), "internal_error"),
        ("encode", None, "operation_failed"),
        ("store", None, "storage_refused"),
    ],
)
def test_bad_image_fails_alone_with_the_right_code(stage: str, fault: Exception | None, code: str, chunk: Chunk) -> None:
    items = chunk.photos(5)
    chunk.images.routes["/1.png"] = route(stage)
    if stage == "store":
        (chunk.folder / "1.webp").mkdir(parents=True)
    line = chunk.line(Faulty(stage, fault), items, form="webp")
    line.run(items)
    assert chunk.codes() == ["done", code, "done", "done", "done"]
    assert (line.records.done, line.records.failed) == (4, 1)
    bad = chunk.rows()[1]
    assert bad.message
    assert bad.attempts == 1
    assert all(pixels(row).shape == (72, 96, 3) for row in chunk.rows() if row.index != 1)


def test_image_with_a_failed_tile_is_recorded_once(chunk: Chunk) -> None:
    class Blemish(Bands):
        def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
            if any(np.array_equal(sample.data, source(1)[:18]) for sample in samples):
                raise OperationFailed("this tile can't be done")
            return super().run(samples)

    items = chunk.photos(4)
    chunk.line(Blemish(), items).run(items)
    assert chunk.codes() == ["done", "operation_failed", "done", "done"]
    assert sorted(chunk.entries()) == [0, 1, 2, 3]


def test_stop_finishes_the_running_image_and_leaves_the_rest_unrecorded(chunk: Chunk) -> None:
    items = chunk.photos(12)
    operation = Gate()
    with running(chunk.line(operation, items, threads=2, look_ahead=SIZE), items):
        assert operation.inside.wait(60)
        chunk.stop.set()
        operation.open.set()
    assert (
        sorted(chunk.codes()) == ["done"] + ["pending"] * 11
    )  # two threads fetch: either of the first two may have come first
    assert sum(chunk.images.hits.values()) <= 3, "nothing more may be fetched"


@pytest.mark.parametrize("what", ["source", "mask"])
def test_stop_records_no_failure_for_an_image_with_attempts_left(what: str, chunk: Chunk) -> None:
    def busy(handler: Handler) -> None:
        chunk.stop.set()
        reply(handler, 503, b"try later")

    chunk.images.routes |= {"/a.png": photo(1), "/busy.png": busy}
    items = chunk.items([{"source": "/a.png"} | {what: "/busy.png"}])
    chunk.line(Masked(), items, kind="inpaint").run(items)
    assert chunk.codes() == ["pending"]


def test_line_stops_and_raises_when_the_ledger_is_unreachable(
    own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path
) -> None:
    ledger = Ledger(own_redis.url)
    chunk = Chunk(ledger, images, tmp_path / "out")
    items = chunk.photos(30)
    operation = Gate()
    line = chunk.line(operation, items, threads=1, look_ahead=SIZE)
    raised: list[Exception] = []

    def run() -> None:
        try:
            line.run(items)
        except BrokerUnavailable as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert operation.inside.wait(60)
    own_redis.kill()
    operation.open.set()
    thread.join(120)
    assert len(raised) == 1
    assert (line.records.done, line.records.failed) == (0, 0)
    assert sum(images.hits.values()) < 30
    ledger.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [SoftTimeLimitExceeded(), SystemExit(1)], ids=lambda e: type(e).__name__)
def test_time_limit_ends_the_chunk_at_once_and_fails_no_image(error: BaseException, chunk: Chunk) -> None:
    class Endless(Invert):
        def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
            raise error

    items = chunk.photos(12)
    with pytest.raises(type(error)):
        chunk.line(Endless(), items, threads=4, look_ahead=SIZE).run(items)
    assert chunk.codes() == ["pending"] * 12
    assert sum(chunk.images.hits.values()) < 12
