"""Several jobs in one line: who shares a batch, who goes first, and who leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.operations.base import Inputs, Sample, Work
from tests.conftest import photo
from tests.fakes import Invert
from tests.unit.worker.line.jobs import SIZE, Gate, LineJob, drain, draining, pixels, source, waiting
from tests.workers import wait_until


class Batches(Gate):
    """Records the file names in each batch. The first one signals `inside` and waits for `open`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.spec = replace(Invert.spec, max_batch=most)
        self.batches: list[list[str]] = []

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        return Work([Sample(picture.pixels, inputs.options, inputs.item.source)], plan=picture)

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        self.batches.append(sorted(sample.footprint.rpartition("/")[2] for sample in samples))
        return super().run(samples)


@pytest.mark.parametrize(("style", "together"), [("pencil-sketch", True), ("detail", False)])
def test_images_of_two_jobs_share_a_batch_only_if_their_options_are_equal(
    style: str, together: bool, job: LineJob, other: LineJob
) -> None:
    operation, sizes, line = Batches(4), BatchSizes(), job.line()
    head, *rest = job.join(line, operation, job.photos(5)[:3], sizes=sizes, style="pencil-sketch", enter=False)
    rest += other.join(line, operation, other.items(["/3.png", "/4.png"]), sizes=sizes, style=style, enter=False)
    line.enter([head])
    with draining(line, [head, *rest]):
        assert operation.inside.wait(60)
        line.enter(rest)
        wait_until(lambda: waiting(line) == 4, "all others wait for the device")
        operation.open.set()
    mine, theirs = ["1.png", "2.png"], ["3.png", "4.png"]
    assert sorted(operation.batches[1:]) == ([mine + theirs] if together else [mine, theirs])
    for one, numbers in ((job, (0, 1, 2)), (other, (3, 4))):
        for row, number in zip(one.rows(), numbers, strict=True):
            assert np.array_equal(pixels(row), 255 - source(number)), "each gets its own result"


def test_bad_image_of_one_job_does_not_hurt_the_other(job: LineJob, other: LineJob) -> None:
    class Picky(Invert):
        def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
            if any(np.array_equal(sample.data, source(1)) for sample in samples):
                raise ZeroDivisionError("by zero")
            return super().run(samples)

    operation, sizes, line = Picky(), BatchSizes(), job.line()
    images = job.join(line, operation, job.photos(3), sizes=sizes)
    other.server.routes["/ok.png"] = job.server.routes["/2.png"]
    images += other.join(line, operation, other.items(["/ok.png"] * 3), sizes=sizes)
    drain(line, images)
    assert job.codes() == ["done", "internal_error", "done"]
    assert other.codes() == ["done"] * 3


def test_first_images_overtake_those_that_wait(job: LineJob, other: LineJob) -> None:
    operation, line = Batches(1), job.line()
    images = job.join(line, operation, job.photos(6))
    with draining(line, images):
        assert operation.inside.wait(60)
        other.server.routes |= {"/urgent.png": photo(7), "/too.png": photo(8)}
        images += other.join(line, operation, other.items(["/urgent.png", "/too.png"]), first=True)
        wait_until(lambda: waiting(line) == 7, "all others wait for the device")
        operation.open.set()
    assert sorted(operation.batches[1:3]) == [["too.png"], ["urgent.png"]]
    assert len(operation.batches) == 8
    assert job.codes() + other.codes() == ["done"] * 8


def test_stopped_job_leaves_the_line_and_the_other_goes_on(job: LineJob, other: LineJob) -> None:
    """The image of the other job needs all of the room, so it gets in only if all pixels of the first are freed."""
    operation, line = Gate(), job.line(look_ahead=2 * SIZE, threads=4)
    images = job.join(line, operation, job.photos(6))
    with draining(line, images):
        assert operation.inside.wait(60)
        wait_until(lambda: waiting(line) == 1, "another image waits for the device")
        job.stop.set()
        operation.open.set()
    assert job.codes().count("done") == 1
    other.server.routes["/wide.png"] = photo(1, 2 * 96, 72)
    drain(line, other.join(line, Invert(), other.items(["/wide.png"])))
    assert other.codes() == ["done"]
