"""Turns of processes that share a GPU."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.synchronize import Event

import pytest

from imagemill.shared.settings import Settings, WorkerSettings
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.turn import Turn

PATIENCE = 20
fork = multiprocessing.get_context("fork")


def hold(turn: Turn, mine: Event, over: Event) -> None:
    with turn:
        mine.set()
        over.wait(PATIENCE)
        os._exit(9)  # as if it were killed


def count(turn: Turn, waits: Event, mine: Event) -> None:
    waits.set()
    with turn:
        mine.set()


def test_one_process_at_a_time_and_the_next_when_it_dies() -> None:
    turn = Turn()
    first, over, waits, second = (fork.Event() for _ in range(4))
    holder = fork.Process(target=hold, args=(turn, first, over))
    holder.start()
    assert first.wait(PATIENCE)
    other = fork.Process(target=count, args=(turn, waits, second))
    other.start()
    assert waits.wait(PATIENCE)
    assert not second.wait(0.2), "another process has its turn"
    over.set()
    assert second.wait(PATIENCE)
    holder.join(PATIENCE)
    other.join(PATIENCE)
    assert (holder.exitcode, other.exitcode) == (9, 0)


def test_turn_ends_with_an_error() -> None:
    turn = Turn()
    with pytest.raises(RuntimeError), turn:
        raise RuntimeError
    mine = fork.Event()
    other = fork.Process(target=count, args=(turn, fork.Event(), mine))
    other.start()
    assert mine.wait(PATIENCE)
    other.join(PATIENCE)


@pytest.mark.parametrize(("gpu", "children", "siblings", "turns"), [(None, 4, 1, False), (0, 1, 1, False), (0, 2, 2, True)])
def test_only_children_that_share_a_gpu_take_turns(gpu: int | None, children: int, siblings: int, turns: bool) -> None:
    device = Device.of(Settings(_env_file=None, worker=WorkerSettings(gpu=gpu)), children)  # type: ignore[call-arg]
    assert (device.siblings, isinstance(device.turn, Turn)) == (siblings, turns)
