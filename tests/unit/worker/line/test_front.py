"""As many downloads at a time as the device needs, shared by hosts; a slow one holds up only its own images."""

from __future__ import annotations

import threading
from collections import Counter
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared.messages import Item
from imagemill.worker.line import front as module
from imagemill.worker.line.context import Context
from imagemill.worker.line.front import FEWEST, Front
from imagemill.worker.line.image import ImageInFlight


class NoJob:
    """A context that is never stopped."""

    stop = threading.Event()


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Downloads:
    """Downloads that end when the test says so. `begun` holds `HOST/NUMBER`."""

    def __init__(self, clock: Clock, pace: float = 0.0, most: int = 256, per_host: int = 256) -> None:
        self.clock, self.pace = clock, pace
        self.front = Front(self._begin, lambda: self.pace, most=most, per_host=per_host)
        self.begun: list[str] = []
        self.running: dict[str, tuple[ImageInFlight, float]] = {}
        self.count = 0

    def submit(self, host: str, count: int) -> list[ImageInFlight]:
        items = [Item(index=self.count + n, source=f"http://{host}/{n}") for n in range(count)]
        images = [ImageInFlight(item, cast(Context, NoJob)) for item in items]
        self.count += count
        self.front.submit(images)
        return images

    def _begin(self, image: ImageInFlight) -> None:
        name = image.item.source.removeprefix("http://")
        self.begun.append(name)
        if not image.stopped:
            self.running[name] = image, self.clock.now

    def end(self, *names: str, prepared: bool = True) -> None:
        """These downloads are over; without names, all are that run at the moment."""
        for name in names or list(self.running):
            image, since = self.running.pop(name)
            image.spent("fetch", self.clock.now - since)
            self.front.over(image)
            if prepared:
                self.front.prepared()

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.front.look()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_few_downloads_run_until_rate_and_latency_are_known(clock: Clock) -> None:
    downloads = Downloads(clock)
    downloads.submit("shop", 100)
    assert len(downloads.begun) == FEWEST


@pytest.mark.parametrize(("pace", "latency", "places"), [(5, 0.1, FEWEST), (100, 0.5, 100), (300, 0.1, 60), (300, 1.0, 256)])
def test_twice_as_many_run_as_the_device_needs(pace: float, latency: float, places: int, clock: Clock) -> None:
    downloads = Downloads(clock, pace)
    downloads.submit("shop", 1000)
    clock.now += latency
    downloads.end()
    assert len(downloads.running) == places


def test_no_more_than_the_limit_run_from_one_host(clock: Clock) -> None:
    downloads = Downloads(clock, 1000.0, per_host=5)
    downloads.submit("shop", 20)
    downloads.submit("other", 20)
    assert Counter(name.partition("/")[0] for name in downloads.running) == {"shop": 5, "other": 5}


def test_downloads_wait_for_cpus_that_fall_behind(clock: Clock) -> None:
    downloads = Downloads(clock)
    downloads.submit("shop", 100)
    downloads.end(prepared=False)
    assert not downloads.running, "all are downloaded, and none is prepared"
    downloads.front.prepared()
    assert len(downloads.running) == 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30)), max_size=10), st.integers(1, 40), st.integers(1, 20))
def test_every_image_is_begun_once_and_no_limit_is_exceeded(submitted: list[tuple[str, int]], most: int, per_host: int) -> None:
    downloads = Downloads(Clock(), most=most, per_host=per_host)
    for host, count in submitted:
        downloads.submit(host, count)
    while downloads.running:
        assert len(downloads.running) <= min(most, FEWEST)
        hosts = Counter(name.partition("/")[0] for name in downloads.running)
        assert max(hosts.values()) <= per_host
        downloads.end(next(iter(downloads.running)))
    assert len(downloads.begun) == downloads.count


def test_slow_host_that_has_taken_all_places_does_not_hold_up_others(clock: Clock) -> None:
    downloads = Downloads(clock)
    downloads.submit("slow", 40)
    downloads.wait(1.0)
    downloads.submit("fast", 8)
    assert not any(name.startswith("fast") for name in downloads.begun)
    downloads.wait(1.5)
    assert downloads.front.slow_hosts() == {"slow"}
    assert Counter(name.partition("/")[0] for name in downloads.begun) == {"slow": FEWEST, "fast": 8}


def test_slow_hosts_together_have_as_many_places_as_all_others(clock: Clock) -> None:
    downloads = Downloads(clock)
    downloads.submit("slow", FEWEST)
    downloads.wait(2.5)
    downloads.submit("stalled", FEWEST)
    downloads.wait(2.5)
    assert downloads.front.slow_hosts() == {"slow", "stalled"}
    downloads.submit("fast", 1)
    assert "fast/0" not in downloads.begun
    downloads.end(*[name for name in downloads.running if name.startswith("slow")])
    assert "fast/0" in downloads.begun


def test_host_is_not_slow_because_of_a_few_stragglers(clock: Clock) -> None:
    """Of a host that answers all others quickly; or else its images would be overtaken for nothing."""
    downloads = Downloads(clock)
    downloads.submit("shop", 8)
    downloads.wait(1.0)
    downloads.end("shop/3")
    downloads.wait(2.0)
    assert not downloads.front.slow_hosts()


def test_host_that_was_slow_is_not_once_it_answers_quickly(clock: Clock) -> None:
    downloads = Downloads(clock)
    downloads.submit("slow", 4)
    downloads.wait(3.0)
    downloads.end()
    assert downloads.front.slow_hosts() == {"slow"}, "it was a moment ago"
    downloads.submit("slow", 1)
    downloads.end()
    assert not downloads.front.slow_hosts()


def test_hosts_take_turns(clock: Clock) -> None:
    downloads = Downloads(clock)
    downloads.submit("busy", FEWEST)
    downloads.submit("large", FEWEST)
    downloads.submit("small", 2)
    downloads.end(*[f"busy/{n}" for n in range(4)])
    assert sorted(downloads.begun[FEWEST:]) == ["large/0", "large/1", "small/0", "small/1"]


def test_unwanted_images_take_no_place(clock: Clock) -> None:
    downloads = Downloads(clock)
    images = downloads.submit("shop", 3 * FEWEST)
    for image in images[FEWEST : 2 * FEWEST]:
        image.withdraw()
    downloads.end("shop/0")
    assert len(downloads.running) == FEWEST
    assert f"shop/{2 * FEWEST}" in downloads.running


def test_image_that_is_stopped_as_it_is_begun_gives_its_place_back(clock: Clock) -> None:
    downloads = Downloads(clock)
    images = downloads.submit("shop", 2 * FEWEST)
    images[0].withdraw()
    downloads.front.dropped(images[0])
    downloads.front.dropped(images[0])
    assert len(downloads.begun) == FEWEST + 1


def test_only_the_latest_hosts_are_remembered(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_HOSTS", 2)
    downloads = Downloads(clock)
    for host, known in (("a", {"a"}), ("b", {"a", "b"}), ("c", {"b", "c"})):
        downloads.submit(host, 1)
        downloads.wait(3.0)
        downloads.end()
        assert downloads.front.slow_hosts() == known


def test_closed_front_begins_nothing_more(clock: Clock) -> None:
    downloads = Downloads(clock)
    downloads.submit("shop", 2 * FEWEST)
    downloads.front.close()
    downloads.end()
    downloads.submit("shop", 1)
    assert len(downloads.begun) == FEWEST
