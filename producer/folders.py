"""The images in folders and under S3 prefixes, recognised by name, or by content if the name says nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from imagemill.producer.rows import Rows, Skipped, SourceRow
from imagemill.shared.errors import InvalidSource
from imagemill.shared.image_files import HEAD, IMAGE_EXTENSIONS, RAW_EXTENSIONS, looks_like_image
from imagemill.shared.s3 import list_objects, read_head

MOST_OPENED = 1000
"""Objects of a prefix that are opened because their names say nothing, at one request of about 20 ms each."""


def read_folder(folder: str, skipped: Skipped) -> Rows:
    """A folder's images, recursively, sorted per folder. Hidden files and folders don't count.

    Raises InvalidSource if there is none.
    """
    return _nonempty(_folder_rows(folder, skipped), f"{folder}: no images in this folder")


def read_prefix(client: Any, url: str, skipped: Skipped) -> Rows:
    """The images under an S3 prefix, in the order of their keys. Raises InvalidSource if there is none."""
    return _nonempty(_prefix_rows(client, url, skipped), f"{url}: no images under this prefix")


def file_url(path: str | Path) -> str:
    """The `file:///absolute/path` URL of a path."""
    return Path(os.path.abspath(path)).as_uri()  # noqa: PTH100  # removes `..` but keeps links


def _nonempty(rows: Rows, reason: str) -> Rows:
    first = next(rows, None)
    if first is None:
        raise InvalidSource(reason)
    yield from chain([first], rows)


def _folder_rows(folder: str, skipped: Skipped) -> Iterator[SourceRow]:
    def fail(error: OSError) -> None:
        raise InvalidSource(f"{error.filename}: {error.strerror}") from error

    root = file_url(folder)
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if Path(parent, name).is_symlink():
                skipped.add(_as_text(Path(parent, name)))
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith("."):
                continue
            if _named_like_an_image(name) or (not _raw(name) and looks_like_image(_head(path))):
                yield SourceRow(_as_text(path), {"source": file_url(path)}, root)
            else:
                skipped.add(_as_text(path))


def _prefix_rows(client: Any, url: str, skipped: Skipped) -> Iterator[SourceRow]:
    opened = 0

    for bucket, key, size in list_objects(client, url):
        if key.endswith("/"):  # a folder, as S3's console makes them
            continue
        address = f"s3://{bucket}/{key}"
        image = _named_like_an_image(key)
        if not image and size and not _raw(key) and opened < MOST_OPENED:
            opened += 1
            with suppress(InvalidSource):  # it may not be read, or not at once
                image = looks_like_image(read_head(client, bucket, key, HEAD))
        if image:
            yield SourceRow(address, {"source": address}, root=url)
        else:
            skipped.add(address)


def _named_like_an_image(name: str) -> bool:
    return name.lower().endswith(tuple(IMAGE_EXTENSIONS))


def _raw(name: str) -> bool:
    return name.lower().endswith(tuple(RAW_EXTENSIONS))


def _head(path: Path) -> bytes:
    """The beginning of a file; empty if it can't be read or is not a file."""
    try:
        if not path.is_file():  # opening a pipe would wait for a writer
            return b""
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError:
        return b""


def _as_text(path: Path) -> str:
    """File names need not be valid text."""
    return os.fsencode(path).decode(errors="backslashreplace")
