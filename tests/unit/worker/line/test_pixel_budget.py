"""The budget of decoded pixels."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.worker.line.pixel_budget import PixelBudget
from imagemill.worker.line.stopped import Stopped
from tests.workers import wait_until


@settings(max_examples=50)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=24), st.integers(1, 10))
def test_budget_holds_except_for_one_large_image_alone(sizes: list[int], total: int) -> None:
    budget, counting = PixelBudget(total), threading.Lock()
    inside: list[int] = []
    crowds: list[list[int]] = []

    def pass_through(pixels: int) -> None:
        budget.acquire(pixels)
        with counting:
            inside.append(pixels)
            crowds.append(list(inside))
        with counting:
            inside.remove(pixels)
        budget.release(pixels)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(pass_through, sizes))
    assert len(crowds) == len(sizes)
    # Images without pixels cost nothing, so they may be inside with any other.
    assert all(sum(crowd) <= total or sum(size > 0 for size in crowd) == 1 for crowd in crowds)


def waits(thread: threading.Thread) -> bool:
    """Whether a thread is waiting for a condition."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code is threading.Condition.wait.__code__


def test_small_images_do_not_keep_overtaking_a_large_one() -> None:
    budget, came = PixelBudget(10), []

    def enter(pixels: int) -> None:
        budget.acquire(pixels)
        came.append(pixels)
        budget.release(pixels)

    budget.acquire(6)
    large = threading.Thread(target=enter, args=(8,))
    large.start()
    wait_until(lambda: waits(large), "the large one is waiting")
    small = [threading.Thread(target=enter, args=(1,)) for _ in range(4)]
    for one in small:
        one.start()
    # Each is now inside `acquire` or, if it were unfair, past it.
    wait_until(lambda: all(not one.is_alive() or asks(one) for one in small), "the small ones are inside acquire")
    budget.release(6)
    for one in (large, *small):
        one.join(60)
    assert came == [8, 1, 1, 1, 1]


def asks(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code is not PixelBudget.acquire.__code__:
        frame = frame.f_back
    return frame is not None


def test_whoever_is_stopped_waits_no_longer_and_takes_nothing() -> None:
    budget, stop = PixelBudget(10), threading.Event()
    budget.acquire(6)
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(budget.acquire, 8, stop.is_set) for _ in range(3)]
        assert not any(one.done() for one in waiting)
        stop.set()
        for one in waiting:
            with pytest.raises(Stopped):
                one.result(60)
    budget.acquire(4)  # is not held up
    budget.release(10)


def test_closed_budget_turns_everyone_away() -> None:
    budget = PixelBudget(10)
    budget.acquire(6)
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(budget.acquire, 8) for _ in range(2)]
        budget.close()
        for one in waiting:
            with pytest.raises(Stopped):
                one.result(60)
