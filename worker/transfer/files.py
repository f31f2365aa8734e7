"""Local files: read file:// URLs within the folders that the operator allows, and replace files atomically."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from imagemill.shared.errors import AccessDenied, ForbiddenAddress, ImageError, NotFound, TooLarge, Unreachable, sentence
from imagemill.shared.urls import path_of, shown


def is_below(path: Path, roots: Iterable[Path]) -> bool:
    """Whether a path without symbolic links equals one of the `roots` or lies below one."""
    return any(path.is_relative_to(root.resolve()) for root in roots)


def read_file(url: str, roots: Iterable[Path], max_bytes: int) -> bytes:
    """Read a regular file below one of `roots`.

    Symbolic links are resolved, and the check is repeated on the opened file, so swapping a link in between doesn't help.
    Raises ForbiddenAddress, NotFound, AccessDenied, TooLarge or Unreachable.
    """
    roots = tuple(roots)
    try:
        path = path_of(url)
        _check(path.resolve(), url, roots)  # before opening, so that errors don't reveal which files exist elsewhere
        with open(path, "rb", opener=open_at_once) as file:
            _check(Path(f"/proc/self/fd/{file.fileno()}").readlink(), url, roots)
            return _read(file, url, max_bytes)
    except (OSError, ValueError, RuntimeError) as error:
        raise _explain(error, url) from error


def open_at_once(path: str, flags: int) -> int:
    """An opener for `open` that doesn't block on a named pipe without a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read(file: BinaryIO, url: str, max_bytes: int) -> bytes:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise ForbiddenAddress(f"{shown(url)} is not a regular file")
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        raise TooLarge(f"{shown(url)} has {size} bytes; the limit is {max_bytes}")
    data = file.read(size) + file.read(max_bytes + 1 - size)  # a file may grow, and some report size 0
    if len(data) > max_bytes:
        raise TooLarge(f"{shown(url)} exceeds the limit of {max_bytes} bytes")
    return data


def _check(real: Path, url: str, roots: tuple[Path, ...]) -> None:
    if not is_below(real, roots):
        raise ForbiddenAddress(f"{shown(url)} is not in a folder allowed by IMAGEMILL_FILES__READ_ROOTS")


def _explain(error: Exception, url: str) -> ImageError:
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, IsADirectoryError):
        return ForbiddenAddress(f"{shown(url)} is not a regular file")
    # ValueError: %00 in the path. RuntimeError: a symlink loop, before Python 3.13.
    if isinstance(error, ValueError | RuntimeError) or number in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
        return NotFound(f"{shown(url)} does not exist")
    if isinstance(error, PermissionError):
        return AccessDenied(f"{shown(url)}: the worker's user has no read permission")
    return Unreachable(f"{shown(url)} can't be read: {sentence(error)}")


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
