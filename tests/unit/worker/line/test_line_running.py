"""A line outlives its runs: images remain in it, are withdrawn from it, and find the device at work."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded

from imagemill.worker.line.image import ImageInFlight
from imagemill.worker.line.line import Line
from imagemill.worker.operations.base import Sample
from tests.conftest import photo
from tests.fakes import Invert
from tests.services.images import answers
from tests.unit.worker.line.jobs import SIZE, Gate, LineJob, drain, draining, waiting
from tests.workers import wait_until


def test_run_returns_at_its_time_and_the_next_one_continues(job: LineJob) -> None:
    line, images = job.begin(Invert(), job.photos(10), threads=2)
    runs = 0
    while any(image.place != "over" for image in images):
        line.device.run(time.monotonic(), lambda: True)  # its time is up after one batch
        runs += 1
    assert runs >= 3, "batches have up to four images"
    assert job.codes() == ["done"] * 10
    assert sorted(job.entries()) == list(range(10))


def test_run_returns_when_there_is_no_more_work(job: LineJob) -> None:
    line = job.line()
    line.device.run(time.monotonic() + 3600, lambda: False)
    drain(line, job.join(line, Invert(), job.photos(2)))
    line.device.run(time.monotonic() + 3600, lambda: False)
    assert job.codes() == ["done"] * 2


def test_images_are_fetched_and_prepared_while_nobody_runs_the_device(job: LineJob) -> None:
    line, images = job.begin(Invert(), job.photos(4))
    wait_until(lambda: waiting(line) == 4, "they wait for the device")
    drain(line, images)
    assert job.codes() == ["done"] * 4


def test_device_does_not_wait_for_downloads_while_images_are_ready(job: LineJob) -> None:
    operation = Gate()
    items = job.photos(4) + [item.model_copy(update={"index": 4}) for item in job.items(["/slow.png"])]
    job.server.routes["/slow.png"] = job.server.hang
    line, images = job.begin(operation, items, wait=60)
    with draining(line, images[:4]):
        assert operation.inside.wait(60)
        wait_until(lambda: waiting(line) == 3, "three images are ready")
        operation.open.set()
    assert job.codes() == ["done"] * 4 + ["pending"]
    job.server.routes["/slow.png"] = answers(404)
    job.server.released.set()
    drain(line, images)
    assert job.codes() == ["done"] * 4 + ["not_found"]


class OneByOne(Invert):
    spec = replace(Invert.spec, max_batch=1)


def withdraw(line: Line, images: Sequence[ImageInFlight]) -> None:
    for image in images:
        image.withdraw()
    line.device.clear()


def check_all_room_is_free(line: Line, other: LineJob, photos: int) -> None:
    """Whether an image gets in that needs the room of this many photos."""
    other.server.routes["/wide.png"] = photo(1, photos * 96, 72)
    drain(line, other.join(line, Invert(), other.items(["/wide.png"])))
    assert other.codes() == ["done"]


def test_images_withdrawn_while_the_device_is_busy_are_never_begun_nor_recorded(job: LineJob, other: LineJob) -> None:
    operation = Gate()
    line, images = job.begin(operation, job.photos(7), look_ahead=3 * SIZE)
    with draining(line, images):
        assert operation.inside.wait(60)
        wait_until(lambda: waiting(line) == 2, "two images are ready, and four wait for room")
        withdraw(line, images)
        assert sorted(image.place for image in images) == ["begun"] + ["over"] * 6, "at once, except for what is begun"
        operation.open.set()
    assert operation.begun == 1
    assert sorted(job.codes()) == ["done"] + ["pending"] * 6
    check_all_room_is_free(line, other, 3)


def test_images_withdrawn_while_nobody_runs_the_device_free_their_pixels(job: LineJob, other: LineJob) -> None:
    line, images = job.begin(OneByOne(), job.photos(3))
    wait_until(lambda: waiting(line) == 3, "all are ready")
    line.device.run(time.monotonic(), lambda: True)
    rest = [image for image in images if image.place == "fetching"]
    assert len(rest) == 2
    withdraw(line, rest)
    assert not any(image.held_pixels for image in rest)
    drain(line, images)
    assert sorted(job.codes()) == ["done", "pending", "pending"]


def test_line_reports_when_images_leave_the_device_and_the_line(job: LineJob) -> None:
    """The next share is taken in time because of that."""
    changes = threading.Semaphore(0)
    line = job.line(changed=changes.release)
    drain(line, job.join(line, OneByOne(), job.photos(3)))
    for _ in range(6):
        assert changes.acquire(timeout=60)


@pytest.mark.parametrize("error", [SoftTimeLimitExceeded(), SystemExit(1)], ids=lambda e: type(e).__name__)
def test_abandoned_line_records_nothing_more(error: BaseException, job: LineJob) -> None:
    """Neither the batch that was on the device, nor images that wait for room."""

    class Endless(Invert):
        def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
            raise error

    line, images = job.begin(Endless(), job.photos(12), threads=4, look_ahead=SIZE)
    with pytest.raises(type(error)):
        drain(line, images)
    wait_until(lambda: sum("fetch" in image.seconds for image in images) == 5, "four images wait for room")
    line.abandon()
    assert job.codes() == ["pending"] * 12


def test_device_starves_only_while_it_has_nothing_to_run(job: LineJob) -> None:
    operation = Gate()
    line, images = job.begin(operation, job.photos(1))
    with draining(line, images):
        assert operation.inside.wait(60)
        assert line.device.starving_since is None
        operation.open.set()
    line.device.run(time.monotonic(), lambda: False)
    assert line.device.starving_since is not None
