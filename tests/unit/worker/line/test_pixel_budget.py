"""The budget of decoded pixels."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.worker.line.pixel_budget import PixelBudget


class Crowd:
    """Who is inside, in the order of arrival."""

    def __init__(self, total: int) -> None:
        self.budget = PixelBudget(total)
        self.inside: list[int] = []
        self.came: list[int] = []
        self.unwanted: set[int] = set()

    def enter(self, pixels: int) -> None:
        def go(granted: int) -> None:
            assert granted in (pixels, 0)
            self.came.append(pixels)
            self.inside.append(granted)

        self.budget.enter(pixels, go, lambda: pixels in self.unwanted)

    def leave(self, pixels: int) -> None:
        self.inside.remove(pixels)
        self.budget.release(pixels)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=24), st.integers(1, 10), st.randoms(use_true_random=False))
def test_everyone_gets_in_in_turn_and_only_a_lone_large_image_exceeds_the_total(
    sizes: list[int], total: int, random: Random
) -> None:
    crowd = Crowd(total)
    for pixels in sizes:
        crowd.enter(pixels)
    while crowd.inside:
        # Images without pixels cost nothing, so they may be inside with any other.
        assert sum(crowd.inside) <= total or sum(size > 0 for size in crowd.inside) == 1
        crowd.leave(random.choice(crowd.inside))
    assert crowd.came == sizes


@settings(max_examples=20)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(1, 10))
def test_everybody_gets_in_and_the_total_holds_with_many_threads(sizes: list[int], total: int) -> None:
    budget, counting = PixelBudget(total), threading.Lock()
    inside: list[int] = []
    crowds: list[list[int]] = []

    def pass_through(pixels: int) -> None:
        entered = threading.Event()
        budget.enter(pixels, lambda _: entered.set())
        assert entered.wait(60)
        with counting:
            inside.append(pixels)
            crowds.append(list(inside))
        with counting:
            inside.remove(pixels)
        budget.release(pixels)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(pass_through, sizes))
    assert len(crowds) == len(sizes)
    assert all(sum(crowd) <= total or len(crowd) == 1 for crowd in crowds)


def test_small_images_do_not_overtake_a_large_one() -> None:
    crowd = Crowd(10)
    for pixels in (6, 8, 1, 2):
        crowd.enter(pixels)
    assert (crowd.came, crowd.budget.waiting) == ([6], 3)
    crowd.leave(6)
    assert crowd.came == [6, 8, 1]


def test_unwanted_image_holds_up_nobody_and_takes_nothing() -> None:
    crowd = Crowd(10)
    for pixels in (6, 8, 4):
        crowd.enter(pixels)
    crowd.unwanted = {8}
    crowd.budget.release(0)
    assert crowd.inside == [6, 0, 4]


def test_closed_budget_lets_nobody_in() -> None:
    crowd = Crowd(10)
    crowd.enter(6)
    crowd.enter(8)
    crowd.budget.close()
    crowd.leave(6)
    crowd.enter(1)
    assert crowd.came == [6]


def test_pictures_that_are_kept_take_room_from_images_but_never_all_of_it() -> None:
    crowd, forgotten = Crowd(10), []
    for name, pixels in (("a", 3), ("b", 2), ("c", 4)):
        crowd.budget.keep(name, pixels, lambda name=name: forgotten.append(name))  # type: ignore[misc]
    assert forgotten == ["a", "b"]
    for pixels in (5, 2):
        crowd.enter(pixels)
    assert crowd.inside == [5]
    crowd.budget.drop("c")
    crowd.budget.look()
    assert crowd.inside == [5, 2]


def test_image_gets_in_alone_next_to_a_kept_picture() -> None:
    crowd = Crowd(10)
    crowd.budget.keep("a", 9, lambda: None)
    crowd.enter(10)
    assert crowd.inside == [10]
