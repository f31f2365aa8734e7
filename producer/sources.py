"""Read lists of images (text, CSV, JSONL, stdin, folders, S3 prefixes, single URLs), one row at a time.

At most one line (64 KiB) is held in memory. A row that can't be read is yielded as a `BadRow`, so that the
caller decides what to do with it; a list that can't be read at all raises InvalidSource.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from dataclasses import field as attribute
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from pydantic import ValidationError

from imagemill.shared.errors import InvalidSource
from imagemill.shared.messages import Item
from imagemill.shared.options.base import nearest, validation_sentence
from imagemill.shared.s3 import IMAGE_EXTENSIONS, list_images
from imagemill.shared.urls import percent_encoded, shown

MAX_LINE = 65_536
"""Bytes per line of a list; a longer line is a bad row."""
MAX_SHOWN = 160
"""Characters of a bad row that are kept for messages."""
SOURCE_NAMES = ("source", "url", "image")
ADDRESSES = ("source", "mask")
FIELDS = (*SOURCE_NAMES, "mask", "boxes", "name")
LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row as read. `fields` may hold source, mask, boxes and name; their values are not checked yet."""

    place: str
    fields: dict[str, Any]
    root: str | None = attribute(default=None, compare=False)
    """URL of the folder or prefix that was given and holds the image; None for a row of a list."""
    columns: dict[str, str] | None = attribute(default=None, compare=False)
    """A table's cells by column, in lower case; for the names of results."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """An invalid row. `text` is its beginning, without the query strings of URLs."""

    place: str
    reason: str
    text: str


Rows = Iterator[SourceRow | BadRow]


def read_sources(sources: Sequence[str], *, s3: Callable[[], Any]) -> Rows:
    """Stream the rows of all `sources` in order; `s3` returns the client that lists prefixes.

    A source is `-` (stdin: text or JSONL), a list (.txt, .csv, .tsv, .jsonl, .ndjson; UTF-8), a folder,
    an `s3://bucket/prefix`, an image's URL, or an image's path. Raises InvalidSource immediately if a
    source does not exist, and during iteration if it can't be read.
    """
    readers = [_reader(source, s3) for source in sources]
    return (row for reader in readers for row in reader())


def parse(row: SourceRow, index: int) -> Item:
    """Validate a row as item number `index` of its job. Raises InvalidSource with the reason."""
    addresses = {name: percent_encoded(row.fields[name]) for name in ADDRESSES if isinstance(row.fields.get(name), str)}
    try:
        return Item(index=index, **row.fields | addresses)
    except ValidationError as error:
        raise InvalidSource(validation_sentence(error)) from error


def refused(row: SourceRow, reason: str) -> BadRow:
    """A row that was read but is invalid."""
    return BadRow(row.place, reason, _cut(str(row.fields.get("source", ""))))


def _cut(text: str) -> str:
    text = shown(text)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def _reader(source: str, s3: Callable[[], Any]) -> Callable[[], Rows]:
    """The function that reads a source. Raises InvalidSource if there is none."""
    if source == "-":
        return lambda: _read_lines("stdin", nullcontext(sys.stdin.buffer), None)
    if "://" in source:
        return _address_reader(source, s3)
    path = Path(source)
    suffix = path.suffix.lower()
    if not path.exists():
        raise InvalidSource(f"no such file or folder: {source!r}")
    if path.is_dir():
        empty = f"{source}: no images in this folder ({', '.join(sorted(IMAGE_EXTENSIONS))})"
        return lambda: _nonempty(_read_folder(source), empty)
    if suffix in (".csv", ".tsv"):
        return lambda: _read_table(source)
    if suffix in LIST_SUFFIXES or path.is_fifo():
        kind = {".txt": _text_row, ".jsonl": _json_row, ".ndjson": _json_row}.get(suffix)
        return lambda: _read_lines(source, _open(source), kind)
    if suffix in IMAGE_EXTENSIONS:
        return lambda: iter([SourceRow(source, {"source": file_url(source)}, root=file_url(path.parent))])
    if suffix == ".json":
        raise InvalidSource(f"{source}: a .json file can't be read row by row; write one JSON object per line (.jsonl)")
    raise InvalidSource(
        f"{source}: not a list ({', '.join(LIST_SUFFIXES)}) or an image ({', '.join(sorted(IMAGE_EXTENSIONS))})"
    )


def _address_reader(source: str, s3: Callable[[], Any]) -> Callable[[], Rows]:
    try:
        parts = urlsplit(source)
    except ValueError as error:
        raise InvalidSource(f"{shown(source)!r} is not a URL: {error}") from error
    last = (source if parts.scheme == "s3" else parts.path).rpartition("/")[2]  # an S3 key may contain ? and #
    suffix = Path(last).suffix.lower()
    if suffix in LIST_SUFFIXES:
        raise InvalidSource(f"{shown(source)}: lists are read only from files and stdin; download it first")
    if parts.scheme == "s3" and suffix not in IMAGE_EXTENSIONS:
        empty = f"{source}: no images under this prefix"
        return lambda: _nonempty((SourceRow(url, {"source": url}, root=source) for url in list_images(s3(), source)), empty)
    return lambda: iter([SourceRow(_cut(source), {"source": source})])


def _nonempty(rows: Rows, reason: str) -> Rows:
    """The rows; raises InvalidSource if there are none."""
    first = next(rows, None)
    if first is None:
        raise InvalidSource(reason)
    yield from chain([first], rows)


def _read_folder(folder: str) -> Rows:
    """A folder's images, recursively, sorted per folder; hidden files and folders, and links to folders, are skipped."""

    def fail(error: OSError) -> None:
        raise InvalidSource(f"{error.filename}: {error.strerror}") from error

    root = file_url(folder)
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower() in IMAGE_EXTENSIONS and not name.startswith("."):
                place = os.fsencode(path).decode(errors="backslashreplace")  # file names need not be valid text
                yield SourceRow(place, {"source": file_url(path)}, root)


def file_url(path: str | Path) -> str:
    """The `file:///absolute/path` URL of a path."""
    return Path(os.path.abspath(path)).as_uri()  # noqa: PTH100  # removes `..` but keeps links


def _open(path: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise InvalidSource(f"{path}: {error.strerror}") from error


class _Lines:
    """The lines of a list as text. `fault` is the first problem since the caller last took a bad row.

    With `urls`, a line may be a `file://` URL with a name that is not UTF-8; it is percent-encoded.
    """

    def __init__(self, name: str, stream: BinaryIO, *, urls: bool = False) -> None:
        self.name = name
        self.number = 0
        self.fault: str | None = None
        self._stream, self._urls = stream, urls

    def __iter__(self) -> Iterator[str]:
        read = self._stream.readline
        while raw := read(MAX_LINE):
            self.number += 1
            if self.number == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise InvalidSource(f"{self.name}: the list is UTF-16; save it as UTF-8")
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if len(raw) == MAX_LINE and not raw.endswith(b"\n"):
                self.fault = f"the line is longer than {MAX_LINE:,} bytes"
                while (rest := read(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                if self._urls and not self.fault and raw.lstrip().startswith(b"file:"):
                    yield percent_encoded(raw.decode(errors="surrogateescape"))
                    continue
                self.fault = self.fault or "the line is not UTF-8"
                text = raw.decode(errors="backslashreplace")
            yield text

    def bad(self, place: str, text: str) -> BadRow:
        """The latest line or row as a bad row, with `fault` as its reason; resets `fault`."""
        reason, self.fault = self.fault or "", None
        return BadRow(place, reason, _cut(text.strip()))


Line = Callable[[str, str], SourceRow | BadRow]


def _read_lines(name: str, source: AbstractContextManager[BinaryIO], kind: Line | None) -> Rows:
    """One row per line; blank lines and lines that start with # are skipped. Without `kind`, the first row decides."""
    with source as stream:
        lines = _Lines(name, stream, urls=True)
        for text in lines:
            line = text.strip()
            if lines.fault:
                yield lines.bad(f"{name}:{lines.number}", line)
            elif line and line[0] != "#":
                kind = kind or (_json_row if line[0] == "{" else _text_row)
                yield kind(f"{name}:{lines.number}", line)


def _text_row(place: str, line: str) -> SourceRow:
    return SourceRow(place, {"source": line})


def _json_row(place: str, line: str) -> SourceRow | BadRow:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        return BadRow(place, f"the line is not JSON: {reason}", _cut(line))
    if isinstance(value, str):
        return SourceRow(place, {"source": value})
    if not isinstance(value, dict):
        return BadRow(place, "a line must be a JSON object or string", _cut(line))
    fields = {name: content for name, content in value.items() if content is not None and content != ""}
    for name in fields:
        if name not in FIELDS:
            return BadRow(place, f"unknown field {name[:40]!r}{nearest(name[:40], list(FIELDS))}", _cut(line))
    named = [name for name in SOURCE_NAMES if name in fields]
    if len(named) != 1:
        reason = f"both {named[0]!r} and {named[1]!r} name the image" if named else "no field 'source' with the image's URL"
        return BadRow(place, reason, _cut(line))
    fields["source"] = fields.pop(named[0])
    return SourceRow(place, fields)


def _read_table(name: str) -> Rows:
    """CSV with a header. The delimiter is whichever of `,`, `;` and tab comes first in the header."""
    with _open(name) as stream:
        lines = _Lines(name, stream)
        text = iter(lines)
        header = next(text, "")
        delimiter = min(",;\t", key=lambda sign: header.find(sign) if sign in header else len(header))
        columns = _columns(name, next(csv.reader([header], delimiter=delimiter), []))
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        while True:
            place = f"{name}:{lines.number + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield BadRow(place, f"the row is not CSV: {error}", "")
                continue
            if cells is None:
                return
            if lines.fault:
                yield lines.bad(place, delimiter.join(cells))
            elif any(cells):
                yield _table_row(place, cells, columns, delimiter)


def _columns(name: str, header: list[str]) -> list[str | None]:
    """The field of each column; None for columns that are ignored."""
    names = [cell.strip().lower() for cell in header]
    known = ["source" if cell in SOURCE_NAMES else cell if cell in FIELDS else None for cell in names]
    shown_header = _cut(", ".join(names))
    if "source" not in known:
        wanted = "the first line must name the columns, and one must be 'source', 'url' or 'image'"
        raise InvalidSource(f"{name}: {wanted}; found {shown_header!r}")
    for field in known:
        if field is not None and known.count(field) > 1:
            raise InvalidSource(f"{name}: two columns hold the {field}: {shown_header!r}")
    return known


def _table_row(place: str, cells: list[str], columns: list[str | None], delimiter: str) -> SourceRow | BadRow:
    if len(cells) > len(columns):
        reason = f"{len(cells)} values for {len(columns)} columns; put a value that contains {delimiter!r} in quotes"
        return BadRow(place, reason, _cut(delimiter.join(cells)))
    pairs = zip(columns, map(str.strip, cells), strict=False)
    fields = {field: cell for field, cell in pairs if field is not None and cell}
    if "source" not in fields:
        return BadRow(place, "no URL in the source column", _cut(delimiter.join(cells)))
    return SourceRow(place, fields)
