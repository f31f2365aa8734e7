"""Under which cause a wait of the device is counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.line import Line
from imagemill.worker.operations.base import Inputs
from tests.fakes import Invert
from tests.unit.worker.line.jobs import SIZE, LineJob, waiting
from tests.unit.worker.line.test_line_batches import Sized
from tests.workers import wait_until


class Slow(Invert):
    """Prepares nothing until it is `open`."""

    def __init__(self) -> None:
        self.inside, self.open = threading.Event(), threading.Event()

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        self.inside.set()
        assert self.open.wait(60)
        return super().prepare(picture, inputs)


def causes(line: Line) -> set[str]:
    """What the device waits for in one turn of its loop."""
    line.device.run(time.monotonic(), lambda: False)
    return {cause for cause, seconds in line.device.waits.so_far().items() if seconds > 0 and cause != "busy"}


@pytest.fixture
def slow() -> Iterator[Slow]:
    operation = Slow()
    yield operation
    operation.open.set()


def hanging(job: LineJob) -> dict[str, Any]:
    """A row whose download does not end."""
    job.server.routes["/slow.png"] = job.server.hang
    return {"source": "/slow.png"}


def test_work_if_the_line_is_empty(job: LineJob) -> None:
    assert causes(job.line()) == {"work"}


def test_fetch_while_nothing_is_downloaded(job: LineJob) -> None:
    line, _ = job.begin(Invert(), job.items([hanging(job)]))
    wait_until(lambda: line.front.fetching == 1, "the download has begun")
    assert causes(line) == {"fetch"}


def test_decode_while_nothing_is_prepared(job: LineJob, slow: Slow) -> None:
    line, _ = job.begin(slow, job.photos(1))
    assert slow.inside.wait(60)
    assert causes(line) == {"decode"}


def test_batch_while_more_images_may_come(job: LineJob) -> None:
    operation = Sized(room=8)
    items = job.photos(1) + [item.model_copy(update={"index": 1}) for item in job.items([hanging(job)])]
    line, _ = job.begin(operation, items, sizes=operation.known, wait=0.01)
    wait_until(lambda: waiting(line) == 1, "the photo is ready")
    assert causes(line) == {"batch"}
    assert operation.sizes == [1]


def test_store_while_results_that_are_not_stored_take_the_room(job: LineJob) -> None:
    line = job.line(look_ahead=SIZE)
    assert line.budget.enter_now(SIZE)
    job.join(line, Invert(), job.photos(1))
    wait_until(lambda: line.budget.waiting == 1, "the photo waits for room")
    assert causes(line) == {"store"}
