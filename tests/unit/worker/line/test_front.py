"""Threads before the device are shared by hosts, and a slow one holds up only its own images."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from imagemill.shared.messages import Item
from imagemill.worker.line import front as module
from imagemill.worker.line.front import Front
from imagemill.worker.line.image import ImageInFlight
from tests.workers import wait_until

NO_CONTEXT: Any = None


class Downloads:
    """Steps that end when the test lets a host respond. `begun` and `over` hold `HOST/NUMBER`."""

    def __init__(self, threads: int) -> None:
        self.front = Front(threads)
        self.begun: list[str] = []
        self.over: list[str] = []
        self.responds: dict[str, threading.Event] = {}
        self.count = 0

    def submit(self, host: str, count: int) -> None:
        self.responds.setdefault(host, threading.Event())
        for number in range(count):
            image = ImageInFlight(Item(index=self.count, source=f"http://{host}/{number}"), NO_CONTEXT)
            self.count += 1
            self.front.submit(self.step, image)

    def step(self, image: ImageInFlight) -> None:
        name = image.item.source.removeprefix("http://")
        self.begun.append(name)
        with image.timed("fetch"):
            assert self.responds[image.host].wait(60)
        self.over.append(name)

    def wait_begun(self, count: int) -> None:
        wait_until(lambda: len(self.begun) >= count, f"{count} downloads begun")

    def wait_over(self, count: int) -> None:
        wait_until(lambda: len(self.over) >= count, f"{count} downloads over")


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Downloads]:
    monkeypatch.setattr(module, "SLOW_SECONDS", 0.1)
    monkeypatch.setattr(module, "GLANCE", 0.02)
    downloads = Downloads(4)
    yield downloads
    downloads.front.close()
    for event in downloads.responds.values():
        event.set()
    downloads.front.join()


def test_slow_host_that_has_filled_all_threads_holds_up_no_other(downloads: Downloads) -> None:
    downloads.submit("slow", 20)
    downloads.wait_begun(4)
    downloads.submit("fast", 8)
    downloads.responds["fast"].set()
    downloads.wait_over(8)
    assert downloads.front.slow_hosts() == {"slow"}
    assert len(downloads.begun) == 4 + 8, "a slow host has no more threads than the others"


def test_slow_hosts_together_have_as_many_threads_as_all_others(downloads: Downloads) -> None:
    downloads.submit("slow", 4)
    wait_until(lambda: downloads.front.slow_hosts() == {"slow"}, "the host is slow")
    downloads.submit("stalled", 4)
    wait_until(lambda: downloads.front.slow_hosts() == {"slow", "stalled"}, "so is the other")
    downloads.submit("fast", 1)
    downloads.responds["slow"].set()  # or else there is no thread left
    downloads.responds["fast"].set()
    downloads.wait_over(5)
    assert sorted(downloads.over) == ["fast/0", "slow/0", "slow/1", "slow/2", "slow/3"]


def test_host_that_was_slow_is_not_once_it_responds_quickly(downloads: Downloads) -> None:
    downloads.submit("slow", 4)
    wait_until(lambda: downloads.front.slow_hosts(), "the host is slow")
    downloads.responds["slow"].set()
    downloads.wait_over(4)
    wait_until(lambda: downloads.front.slow_hosts() == {"slow"}, "it was a moment ago")
    downloads.submit("slow", 1)
    downloads.wait_over(5)
    wait_until(lambda: not downloads.front.slow_hosts(), "it is not slow any more")


def test_hosts_take_turns(downloads: Downloads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOW_SECONDS", 60.0)
    downloads.submit("busy", 4)
    downloads.wait_begun(4)
    downloads.submit("large", 8)
    downloads.submit("small", 2)
    for host in ("large", "small", "busy"):
        downloads.responds[host].set()
    downloads.wait_over(14)
    assert sorted(downloads.begun[4:8]) == ["large/0", "large/1", "small/0", "small/1"]


def test_one_host_has_all_threads(downloads: Downloads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOW_SECONDS", 60.0)
    downloads.submit("only", 9)
    downloads.wait_begun(4)
    downloads.responds["only"].set()
    downloads.wait_over(9)
    assert downloads.begun[:4] == ["only/0", "only/1", "only/2", "only/3"]


def test_only_the_latest_slow_hosts_are_remembered(downloads: Downloads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOW_SECONDS", -1.0)
    monkeypatch.setattr(module, "MOST_HOSTS", 2)
    for host, known in (("a", {"a"}), ("b", {"a", "b"}), ("c", {"b", "c"})):
        downloads.submit(host, 1)
        downloads.responds[host].set()
        wait_until(lambda known=known: downloads.front.slow_hosts() == known, f"{known} are known")  # type: ignore[misc]


def test_closed_front_begins_nothing_more(downloads: Downloads) -> None:
    downloads.submit("slow", 6)
    downloads.wait_begun(4)
    downloads.front.close()
    downloads.responds["slow"].set()
    downloads.front.join()
    assert len(downloads.begun) == 4
