"""Replace files atomically: readers see the old content or the new, never part of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an unused path in `target`'s folder to write to; on success that file becomes `target`.

    If the block or the replacement fails, the new file is removed and `target` keeps its old content. Raises OSError.
    """
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield part
        publish(part, target)
    finally:
        part.unlink(missing_ok=True)


def publish(part: Path, target: Path) -> None:
    """Rename a complete file to `target`, in the same folder, so that both survive a power cut. Raises OSError."""
    _sync(part, os.O_RDONLY)
    part.replace(target)
    _sync(target.parent, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
