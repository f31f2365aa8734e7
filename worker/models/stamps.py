"""Detects that a model's files have changed, without reading them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR

Stamp = tuple[tuple[str, int, int, int], ...]
"""Path, size, modification time in nanoseconds and inode of each file."""


def stamp(folder: Path, name: str) -> Stamp:
    """The files of one entry of the catalogue in its engine's folder: `name.*`, and whatever is in the folder `name`.

    Files that remember checksums, which nodes write themselves, and those that are being written don't count.
    """
    tops = (entry for entry in _entries(folder) if entry.name == name or entry.name.startswith(f"{name}."))
    return tuple(sorted(_of(entry) for top in tops for entry in _files(top)))


def stamp_at(*places: Path) -> Stamp:
    """The same of files, and of whatever is in folders; nothing of those that are not there."""
    found = []
    for place in places:
        with suppress(OSError):
            status = place.stat()
            if S_ISDIR(status.st_mode):
                found += [_of(inner) for entry in _entries(place) for inner in _files(entry)]
            else:
                found.append((str(place), status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(sorted(found))


def size(folder: Path, name: str) -> int:
    """Bytes of these files."""
    return sum(entry[1] for entry in stamp(folder, name))


def _of(entry: os.DirEntry[str]) -> tuple[str, int, int, int]:
    status = entry.stat()
    return entry.path, status.st_size, status.st_mtime_ns, status.st_ino


def _entries(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """The readable contents of a folder; nothing if the folder is not there."""
    with suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            if not entry.name.startswith(".") and not entry.name.endswith(".sums.json"):
                with suppress(OSError):  # it has just gone
                    entry.stat()
                    yield entry


def _files(entry: os.DirEntry[str]) -> Iterator[os.DirEntry[str]]:
    if entry.is_dir():
        for inner in _entries(entry.path):
            yield from _files(inner)
    else:
        yield entry
