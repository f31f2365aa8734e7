"""file:// addresses, and the folders that they may name."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from shared.errors import AccessDenied, ForbiddenAddress, NotFound, TooLarge, Unreachable, sentence
from shared.urls import shown


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
        # O_NONBLOCK: opening a named pipe would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            _check(_opened_path(descriptor, path), url, roots)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ForbiddenAddress(f"{shown(url)} is no regular file")
            if status.st_size > max_bytes:
                raise TooLarge(f"{shown(url)} has {status.st_size} bytes; the limit is {max_bytes}")
            data = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: %00 in the path
        raise NotFound(f"{shown(url)} does not exist") from error
    except PermissionError as error:
        raise AccessDenied(f"{shown(url)} may not be read by the worker's user") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links, in older Pythons
        raise Unreachable(f"{shown(url)} can't be read: {_reason(error)}") from error
    if len(data) > max_bytes:
        raise TooLarge(f"{shown(url)} has more than {max_bytes} bytes, the limit")
    return data


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


def _reason(error: Exception) -> str:
    return (error.strerror or sentence(error)) if isinstance(error, OSError) else sentence(error)
