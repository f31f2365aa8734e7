"""Every image ends in one record, or in none if it is not begun, whatever its neighbours do."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from PIL import Image

from imagemill.shared.errors import OperationFailed, OutOfMemory
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.operations.base import Inputs, Sample
from imagemill.worker.operations.job_images import job_image
from imagemill.worker.transfer.byte_budget import ByteBudget
from tests.conftest import photo
from tests.fakes import Invert
from tests.services.images import Handler, answers, failing, reply
from tests.unit.worker.line.jobs import SIZE, Bands, Faulty, Gate, LineJob, Masked, drain, pixels, source
from tests.workers import wait_until


@pytest.mark.parametrize("operation", [Invert, Bands])
def test_each_image_gets_its_own_result_and_exactly_one_record(operation: type[Invert], job: LineJob) -> None:
    items = job.photos(20)
    job.run(operation(), items)
    rows = job.rows()
    for row in rows:
        assert np.array_equal(pixels(row), 255 - source(row.index))
    assert sorted(job.entries()) == list(range(20))
    status = job.ledger.status(job.name)
    assert (status.done, status.failed) == (20, 0)


def test_items_of_one_image_are_fetched_together(job: LineJob) -> None:
    line, images = job.begin(Invert(), job.items([{"source": "/a.png", "part": part} for part in ("upper", "lower", "full")]))

    def slow(handler: Handler) -> None:
        wait_until(lambda: all(image.place == "fetching" for image in images), "all are being fetched")
        reply(handler, 200, photo(0))

    job.server.routes["/a.png"] = slow
    drain(line, images)
    assert job.codes() == ["done"] * 3
    assert job.server.hits["/a.png"] == 1
    assert job.context.fetcher.room.used == 0


def test_images_done_by_two_children_are_recorded_once(job: LineJob) -> None:
    items = job.photos(4)
    for node, counted in (("here", 4), ("there", 0)):
        tally = job.run(Invert(), items, node=node)
        assert (tally.done, tally.failed) == (counted, 0)
    assert sorted(job.entries()) == [0, 1, 2, 3]
    assert {row.result.node for row in job.rows() if row.result} == {"here"}


def test_record_holds_attempts_sizes_and_seconds_per_stage(job: LineJob) -> None:
    job.server.routes["/a.png"] = failing(1, 503, photo(1))
    items = job.items(["/a.png"])
    job.run(Invert(), items)
    (row,) = job.rows()
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
def test_bad_image_fails_alone_with_the_right_code(stage: str, fault: Exception | None, code: str, job: LineJob) -> None:
    items = job.photos(5)
    job.server.routes["/1.png"] = route(stage)
    if stage == "store":
        (job.folder / "1.webp").mkdir(parents=True)
    tally = job.run(Faulty(stage, fault), items, form="webp")
    assert job.codes() == ["done", code, "done", "done", "done"]
    assert (tally.done, tally.failed, tally.codes) == (4, 1, {code: 1})
    bad = job.rows()[1]
    assert bad.message
    assert bad.attempts == (2 if code == "truncated" else 1)
    assert all(pixels(row).shape == (72, 96, 3) for row in job.rows() if row.index != 1)


def test_image_with_a_failed_tile_is_recorded_once(job: LineJob) -> None:
    class Blemish(Bands):
        def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
            if any(np.array_equal(sample.data, source(1)[:18]) for sample in samples):
                raise OperationFailed("this tile can't be done")
            return super().run(samples)

    items = job.photos(4)
    job.run(Blemish(), items)
    assert job.codes() == ["done", "operation_failed", "done", "done"]
    assert sorted(job.entries()) == [0, 1, 2, 3]


def test_stop_finishes_the_running_image_and_leaves_the_rest_unrecorded(job: LineJob) -> None:
    items = job.photos(12)
    operation = Gate()
    with job.running(operation, items, threads=2, look_ahead=SIZE):
        assert operation.inside.wait(60)
        job.stop.set()
        operation.open.set()
    assert sorted(job.codes()) == ["done"] + ["pending"] * 11  # two threads fetch: either of the first two may have come first
    assert sum(job.server.hits.values()) <= 3, "nothing more may be fetched"


@pytest.mark.parametrize("what", ["source", "mask"])
def test_stop_records_no_failure_for_an_image_with_attempts_left(what: str, job: LineJob) -> None:
    def busy(handler: Handler) -> None:
        job.stop.set()
        reply(handler, 503, b"try later")

    job.server.routes |= {"/a.png": photo(1), "/busy.png": busy}
    items = job.items([{"source": "/a.png"} | {what: "/busy.png"}])
    job.run(Masked(), items, kind="inpaint")
    assert job.codes() == ["pending"]


@pytest.mark.parametrize("what", ["mask", "reference"])
def test_stop_while_the_jobs_images_wait_for_their_reference_records_no_failure(what: str, job: LineJob) -> None:
    class Referring(Masked):
        def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
            if what == "reference":
                job_image("reference", job.server.url("/busy.png"), inputs.read)
            return super().prepare(picture, inputs)

    def busy(handler: Handler) -> None:
        wait_until(lambda: all(job.server.hits[f"/{number}.png"] for number in range(4)), "all images are fetched")
        job.stop.set()
        reply(handler, 503, b"try later")

    items = job.photos(4)
    job.server.routes["/busy.png"] = busy
    options = {"mask": job.server.url("/busy.png")} if what == "mask" else {}
    job.run(Referring(), items, kind="inpaint", **options)
    assert job.codes() == ["pending"] * 4
    assert job.server.hits["/busy.png"] == 1


@pytest.mark.timeout(60)
def test_stopped_image_does_not_wait_for_pixels(job: LineJob, other: LineJob) -> None:
    line = job.line(look_ahead=SIZE)
    ahead = job.join(line, Invert(), job.photos(1))
    wait_until(lambda: ahead[0].held_pixels == SIZE, "the budget is used up")
    behind = other.join(line, Invert(), other.photos(3))
    wait_until(lambda: all(hasattr(image, "header") for image in behind), "images wait for pixels")
    other.stop.set()
    wait_until(lambda: line.retry() or all(image.place == "over" for image in behind), "they have left the line")
    drain(line, ahead)
    assert (job.codes(), other.codes()) == (["done"], ["pending"] * 3)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [SoftTimeLimitExceeded(), SystemExit(1)], ids=lambda e: type(e).__name__)
def test_time_limit_ends_the_run_at_once_and_fails_no_image(error: BaseException, job: LineJob) -> None:
    class Endless(Invert):
        def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
            raise error

    items = job.photos(12)
    with pytest.raises(type(error)):
        job.run(Endless(), items, threads=4, look_ahead=SIZE)
    assert job.codes() == ["pending"] * 12
    assert sum(job.server.hits.values()) < 12


@pytest.mark.parametrize("what", ["own mask", "mask of the job"])
def test_slow_mask_holds_up_no_image_of_another_job(what: str, job: LineJob, other: LineJob) -> None:
    """Not even where a single thread prepares all images."""
    job.server.routes |= {"/a.png": photo(1), "/slow.png": job.server.hang}
    line = job.line(workers=1)
    own, options = ({"mask": "/slow.png"}, {}) if what == "own mask" else ({}, {"mask": job.server.url("/slow.png")})
    slow = job.join(line, Masked(), job.items([{"source": "/a.png", **own}]), kind="inpaint", **options)
    assert job.server.stalled.wait(60)
    drain(line, other.join(line, Invert(), other.photos(3)))
    assert other.codes() == ["done"] * 3
    assert slow[0].place == "fetching"
    job.server.released.set()


class Watched(ByteBudget):
    """Remembers the most that was reserved at a time."""

    most = 0

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "used":
            self.most = max(self.most, value)


def test_masks_have_their_own_room_and_give_all_of_it_back(job: LineJob) -> None:
    """Neither do masks wait for the room of images, which wait for them, nor do they take any amount of memory."""
    hole = io.BytesIO()
    Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 16)).save(hole, "PNG")
    mask = hole.getvalue().ljust(len(photo(99)), b"\0")  # what follows its end doesn't count
    job.server.routes |= {f"/{n}.png": photo(n) for n in range(12)} | {"/mask.png": mask}
    items = job.items([{"source": f"/{n}.png", "mask": "/mask.png"} for n in range(12)])
    line, images = job.begin(Masked(), items, kind="inpaint", enter=False)
    fetcher = job.context.fetcher
    fetcher.room, fetcher.mask_room = Watched(3 * len(mask)), Watched(2 * len(mask))
    line.enter(images)
    drain(line, images)
    assert job.codes() == ["done"] * 12
    assert (fetcher.room.used, fetcher.mask_room.used) == (0, 0)
    assert len(mask) <= fetcher.mask_room.most <= 2 * len(mask)


def test_reference_that_no_image_ever_uses_takes_up_no_room(job: LineJob) -> None:
    job.server.routes |= {"/bad.png": b"no image", "/mask.png": photo(1)}
    line, images = job.begin(Masked(), job.items(["/bad.png"]), kind="inpaint", mask=job.server.url("/mask.png"))
    drain(line, images)
    assert job.codes() == ["not_an_image"]
    assert job.server.hits["/mask.png"] == 1
    assert job.context.fetcher.room.used == 0
