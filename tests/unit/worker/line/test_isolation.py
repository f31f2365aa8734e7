"""After a process died, images run one by one until the culprit is found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from imagemill.worker.imaging.picture import Picture
from imagemill.worker.operations.base import Inputs, Sample
from tests.fakes import Invert
from tests.unit.worker.line.chunks import Chunk


class Order(Invert):
    """Records the order in which images start."""

    def __init__(self) -> None:
        self.order: list[int] = []

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        self.order.append(inputs.item.index)
        return super().prepare(picture, inputs)


def test_after_a_crash_images_run_alone_and_the_culprit_is_given_up(chunk: Chunk) -> None:
    items = chunk.photos(5)
    operation = Order()
    line = chunk.line(operation, items, attempts=3)
    for index, times in ((0, 1), (1, 2), (3, 1)):
        for _ in range(times):
            chunk.ledger.count_attempt(chunk.job, index)
    line.run_alone(items, lost=3)
    assert operation.order == [2, 4, 0, 3]
    assert chunk.codes() == ["done", "worker_lost", "done", "done", "done"]
    assert (line.records.done, line.records.failed) == (4, 1)
    lost = chunk.rows()[1]
    assert (lost.attempts, chunk.images.hits["/1.png"]) == (3, 0)
    assert "died 3 times" in (lost.message or "")
    assert [row.attempts for row in chunk.rows() if row.index != 1] == [3, 2, 3, 2]
    assert chunk.ledger.attempts(chunk.job, range(5)) == {0: 2, 1: 2, 2: 1, 3: 2, 4: 1}


def test_no_image_is_given_up_for_a_crash_in_a_shared_batch(chunk: Chunk) -> None:
    items = chunk.photos(3)
    chunk.line(Invert(), items, attempts=1).run_alone(items, lost=1)
    assert chunk.codes() == ["done"] * 3


@pytest.mark.parametrize("reached", [False, True])
def test_stop_uses_up_no_attempts(reached: bool, chunk: Chunk) -> None:
    class Stops(Invert):
        def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
            if not reached:
                chunk.stop.set()
            return super().prepare(picture, inputs)

        def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
            chunk.stop.set()
            return super().run(samples)

    items = chunk.photos(4)
    chunk.line(Stops(), items).run_alone(items, lost=1)
    assert chunk.codes() == ["done" if reached else "pending", "pending", "pending", "pending"]
    assert chunk.ledger.attempts(chunk.job, range(4)) == {0: int(reached), 1: 0, 2: 0, 3: 0}
