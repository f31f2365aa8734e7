"""file:// addresses, and the folders that they may name."""

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

BLOCK = 1 << 20


def path_of(url: str) -> Path:
    """The path that `file:///absolute/path` names; percent-encoded characters are decoded."""
    return Path(unquote(urlsplit(url).path))


def is_below(path: Path, roots: Iterable[Path]) -> bool:
    """Whether a path without symbolic links is one of the `roots` or lies below one."""
    return any(path.is_relative_to(root.resolve()) for root in roots)


def read_file(url: str, roots: Iterable[Path], max_bytes: int) -> bytes:
    """The bytes of a regular file below one of `roots`.

    Symbolic links count as where they lead; what is checked is the file that was opened, so a link
    changed in between gets nobody out. Raises ForbiddenAddress, NotFound, AccessDenied, TooLarge, Unreachable.
    """
    roots = tuple(roots)
    try:
        path = path_of(url)
        _check(path.resolve(), url, roots)  # first, so that nobody learns what exists elsewhere
        with open(path, "rb", opener=open_at_once) as file:
            _check(_opened_path(file.fileno(), path), url, roots)
            return _read(file, url, max_bytes)
    except (OSError, ValueError, RuntimeError) as error:
        raise _meaning(error, url) from error


def open_at_once(path: str, flags: int) -> int:
    """An opener that does not wait for a named pipe's writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read(file: BinaryIO, url: str, max_bytes: int) -> bytes:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise ForbiddenAddress(f"{shown(url)} is no regular file")
    blocks, size = [], os.fstat(file.fileno()).st_size
    if size > max_bytes:
        raise TooLarge(f"{shown(url)} has {size} bytes; the limit is {max_bytes}")
    left = max_bytes
    while block := file.read(BLOCK):  # to its end: it may grow, and some files say nothing of their size
        left -= len(block)
        if left < 0:
            raise TooLarge(f"{shown(url)} has more than {max_bytes} bytes, the limit")
        blocks.append(block)
    return b"".join(blocks)


def _opened_path(descriptor: int, path: Path) -> Path:
    """Where an open file really is: from the kernel, or on systems that don't say, by comparing it with its path."""
    try:
        return Path(f"/proc/self/fd/{descriptor}").readlink()
    except OSError:
        real = path.resolve(strict=True)
        if not os.path.samestat(real.lstat(), os.fstat(descriptor)):
            raise ForbiddenAddress(f"{path} changed while it was opened") from None
        return real


def _check(real: Path, url: str, roots: tuple[Path, ...]) -> None:
    if not is_below(real, roots):
        raise ForbiddenAddress(f"{shown(url)} is not below a folder that IMAGEMILL_FILES__READ_ROOTS allows")


def _meaning(error: Exception, url: str) -> ImageError:
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, IsADirectoryError):
        return ForbiddenAddress(f"{shown(url)} is no regular file")
    # ValueError: %00 in the path. RuntimeError: links in a circle, before Python 3.13.
    if isinstance(error, ValueError | RuntimeError) or number in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
        return NotFound(f"{shown(url)} does not exist")
    if isinstance(error, PermissionError):
        return AccessDenied(f"{shown(url)} may not be read by the worker's user")
    return Unreachable(f"{shown(url)} can't be read: {sentence(error)}")
