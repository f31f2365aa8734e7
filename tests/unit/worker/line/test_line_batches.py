"""Batches on the device, while other threads fetch and store, within bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from imagemill.shared.errors import DeviceLost
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.batch_sizes import BatchSizes, Known
from imagemill.worker.operations.base import Inputs, Sample, Spec, Work
from tests.conftest import photo
from tests.devices import DEAD, FakeGpu
from tests.fakes import Invert
from tests.services.images import Handler, reply
from tests.unit.worker.line.chunks import SIZE, Chunk, Gate, running
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
def test_gpu_batch_is_as_large_as_memory_and_policy_allow(room: int, batch: str, expected: list[int], chunk: Chunk) -> None:
    items, operation = chunk.photos(12), Sized(room)
    chunk.line(operation, items, sizes=operation.known, wait=60, batch=batch, threads=3).run(items)
    assert operation.sizes == expected
    assert chunk.codes() == ["done"] * 12


@pytest.mark.parametrize("together", [True, False])
def test_record_holds_the_batch_size_that_went_through_the_model(together: bool, chunk: Chunk) -> None:
    """Half of the first batch, which does not fit; 1 if the engine runs samples one by one anyway."""
    items, operation = chunk.photos(6), Sized(room=4)
    operation.together = lambda _: together  # type: ignore[method-assign]
    operation.known = BatchSizes(operation.gpu, {repr((72, 96, 3)): Known({1: 500}, fits=8)})
    chunk.line(operation, items, sizes=operation.known, wait=60, threads=3).run(items)
    assert operation.sizes == [3, 3]
    batches = [row.result.batch for row in chunk.rows() if row.result]
    assert batches == [3 if together else 1] * 6


def test_slow_image_does_not_hold_up_the_others(chunk: Chunk) -> None:
    items, operation = chunk.photos(4), Sized(room=8)

    def slow(handler: Handler) -> None:
        assert operation.ran.wait(60), "the others are waiting for this one"
        reply(handler, 200, photo(3))

    chunk.images.routes["/3.png"] = slow
    chunk.line(operation, items, sizes=operation.known, wait=0.1).run(items)
    assert sum(operation.sizes) == 4
    assert chunk.codes() == ["done"] * 4


def test_lost_device_ends_the_chunk_and_fails_no_image(chunk: Chunk) -> None:
    class Poisoned(Invert):
        def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
            raise DEAD["illegal access"]()

    items = chunk.photos(6)
    with pytest.raises(DeviceLost):
        chunk.line(Poisoned(), items).run(items)
    assert chunk.codes() == ["pending"] * 6


def test_fetching_running_and_storing_overlap(chunk: Chunk) -> None:
    items = chunk.photos(6)
    operation = Gate(at=2)
    with running(chunk.line(operation, items), items):
        assert operation.inside.wait(60)
        wait_until(lambda: len(chunk.recorded()) == 1, "the image before it is stored and recorded")
        wait_until(lambda: sum(chunk.images.hits.values()) == 6, "the images behind it are fetched")
        assert len(list(chunk.folder.glob("*.png"))) == 1
        operation.open.set()
    assert chunk.codes() == ["done"] * 6


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
def test_decoded_pixels_never_exceed_the_look_ahead(most: int, chunk: Chunk) -> None:
    items = chunk.photos(15)
    operation = Counting(lambda: sum(chunk.images.hits.values()) == 15)
    chunk.line(operation, items, look_ahead=most * SIZE + SIZE // 2).run(items)
    assert operation.most <= most * SIZE
    assert chunk.codes() == ["done"] * 15


def test_image_larger_than_the_look_ahead_is_still_done(chunk: Chunk) -> None:
    items = chunk.photos(5)
    chunk.line(Invert(), items, look_ahead=SIZE - 1).run(items)
    assert chunk.codes() == ["done"] * 5
