"""The rate at which images are computed: neither idle time nor images that were not computed count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.worker.line.speed import MEMORY, Speed

SECONDS = st.floats(0.01, 100)
BATCHES = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 64), SECONDS), min_size=1, max_size=20)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def work(speed: Speed, clock: Clock, lane: str, images: int, seconds: float) -> None:
    clock.now += seconds
    speed.ran(lane, images, max(1, images), seconds)


def test_nothing_is_known_before_the_first_image() -> None:
    clock = Clock()
    speed = Speed(clock)
    speed.resume()
    assert (speed.rates(), speed.computed("a"), speed.batch("a")) == ({}, 0, 0)
    work(speed, clock, "a", 0, 5.0)
    assert (speed.rates(), speed.computed("a")) == ({}, 0), "its only image failed"


@given(BATCHES)
def test_rate_is_between_the_slowest_and_the_fastest_batchs(batches: list[tuple[str, int, float]]) -> None:
    clock = Clock()
    speed = Speed(clock)
    speed.resume()
    for batch in batches:
        work(speed, clock, *batch)
    for lane, rate in speed.rates().items():
        each = [images / seconds for name, images, seconds in batches if name == lane]
        assert min(each) * 0.999 <= rate <= max(each) * 1.001
    for lane in "ab":
        sizes = [images for name, images, _ in batches if name == lane]
        assert speed.computed(lane) == sum(sizes)
        assert speed.batch(lane) == (max(1, sizes[-1]) if sizes else 0)


@given(BATCHES, st.lists(st.floats(0, 10_000), min_size=20, max_size=20))
def test_idle_time_does_not_count(batches: list[tuple[str, int, float]], idle: list[float]) -> None:
    rates = []
    for pauses in ([0.0] * 20, idle):
        clock = Clock()
        speed = Speed(clock)
        for batch, pause in zip(batches, pauses, strict=False):
            clock.now += pause
            speed.resume()
            speed.resume()  # further images
            work(speed, clock, *batch)
            speed.pause()
        rates.append(speed.rates())
    assert rates[0] == pytest.approx(rates[1], rel=1e-3)


def test_time_between_batches_counts_while_there_is_work() -> None:
    """A device that waits for downloads is as slow as they are."""
    clock = Clock()
    speed = Speed(clock)
    speed.resume()
    for _ in range(5):
        clock.now += 3.0
        work(speed, clock, "a", 2, 1.0)
    assert speed.rates() == {"a": pytest.approx(0.5)}


def test_rate_follows_a_change_of_pace() -> None:
    clock = Clock()
    speed = Speed(clock)
    speed.resume()
    for rate in (10, 1):
        for _ in range(int(4 * MEMORY)):
            work(speed, clock, "a", rate, 1.0)
        assert speed.rates()["a"] == pytest.approx(rate, rel=0.2)


def test_lanes_are_measured_apart() -> None:
    clock = Clock()
    speed = Speed(clock)
    speed.resume()
    for _ in range(5):
        work(speed, clock, "fast", 8, 1.0)
        work(speed, clock, "slow", 1, 4.0)
    assert speed.rates() == {"fast": pytest.approx(8), "slow": pytest.approx(0.25)}


def test_pace_is_what_the_device_could_do_if_it_never_waited_and_batches_were_full() -> None:
    clock = Clock()
    speed = Speed(clock)
    speed.resume()
    assert speed.pace() == speed.pace("a") == 0
    for batch in (1, 2, 8, 3):
        clock.now += 1.0
        speed.ran("a", batch, batch, 0.5)
    assert speed.pace() == speed.pace("a") == pytest.approx(16, rel=0.1)
    assert speed.pace("b") == 0


def test_pace_expects_the_next_batch_to_be_larger_while_batches_grow() -> None:
    clock = Clock()
    speed = Speed(clock, siblings=2)
    speed.resume()
    paces = []
    for batch, growth in ((1, 4), (4, 8), (32, 1)):
        clock.now += 0.1
        speed.ran("a", batch, batch, 0.1, growth)
        paces.append(speed.pace())
    assert paces == [pytest.approx(each, rel=0.02) for each in (20, 160, 160)]


def test_pace_counts_images_not_samples() -> None:
    """An image may have several tiles, of which only the last completes it."""
    clock = Clock()
    speed = Speed(clock)
    speed.resume()
    for completed in (0, 1, 0, 1):
        clock.now += 1.0
        speed.ran("a", completed, 2, 1.0)
    assert speed.pace() == pytest.approx(0.5, rel=0.1)


def test_pace_forgets_a_batch_that_was_faster_than_all_others() -> None:
    clock = Clock()
    speed = Speed(clock)
    speed.resume()
    speed.ran("a", 1, 1, 0.001)
    for _ in range(int(8 * MEMORY)):
        clock.now += 1.0
        speed.ran("a", 1, 1, 1.0)
    assert speed.pace() == pytest.approx(1, rel=0.5)
