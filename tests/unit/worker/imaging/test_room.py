"""How many pixels are decoded at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

from imagemill.worker.imaging.room import Room


def test_work_waits_for_room_and_large_work_for_being_alone() -> None:
    room, inside, go_on = Room(10), Event(), Event()
    order: list[int] = []

    def work(amount: int) -> None:
        with room.taken(amount):
            order.append(amount)
            if amount == 8:
                inside.set()
                go_on.wait(60)

    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(work, 8)
        inside.wait(60)
        large = threads.submit(work, 20)
        threads.submit(work, 2).result(60)
        assert not large.done()
        go_on.set()
        first.result(60)
    assert order == [8, 2, 20]
