"""A hidden folder next to a model's file, to make a variant in that is moved to its place once it is complete."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def workshop(target: Path, *, wait: bool = True) -> Iterator[Path]:
    """An empty folder for one process at a time, in which to make the file `target`; deleted in the end.

    What a process has left that was killed is deleted first. Raises OSError; and BlockingIOError if another process makes the
    same file, unless it is to `wait`.
    """
    work = target.with_name(f".making-{target.name}")
    lock = _locked(work, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        for path in work.iterdir():
            path.unlink()
        yield work
    finally:
        shutil.rmtree(work)
        os.close(lock)


def _locked(work: Path, how: int) -> int:
    """The descriptor of a folder that only this process has locked; the kernel releases it if the process dies."""
    while True:
        work.mkdir(exist_ok=True)
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, how)
            if work.is_dir() and os.path.samestat(os.fstat(lock), work.stat()):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # the process that was waited for has deleted it
