"""A store that does not respond delays images; it fails none, and none is computed twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import pytest

from imagemill.shared.errors import ServerError, StorageFull, StorageRefused, StorageUnavailable
from imagemill.worker.line import outages as module
from imagemill.worker.line.image import ImageInFlight
from imagemill.worker.line.outages import LONGEST_PAUSE, MANY, OWN_FAULTS, PATIENCE, Outages
from tests.fakes import Invert
from tests.unit.worker.line.jobs import SIZE, LineJob, pixels, source

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("impatient")]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.01)


class Counted(Invert):
    """Counts the images that it runs."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, samples: Any) -> list[Any]:
        self.runs += len(samples)
        return super().run(samples)


class Down:
    """Stands in for a store's `put`: while it is `down`, or for the keys it `refuses`, the store does not respond."""

    def __init__(self, job: LineJob) -> None:
        self.down, self.refuses, self.calls, self._lock = True, set[str](), 0, threading.Lock()
        self._put = job.context.store.put
        job.context.store.put = self.put  # type: ignore[method-assign]

    def put(self, key: str, data: bytes, content_type: str, *, md5: str) -> Awaitable[str]:
        with self._lock:
            self.calls += 1
        if self.down or key in self.refuses:
            raise StorageUnavailable(f"{key}: no connection")
        return self._put(key, data, content_type, md5=md5)


def begin(job: LineJob, operation: Invert, count: int, **settings: Any) -> tuple[Any, list[ImageInFlight], Down]:
    """A line that is about to work on photos for a store that is down."""
    items = job.photos(count)
    line = job.line(**settings)
    images = job.join(line, operation, items, enter=False)
    return line, images, Down(job)


def drain(line: Any, images: list[ImageInFlight], until: Callable[[], bool] | None = None) -> None:
    """Run the line, and try again what waits, until the images have left it."""
    over = until or (lambda: all(image.place == "over" for image in images))

    def busy() -> bool:
        line.retry()
        return not over()

    line.device.run(time.monotonic() + 60, busy)
    assert over()


def test_results_wait_for_their_store_and_are_computed_once(job: LineJob) -> None:
    operation = Counted()
    line, images, store = begin(job, operation, 12)
    line.enter(images)
    drain(line, images, lambda: store.calls > 40 and operation.runs == 12)
    assert job.codes() == ["pending"] * 12
    ((name, reason),) = line.outages.reasons().items()
    assert name == job.name
    assert "no connection" in reason
    store.down = False
    drain(line, images)
    assert job.codes() == ["done"] * 12
    assert operation.runs == 12
    assert line.outages.reasons() == {}
    assert all((pixels(row) == 255 - source(row.index)).all() for row in job.rows())
    assert all(row.result is not None and row.result.output_size == (96, 72) for row in job.rows())


def test_results_that_wait_leave_room_for_more(job: LineJob) -> None:
    """The look-ahead is counted in decoded pixels, of which a file in memory has none."""
    line, images, store = begin(job, Counted(), 8, look_ahead=6 * SIZE)
    line.enter(images)
    drain(line, images, lambda: all("encoded" in vars(image) for image in images))
    assert sum(image.held_pixels for image in images) <= 6 * SIZE
    assert not any("picture" in vars(image) for image in images)
    store.down = False
    drain(line, images)
    assert job.codes() == ["done"] * 8


def test_outage_that_lasts_too_long_fails_its_images(job: LineJob) -> None:
    line, images, store = begin(job, Counted(), 3)
    clock = iter(range(0, 10**9, int(PATIENCE) // 4))
    line.outages._clock = lambda: float(next(clock))
    line.enter(images)
    drain(line, images)
    assert job.codes() == ["storage_unavailable"] * 3
    assert store.calls > 3


def test_one_image_that_cannot_be_stored_fails_alone(job: LineJob) -> None:
    line, images, store = begin(job, Counted(), 40, threads=1)
    store.down, store.refuses = False, {"0.png"}
    line.enter(images)
    drain(line, images)
    assert job.codes() == ["storage_unavailable"] + ["done"] * 39
    assert store.calls >= 39 + OWN_FAULTS


@pytest.mark.parametrize("error", [StorageRefused("403"), StorageFull("no space left")])
def test_refusals_and_full_disks_are_not_outages(error: Exception, job: LineJob) -> None:
    line, images, _ = begin(job, Counted(), 2)

    def put(*_: Any, **__: Any) -> NoReturn:
        raise error

    job.context.store.put = put  # type: ignore[method-assign]
    line.enter(images)
    drain(line, images)
    assert set(job.codes()) == {error.code}  # type: ignore[attr-defined]


def test_results_of_a_cancelled_job_do_not_wait(job: LineJob) -> None:
    line, images, _ = begin(job, Counted(), 4)
    line.enter(images)
    drain(line, images, lambda: all("encoded" in vars(image) for image in images))
    job.stop.set()
    drain(line, images)
    assert job.codes() == ["pending"] * 4
    assert not any(image.recorded for image in images)


def test_images_wait_for_s3_as_their_source(job: LineJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """They don't use up their attempts, and are no longer among those that the device will get soon."""
    line = job.line()
    images = job.join(line, Counted(), job.photos(3), enter=False)
    down, fetch = threading.Event(), images[0].context.fetcher.fetch
    down.set()

    def fetched(url: str, **how: Any) -> Any:
        if down.is_set():
            raise ServerError("s3://photos: the S3 server failed or is busy (503)")
        return fetch(job.server.url(url.removeprefix("s3://photos")), **how)

    monkeypatch.setattr(images[0].context.fetcher, "fetch", fetched)
    for image in images:
        image.item = replace_source(image, f"s3://photos/{image.item.index}.png")
    line.enter(images)
    drain(line, images, lambda: all(image.answers_seen is not None for image in images))
    down.clear()
    drain(line, images)
    assert job.codes() == ["done"] * 3


def replace_source(image: ImageInFlight, source: str) -> Any:
    return image.item.model_copy(update={"source": source})


class TestOutages:
    """The pauses, by a clock of our own."""

    @pytest.fixture
    def images(self, job: LineJob) -> list[ImageInFlight]:
        return job.join(job.line(), Invert(), job.photos(MANY + 1), enter=False)

    def test_service_is_tried_with_growing_pauses_by_one_image_at_a_time(
        self, images: list[ImageInFlight], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "FIRST_PAUSE", 0.5)
        monkeypatch.setattr(module, "LONGEST_PAUSE", LONGEST_PAUSE)
        now = 0.0
        outages = Outages(lambda: now)
        for image in images[:2]:
            assert outages.postpone(image, StorageUnavailable("gone"))
        tried = []
        for tick in range(1, 400):
            now = tick / 4
            for image in outages.due():
                tried.append((now, image.item.index))
                assert outages.postpone(image, StorageUnavailable("gone"))
        assert tried[:7] == [(0.5, 0), (1.5, 1), (3.5, 0), (7.5, 1), (15.5, 0), (30.5, 1), (45.5, 0)]

    def test_no_more_is_taken_for_a_service_once_many_images_wait(self, images: list[ImageInFlight]) -> None:
        outages, service = Outages(), images[0].context.store.service
        for image in images[: MANY - 1]:
            outages.postpone(image, StorageUnavailable("gone"))
        assert not outages.full(service)
        outages.postpone(images[-1], StorageUnavailable("gone"))
        assert outages.full(service)
        assert not outages.full("s3://another")
        assert outages.answered(service) == [*images[: MANY - 1], images[-1]]
        assert not outages.full(service)

    def test_unwanted_images_are_returned_at_once(self, images: list[ImageInFlight]) -> None:
        outages = Outages(lambda: 0.0)
        for image in images[:3]:
            outages.postpone(image, StorageUnavailable("gone"))
        images[1].withdraw()
        assert outages.due() == [images[1]]
