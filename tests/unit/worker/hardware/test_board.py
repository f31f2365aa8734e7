"""What processes that share a GPU tell one another."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

from imagemill.shared.settings import Settings, WorkerSettings
from imagemill.worker.hardware.board import Board
from imagemill.worker.hardware.device import Device

PATIENCE = 20
NOTES = 200
fork = multiprocessing.get_context("fork")


def write(board: Board, name: str) -> None:
    for number in range(NOTES):
        board.write(name, {"latest": number})


def in_processes(*calls: tuple[Any, ...]) -> list[int | None]:
    processes = [fork.Process(target=target, args=arguments) for target, *arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    return [process.exitcode for process in processes]


def test_notes_of_several_processes_are_all_kept() -> None:
    board = Board()
    assert board.read("a") is None
    before = board.version
    assert in_processes((write, board, "a"), (write, board, "b")) == [0, 0]
    assert [board.read(name) for name in ("a", "b", "c")] == [{"latest": NOTES - 1}] * 2 + [None]
    assert board.version == before + 2 * NOTES


def die_writing(board: Board) -> None:
    pwrite = os.pwrite

    def half(file: int, data: bytes, offset: int) -> int:
        pwrite(file, data[: len(data) // 2], offset)
        os._exit(9)

    os.pwrite = half
    board.write("a", "b" * 1000)


def test_process_that_dies_while_it_writes_stops_nobody() -> None:
    board = Board()
    board.write("a", 1)
    assert in_processes((die_writing, board)) == [9]
    assert board.read("a") is None
    board.write("a", 2)
    assert board.read("a") == 2


def test_only_children_that_share_a_gpu_have_a_board() -> None:
    def board(gpu: int | None, children: int) -> Board | None:
        settings = Settings(_env_file=None, worker=WorkerSettings(gpu=gpu))  # type: ignore[call-arg]
        return Device.of(settings, children).board

    assert board(None, 4) is None
    assert board(0, 1) is None
    assert board(0, 2) is not None
