"""Read file:// URLs, restricted to the folders that the operator allows."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from imagemill.shared.errors import AccessDenied, ForbiddenAddress, ImageError, NotFound, TooLarge, Unreachable, sentence
from imagemill.shared.urls import shown


def path_of(url: str) -> Path:
    """The path in a `file:///absolute/path` URL, percent-decoded."""
    return Path(unquote(urlsplit(url).path))


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
    data = file.read(max_bytes + 1)  # not just `size`: a file may grow, and some report size 0
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
