"""Local files: read file:// URLs within the folders that the operator allows, and replace files atomically."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from imagemill.shared.errors import AccessDenied, ForbiddenAddress, ImageError, NotFound, TooLarge, Unreachable, sentence
from imagemill.shared.urls import path_of, shown

NO_NAMELESS_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}
"""Errors of a file system that can't create a file without a name."""


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


@contextmanager
def writing(target: Path) -> Iterator[BinaryIO]:
    """Yield a new file to write to; on success it becomes `target`, otherwise `target` keeps its old content. Raises OSError.

    The file has no name until it is complete, so nothing is left over if this process is killed meanwhile. File systems that
    can't do that, such as NFS, get a file named as in `replacing`.
    """
    try:
        descriptor = os.open(target.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError as error:
        if error.errno not in NO_NAMELESS_FILES:
            raise
        with replacing(target) as part, part.open("xb") as file:
            yield file
        return
    with os.fdopen(descriptor, "wb") as file:
        yield file
        file.flush()
        os.fsync(descriptor)
        _name(descriptor, target)


def _name(descriptor: int, target: Path) -> None:
    """Give a file without a name its name, in one step, or if it replaces another, in two."""
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)  # `link` follows the link in /proc only with a folder's
    link = partial(os.link, f"/proc/self/fd/{descriptor}", dst_dir_fd=folder, follow_symlinks=True)
    try:
        link(target.name)
    except FileExistsError:
        part = target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            link(part.name)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    finally:
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
