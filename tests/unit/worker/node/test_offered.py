"""What a node offers, as its processes share it."""

from __future__ import annotations

import copy
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from imagemill.worker.node import offered as module
from imagemill.worker.node.offered import Offered

A, B = "stylize.opencv", "remove-background.rembg.my.model-1.5"


def now() -> float:
    return time.monotonic()


def test_lanes_are_open_until_they_are_closed_and_open_again_with_other_files() -> None:
    lanes = Offered([A, B])
    assert lanes.open() == [A, B]
    assert lanes.close(B, "the model is damaged", now())
    assert (lanes.open(), lanes.closed()[B].reason) == ([A], "the model is damaged")
    assert not lanes.close(B, "another child finds it damaged, too", now()), "it is said once"
    assert lanes.closed()[B].reason == "the model is damaged"
    lanes.offer(B)
    assert (lanes.open(), lanes.closed()) == ([A, B], {})
    assert lanes.close(B, "still damaged", now())


def test_fault_in_files_replaced_in_the_meantime_closes_nothing() -> None:
    lanes = Offered([A])
    began = now()
    lanes.offer(A)
    assert not lanes.close(A, "the old file was damaged", began)
    assert lanes.open() == [A]


def test_lane_whose_model_is_gone_is_neither_open_nor_out_of_service() -> None:
    lanes = Offered([A, B])
    lanes.close(A, "damaged", now())
    for lane in (A, B):
        lanes.withdraw(lane)
    assert (lanes.open(), lanes.closed(), lanes.known()) == ([], {}, [A, B])
    assert not lanes.close(B, "a job that was running misses it", now())
    lanes.offer(A)
    assert lanes.open() == [A]


def test_unknown_lane_can_not_be_closed() -> None:
    assert not Offered([A]).close(B, "damaged", now())


@pytest.mark.parametrize("passing", [True, False])
def test_fault_due_to_lack_of_memory_says_when_to_try_again(passing: bool) -> None:
    lanes = Offered([A])
    lanes.close(A, "no memory", now(), passing=passing)
    assert (lanes.closed()[A].again is not None) is passing


def test_long_reason_is_cut_between_characters() -> None:
    lanes = Offered([A])
    lanes.close(A, "ä" * 1000, now())
    assert set(lanes.closed()[A].reason) == {"ä"}


def test_all_processes_see_what_one_of_them_does() -> None:
    """The parent opens lanes that its children did not know when they were forked; a child closes them."""
    lanes = Offered([A])
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(told, 1)
        seen = lanes.open() == [A, B]
        closed = lanes.close(B, "damaged", now())
        os._exit(0 if seen and closed else 1)
    lanes.offer(B)
    os.write(tell, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (lanes.open(), lanes.closed()[B].reason) == ([A], "damaged")
    os.close(told), os.close(tell)


def test_node_goes_on_without_lanes_beyond_the_limit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    lanes = Offered([A, B])
    lanes.offer("stylize.more")
    assert lanes.open() == [A, B]
    assert "too many models" in caplog.text


def test_threads_of_a_process_agree_on_the_lanes() -> None:
    """Each of them may be the first to see a lane that the parent has opened."""
    parent = Offered([A])
    child = copy.copy(parent)  # the same memory, as after a fork
    for number in range(200):
        parent.offer(f"stylize.x.{number}")
    with ThreadPoolExecutor(8) as threads:
        seen = list(threads.map(lambda _: child.open(), range(64)))
    assert all(lanes == parent.open() for lanes in seen)
