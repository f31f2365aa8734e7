"""Downloads stay within the memory that they may use, and none waits forever."""

from __future__ import annotations

import asyncio
from collections import deque
from threading import Event
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.worker.transfer.byte_budget import ByteBudget
from imagemill.worker.transfer.fetch import Fetched
from imagemill.worker.transfer.network import Network
from tests.unit.worker.transfer.peer import Answer, Peer, Request
from tests.unit.worker.transfer.samples import LOOPBACK, MakeFetcher, got

TOTAL = 100
STEPS = st.lists(
    st.tuples(st.sampled_from(["reserve", "try", "more", "release", "cancel"]), st.integers(0, 150)), min_size=1, max_size=40
)


@given(STEPS)
def test_budget_is_kept_and_first_come_is_first_served(steps: list[tuple[str, int]]) -> None:
    asyncio.run(follow(steps))


async def follow(steps: list[tuple[str, int]]) -> None:
    """Take the steps, and compare with what should be."""
    budget = ByteBudget(TOTAL)
    held = list[int]()
    waiting = deque[tuple[int, asyncio.Task[None]]]()
    for what, number in steps:
        if what == "reserve":
            waiting.append((number, asyncio.create_task(budget.reserve(number))))
        elif what == "try":
            fits = not waiting and (budget.used == 0 or budget.used + number <= TOTAL)
            assert budget.try_reserve(number) == fits
            held += [number] * fits
        elif what == "more" and held:
            fits = budget.used == 0 or budget.used + number <= TOTAL
            assert budget.try_reserve(number, more=True) == fits
            held += [number] * fits
        elif what == "release" and held:
            budget.release(held.pop(number % len(held)))
        elif what == "cancel" and waiting:
            _, task = waiting[number % len(waiting)]
            task.cancel()
            del waiting[number % len(waiting)]
        await settle(waiting, held, budget)
    while held:
        budget.release(held.pop())
        await settle(waiting, held, budget)
    assert not waiting
    assert budget.used == 0


async def settle(waiting: deque[tuple[int, asyncio.Task[None]]], held: list[int], budget: ByteBudget) -> None:
    """Those who got room are at the front, and hold it from now on."""
    for _ in range(4):
        await asyncio.sleep(0)
    while waiting and waiting[0][1].done():
        held.append(waiting.popleft()[0])
    assert not any(task.done() for _, task in waiting)
    assert budget.used == sum(held)
    assert budget.used <= TOTAL or sum(size > 0 for size in held) == 1
    assert not waiting or (budget.used > 0 and budget.used + waiting[0][0] > TOTAL)


@given(st.integers(0, TOTAL))
def test_cancelling_at_the_moment_of_the_grant_loses_no_room(size: int) -> None:
    async def run() -> None:
        budget = ByteBudget(TOTAL)
        assert budget.try_reserve(TOTAL)
        waiter = asyncio.create_task(budget.reserve(size))
        await asyncio.sleep(0)
        budget.release(TOTAL)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        assert budget.used == 0 or not waiter.cancelled()

    asyncio.run(run())


@pytest.mark.parametrize("headers", [(), (("Content-Length", ""),)], ids=["announced", "unannounced"])
def test_downloads_wait_for_room_and_all_arrive(make: MakeFetcher, network: Network, headers: Any) -> None:
    body, together = b"\x89PNG" + bytes(100_000), 40

    async def answer(_: Request) -> Answer:
        return Answer(body=body, headers=headers)

    fetcher = make(**LOOPBACK, memory=350_000, max_bytes=150_000)
    most, left, over = [0], [together], Event()

    def take(future: Any) -> None:
        fetched: Fetched = future.result()
        most[0] = max(most[0], fetcher.room.used)
        assert fetched.data == body
        network.loop.call_later(0.002, give_back, fetched)

    def give_back(fetched: Fetched) -> None:
        fetcher.room.release(fetched.room)
        left[0] -= 1
        if not left[0]:
            over.set()

    with Peer(network, answer) as peer:
        for n in range(together):
            network.start(fetcher.fetch(f"{peer.url}/{n}.png"), take)
        assert over.wait(60)
        assert together < len(peer.requests) <= 3 * together
    assert most[0] <= 350_000
    assert fetcher.room.used == 0


def test_file_larger_than_all_memory_is_fetched_alone(make: MakeFetcher, network: Network) -> None:
    async def answer(_: Request) -> Answer:
        return Answer(body=bytes(1000))

    fetcher = make(**LOOPBACK, memory=100)
    with Peer(network, answer) as peer:
        assert len(got(fetcher, peer.url).data) == 1000
        assert fetcher.room.try_reserve(50)
        waiting = network.start(fetcher.fetch(peer.url))
        network.call(asyncio.sleep(0.05))
        assert not waiting.done()
        fetcher.room.release(50)
        assert waiting.result(60).room == 1000
