"""Local files: read file:// URLs within the folders that the operator allows, and replace files atomically."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from imagemill.shared.errors import AccessDenied, ForbiddenAddress, ImageError, NotFound, TooLarge, Unreachable, sentence
from imagemill.shared.urls import path_of, shown
from imagemill.worker.transfer.byte_budget import NoRoom


def is_below(path: Path, roots: Iterable[Path]) -> bool:
    """Whether a path without symbolic links equals one of the `roots` or lies below one."""
    return any(path.is_relative_to(root.resolve()) for root in roots)


def read_file(url: str, roots: Iterable[Path], max_bytes: int, fits: Callable[[int], bool] = lambda _: True) -> bytes:
    """Read a regular file below one of `roots`. Raises NoRoom if a file of its size does not fit.

    Symbolic links are resolved, and the check is repeated on the opened file, so swapping a link in between doesn't help.
    Raises ForbiddenAddress, NotFound, AccessDenied, TooLarge or Unreachable.
    """
    roots = tuple(roots)
    try:
        path = path_of(url)
        _check(path.resolve(), url, roots)  # before opening, so that errors don't reveal which files exist elsewhere
        with open(path, "rb", opener=open_at_once) as file:
            _check(Path(f"/proc/self/fd/{file.fileno()}").readlink(), url, roots)
            return _read(file, url, max_bytes, fits)
    except (OSError, ValueError, RuntimeError) as error:
        raise _explain(error, url) from error


def open_at_once(path: str, flags: int) -> int:
    """An opener for `open` that doesn't block on a named pipe without a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read(file: BinaryIO, url: str, max_bytes: int, fits: Callable[[int], bool]) -> bytes:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise ForbiddenAddress(f"{shown(url)} is not a regular file")
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        raise TooLarge(f"{shown(url)} has {size} bytes; the limit is {max_bytes}")
    if not fits(size):
        raise NoRoom
    data = file.read(size) + file.read(max_bytes + 1 - size)  # a file may grow, and some report size 0
    if len(data) > max_bytes:
        raise TooLarge(f"{shown(url)} exceeds the limit of {max_bytes} bytes")
    if not fits(len(data)):
        raise NoRoom
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
    """Yield a path to write to, which opens an empty file; on success that file becomes `target`.

    If the block or the replacement fails, `target` keeps its old content. Raises OSError.

    The file has no name until it is complete, so a process that is killed leaves nothing incomplete behind. Where the file
    system has no such files (NFS, for example), it has a hidden name, the same for every writer of one target: the next one
    removes what is left.
    """
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]  # a name of its own may be too long
    nameless, part = True, target.with_name(f".{digest}.new")
    descriptor = _open_nameless(target.parent)
    if descriptor is None:
        nameless, part = False, target.with_name(f".{digest}.part")
        descriptor = _open_anew(part)
    own = os.fstat(descriptor)
    try:
        yield Path(f"/proc/self/fd/{descriptor}") if nameless else part
        os.fsync(descriptor)
        if nameless:
            _link(descriptor, part, target)
        else:
            _check_own(part, own)
            part.replace(target)
        _sync(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(descriptor)
        with suppress(OSError):
            _check_own(part, own)
            part.unlink()


def _open_nameless(folder: Path) -> int | None:
    """A new file without a name; None if the file system has none."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            return None
        raise


def _link(descriptor: int, part: Path, target: Path) -> None:
    """Name a complete file `target`. A file of that name is replaced by way of `part`, which only ever names complete files."""
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    source, name = f"/proc/self/fd/{descriptor}", target.name
    try:
        while True:
            try:
                os.link(source, name, dst_dir_fd=folder, follow_symlinks=True)  # with a descriptor, Python follows the link
                break
            except FileExistsError:
                if name == part.name:  # of another writer, who may have been killed
                    with suppress(FileNotFoundError):
                        part.replace(target)
                name = part.name
    finally:
        os.close(folder)
    if name == part.name:
        with suppress(FileNotFoundError):  # another writer has just done the same for us
            part.replace(target)


def _open_anew(part: Path) -> int:
    """A new file. One that is there is removed; if its writer is alive, it will notice."""
    while True:
        part.unlink(missing_ok=True)
        with suppress(FileExistsError):
            return os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _check_own(part: Path, own: os.stat_result) -> None:
    if not os.path.samestat(part.stat(), own):
        raise OSError(errno.EBUSY, "another process writes the same file", str(part))


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
