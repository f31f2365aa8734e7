from __future__ import annotations

import fcntl
from pathlib import Path
from threading import Event, Thread

import pytest

from imagemill.worker.models.workshop import workshop


def test_what_a_killed_process_has_left_is_deleted(tmp_path: Path) -> None:
    left = tmp_path / ".making-a.onnx"
    left.mkdir()
    (left / "half").touch()
    with workshop(tmp_path / "a.onnx") as work:
        assert work == left
        assert not list(work.iterdir())
        (work / "a.onnx").touch()
    assert not list(tmp_path.iterdir())


def test_processes_that_make_the_same_file_wait_for_each_other(tmp_path: Path) -> None:
    waiting, entered = Event(), Event()

    def second() -> None:
        waiting.set()
        with workshop(tmp_path / "a.onnx") as work:
            (work / "b").touch()  # in a folder that the first hasn't deleted
            entered.set()

    thread = Thread(target=second)
    with workshop(tmp_path / "a.onnx") as work:
        (work / "half").touch()
        thread.start()
        waiting.wait()
        with pytest.raises(BlockingIOError), workshop(tmp_path / "a.onnx", wait=False):
            pass
        with workshop(tmp_path / "b.onnx", wait=False):
            assert (work / "half").is_file()
        assert not entered.is_set()
    thread.join()
    assert entered.is_set()
    assert not list(tmp_path.iterdir())


def test_lock_of_a_folder_that_was_deleted_meanwhile_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = fcntl.flock, list[int]()

    def slow(lock: int, how: int) -> None:
        if not calls:
            (tmp_path / ".making-a.onnx").rmdir()
        calls.append(how)
        real(lock, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with workshop(tmp_path / "a.onnx") as work:
        assert work.is_dir()
    assert len(calls) == 2
    assert not list(tmp_path.iterdir())
