"""Batches on the device, while other threads fetch and store, within bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest

from imagemill.shared.errors import DeviceLost
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.batch_sizes import BatchSizes, Known
from imagemill.worker.line.image import ImageInFlight
from imagemill.worker.operations.base import Inputs, Sample, Spec, Work
from tests.conftest import photo
from tests.devices import DEAD, FakeGpu
from tests.fakes import Invert
from tests.services.images import Handler, reply
from tests.unit.worker.line.jobs import SIZE, Gate, LineJob, drain
from tests.workers import wait_until


class Sized(Invert):
    """Records its batch sizes, and takes 800 bytes per image."""

    spec = Spec("stylize", "opencv", max_batch=8)

    def __init__(self, room: int) -> None:
        """`room` is how many images are known to fit on the GPU."""
        self.gpu = FakeGpu(1000 * room)
        self.known = BatchSizes(self.gpu, {repr((72, 96, 3)): Known({1: 800}, fits=room)})
        self.sizes: list[int] = []
        self.ran = threading.Event()

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        self.gpu.take(800 * len(samples))
        self.sizes.append(len(samples))
        self.ran.set()
        return super().run(samples)


@pytest.mark.parametrize(
    ("room", "batch", "expected"), [(8, "throughput", [8, 4]), (3, "throughput", [3] * 4), (8, "quality", [4] * 3)]
)
def test_gpu_batch_is_as_large_as_memory_and_policy_allow(room: int, batch: str, expected: list[int], job: LineJob) -> None:
    items, operation = job.photos(12), Sized(room)
    job.run(operation, items, sizes=operation.known, wait=60, batch=batch, threads=3)
    assert operation.sizes == expected
    assert job.codes() == ["done"] * 12


@pytest.mark.parametrize("together", [True, False])
def test_record_holds_the_batch_size_that_went_through_the_model(together: bool, job: LineJob) -> None:
    """Half of the first batch, which does not fit; 1 if the engine runs samples one by one anyway."""
    items, operation = job.photos(6), Sized(room=4)
    operation.together = lambda _: together  # type: ignore[method-assign]
    operation.known = BatchSizes(operation.gpu, {repr((72, 96, 3)): Known({1: 500}, fits=8)})
    job.run(operation, items, sizes=operation.known, wait=60, threads=3)
    assert operation.sizes == [3, 3]
    batches = [row.result.batch for row in job.rows() if row.result]
    assert batches == [3 if together else 1] * 6


def test_child_that_shares_the_device_waits_only_while_the_other_one_uses_it(job: LineJob) -> None:
    """Not while the images of the other one's batch are passed on."""
    events: list[str] = []

    class Turn(AbstractContextManager[None]):
        def __enter__(self) -> None:
            events.append("begin")

        def __exit__(self, *error: object) -> None:
            events.append("end")

    items, operation = job.photos(2), Sized(room=8)
    line = job.line(turn=Turn(), wait=60)
    computed = line.computed

    def passed_on(image: ImageInFlight) -> None:
        events.append("passed on")
        computed(image)

    line.computed = passed_on  # type: ignore[method-assign]
    drain(line, job.join(line, operation, items, sizes=operation.known))
    assert events == ["begin", "end", "passed on", "passed on"]


def test_slow_image_does_not_hold_up_the_others(job: LineJob) -> None:
    items, operation = job.photos(4), Sized(room=8)

    def slow(handler: Handler) -> None:
        assert operation.ran.wait(60), "the others are waiting for this one"
        reply(handler, 200, photo(3))

    job.server.routes["/3.png"] = slow
    job.run(operation, items, sizes=operation.known, wait=0.1)
    assert sum(operation.sizes) == 4
    assert job.codes() == ["done"] * 4


def test_lost_device_ends_the_run_and_fails_no_image(job: LineJob) -> None:
    class Poisoned(Invert):
        def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
            raise DEAD["illegal access"]()

    items = job.photos(6)
    with pytest.raises(DeviceLost):
        job.run(Poisoned(), items)
    assert job.codes() == ["pending"] * 6


def test_fetching_running_and_storing_overlap(job: LineJob) -> None:
    items = job.photos(6)
    operation = Gate(at=2)
    with job.running(operation, items):
        assert operation.inside.wait(60)
        wait_until(lambda: len(job.recorded()) == 1, "the image before it is stored and recorded")
        wait_until(lambda: sum(job.server.hits.values()) == 6, "the images behind it are fetched")
        assert len(list(job.folder.glob("*.png"))) == 1
        operation.open.set()
    assert job.codes() == ["done"] * 6


class Counting(Invert):
    """Counts the pixels that the line holds at least from `prepare` to `finish`."""

    spec = Spec("stylize", "opencv", max_batch=3)

    def __init__(self, fetched: Callable[[], bool]) -> None:
        self.fetched, self.counting = fetched, threading.Lock()
        self.held = self.most = 0

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        with self.counting:
            self.held += picture.size[0] * picture.size[1]
            self.most = max(self.most, self.held)
        return super().prepare(picture, inputs)

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        wait_until(self.fetched, "all images are fetched")
        return super().run(samples)

    def finish(self, work: Work[Any, Any, Any], outputs: Sequence[Any]) -> Picture:
        with self.counting:
            self.held -= outputs[0].shape[0] * outputs[0].shape[1]
        return super().finish(work, outputs)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_decoded_pixels_never_exceed_the_look_ahead(most: int, job: LineJob) -> None:
    items = job.photos(15)
    operation = Counting(lambda: sum(job.server.hits.values()) == 15)
    job.run(operation, items, look_ahead=most * SIZE + SIZE // 2)
    assert operation.most <= most * SIZE
    assert job.codes() == ["done"] * 15


def test_image_larger_than_the_look_ahead_is_still_done(job: LineJob) -> None:
    items = job.photos(5)
    job.run(Invert(), items, look_ahead=SIZE - 1)
    assert job.codes() == ["done"] * 5
