"""Read lists of images (text, tables, JSONL, stdin, folders, S3 prefixes, single URLs), one row at a time.

At most one line (64 KiB) is held in memory, and the first rows of a table. A row that can't be read is yielded as a `BadRow`,
so that the caller decides what to do with it; a list that can't be read at all raises InvalidSource.
"""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from pydantic import ValidationError

from imagemill.producer.folders import file_url, read_folder, read_prefix
from imagemill.producer.lines import MAX_LINE, Lines
from imagemill.producer.rows import FIELDS, MAX_SHOWN, SOURCE_NAMES, BadRow, Rows, Skipped, SourceRow, cut, refused
from imagemill.producer.tables import is_header, read_table, table_rows
from imagemill.shared.engines import ENGINES
from imagemill.shared.errors import InvalidSource
from imagemill.shared.image_files import HEAD, IMAGE_EXTENSIONS, looks_like_image
from imagemill.shared.messages import Item
from imagemill.shared.options.base import nearest, validation_sentence
from imagemill.shared.urls import percent_encoded, shown

__all__ = ["MAX_LINE", "MAX_SHOWN", "BadRow", "Skipped", "SourceRow", "file_url", "parse", "read_sources", "refused"]

ADDRESSES = ("source", "mask", "control_image")
LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson")
WORKBOOKS = (".xlsx", ".xls", ".ods", ".numbers")
_UNSEEN = "".join(map(chr, (0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF)))
"""Zero-width characters, which get copied along with URLs."""
_FIELDS = frozenset(FIELDS)
_WRAPPED = re.compile(r"<(.*)>|\"(.*)\"|'(.*)'")


def read_sources(
    sources: Sequence[str], *, s3: Callable[[], Any], column: str | None = None, skipped: Skipped | None = None
) -> Rows:
    """Stream the rows of all `sources` in order; `s3` returns the client that lists prefixes.

    A source is `-` (stdin), a list (.txt, .csv, .tsv, .jsonl, .ndjson), a folder, an `s3://bucket/prefix`, an image's URL,
    or an image's path. `column` names a table's column with the images. Files in folders that are not images are counted in
    `skipped`. Raises InvalidSource immediately if a source does not exist, and during iteration if it can't be read.
    """
    found = Skipped() if skipped is None else skipped
    readers = [_reader(source, s3, column, found) for source in sources]
    return (row for reader in readers for row in reader())


def parse(row: SourceRow, index: int) -> Item:
    """Validate a row as item number `index` of its job. Raises InvalidSource with the reason."""
    for name in row.fields.keys() - _FIELDS:
        raise InvalidSource(_unknown(name))
    addresses = {name: percent_encoded(row.fields[name]) for name in ADDRESSES if isinstance(row.fields.get(name), str)}
    try:
        return Item(index=index, **row.fields | addresses)
    except ValidationError as error:
        raise InvalidSource(validation_sentence(error)) from error


def _unknown(name: str) -> str:
    """Why a row may not have this field."""
    option = name.replace("-", "_")
    if option not in FIELDS and any(option in engine.options.model_fields for engine in ENGINES):
        return f"unknown field {name!r}; options are the same for all images of a job: use --set {option}=VALUE"
    return f"unknown field {name[:40]!r}{nearest(name[:40], list(FIELDS))}"


def _reader(source: str, s3: Callable[[], Any], column: str | None, skipped: Skipped) -> Callable[[], Rows]:
    """The function that reads a source. Raises InvalidSource if there is none."""
    if source == "-":
        return lambda: _read_lines("stdin", nullcontext(sys.stdin.buffer), None, column)
    if "://" in source:
        return _address_reader(source, s3, skipped)
    path = Path(source)
    suffix = path.suffix.lower()
    if not path.exists():
        raise InvalidSource(f"no such file or folder: {source!r}")
    if path.is_dir():
        return lambda: read_folder(source, skipped)
    if suffix in (".csv", ".tsv"):
        return lambda: read_table(source, _open(source), column)
    if suffix in LIST_SUFFIXES or path.is_fifo():
        kind = _json_row if suffix in (".jsonl", ".ndjson") else None
        return lambda: _read_lines(source, _open(source), kind, column)
    if suffix in IMAGE_EXTENSIONS or _begins_like_an_image(path):
        return lambda: iter([SourceRow(source, {"source": file_url(source)}, root=file_url(path.parent))])
    if suffix == ".json":
        raise InvalidSource(f"{source}: a .json file can't be read row by row; write one JSON object per line (.jsonl)")
    if suffix in WORKBOOKS:
        raise InvalidSource(f"{source}: workbooks are not read; save the sheet with the URLs as CSV (UTF-8)")
    raise InvalidSource(f"{source}: not a list ({', '.join(LIST_SUFFIXES)}) or an image")


def _begins_like_an_image(path: Path) -> bool:
    with _open(str(path)) as file:
        return looks_like_image(file.read(HEAD))


def _address_reader(source: str, s3: Callable[[], Any], skipped: Skipped) -> Callable[[], Rows]:
    try:
        parts = urlsplit(source)
    except ValueError as error:
        raise InvalidSource(f"{shown(source)!r} is not a URL: {error}") from error
    last = (source if parts.scheme == "s3" else parts.path).rpartition("/")[2]  # an S3 key may contain ? and #
    suffix = Path(last).suffix.lower()
    if suffix in (*LIST_SUFFIXES, *WORKBOOKS):
        raise InvalidSource(f"{shown(source)}: lists are read only from files and stdin; download it first")
    if parts.scheme == "s3" and suffix not in IMAGE_EXTENSIONS:
        return lambda: read_prefix(s3(), source, skipped)
    return lambda: iter([SourceRow(cut(source), {"source": source})])


def _open(path: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise InvalidSource(f"{path}: {error.strerror}") from error


Line = Callable[[str, str], SourceRow | BadRow]


def _read_lines(name: str, source: AbstractContextManager[BinaryIO], kind: Line | None, column: str | None) -> Rows:
    """One row per line; blank lines and lines that start with # are skipped. Without `kind`, the first row decides.

    If that names the columns of a table, the list is one.
    """
    with source as stream:
        lines = Lines(name, stream, urls=True)
        text = iter(lines)
        for raw in text:
            line = raw.strip()
            if lines.fault:
                yield lines.bad(f"{name}:{lines.number}", line)
            elif line and line[0] != "#":
                if kind is None and (column is not None or is_header(line)):
                    lines.table = True
                    yield from table_rows(lines, chain([raw], text), column)
                    return
                kind = kind or (_json_row if line[0] == "{" else _text_row)
                yield kind(f"{name}:{lines.number}", line)


def _text_row(place: str, line: str) -> SourceRow:
    """A URL or path, without what gets copied along from e-mails, web pages and programs."""
    if line.isprintable() and line[0] not in "<\"'" and line[-1] not in ",;" and "&amp;" not in line:
        return SourceRow(place, {"source": line})
    line = line.strip(_UNSEEN + " \t").rstrip(",;")
    wrapped = _WRAPPED.fullmatch(line)
    if wrapped is not None:
        line = next(filter(None, wrapped.groups()), "")
    return SourceRow(place, {"source": html.unescape(line) if "&amp;" in line else line})


def _json_row(place: str, line: str) -> SourceRow | BadRow:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        return BadRow(place, f"the line is not JSON: {reason}", cut(line))
    if isinstance(value, str):
        return SourceRow(place, {"source": value})
    if not isinstance(value, dict):
        return BadRow(place, "a line must be a JSON object or string", cut(line))
    fields = {name: content for name, content in value.items() if content is not None and content != ""}
    for name in fields:
        if name not in FIELDS:
            return BadRow(place, _unknown(name), cut(line))
    named = [name for name in SOURCE_NAMES if name in fields]
    if len(named) != 1:
        reason = f"both {named[0]!r} and {named[1]!r} name the image" if named else "no field 'source' with the image's URL"
        return BadRow(place, reason, cut(line))
    fields["source"] = fields.pop(named[0])
    return SourceRow(place, fields)
