"""Lists as tables: CSV with a header, as spreadsheets and shops write it."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO

from imagemill.producer.lines import Lines
from imagemill.producer.rows import FIELDS, SOURCE_NAMES, BadRow, Rows, SourceRow, cut
from imagemill.shared.errors import InvalidSource
from imagemill.shared.options.base import nearest

DELIMITERS = ",;\t|"
OTHER_NAMES = frozenset(
    f"{thing}{part}"
    for thing in ("image", "picture", "photo", "img", "main image", "base image")
    for part in ("", " src", " url", " link", " path", "s", " urls", "s url")
)
"""Names that shops and feeds give to the column with the images, in lower case, with spaces for other characters."""
SAMPLE = 20
"""Rows that are looked at if no name tells which column holds the images."""
_ADDRESS = re.compile(r"(?:https?|s3|file)://", re.IGNORECASE)
_BETWEEN = re.compile(r"[\s,;|]+(?=(?:https?|s3|file)://)", re.IGNORECASE)
_SURELY_BETWEEN = re.compile(r"(?:[,;]?\s+|\s*\|\s*)(?=(?:https?|s3|file)://)", re.IGNORECASE)
"""In a column that should hold one URL, which may have commas in it."""
_SEPARATOR = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)


@dataclass(frozen=True)
class Columns:
    """The field of each column, None for those that are ignored. Cells of the column `several` may hold several URLs."""

    fields: tuple[str | None, ...]
    several: bool = False
    names: tuple[str, ...] = ()
    """Those of all columns, in lower case."""


def read_table(name: str, source: AbstractContextManager[BinaryIO], column: str | None = None) -> Rows:
    """The rows of a table; `column` names the one with the images, or gives its number from 1."""
    with source as stream:
        lines = Lines(name, stream, table=True)
        yield from table_rows(lines, iter(lines), column)


def table_rows(lines: Lines, text: Iterator[str], column: str | None) -> Rows:
    """The rows of a table from its lines."""
    header = next(text, "")
    announced = _SEPARATOR.fullmatch(header)
    if announced is not None:
        header = next(text, "")
    delimiter = announced[1] if announced is not None else _delimiter(header)
    first = lines.number
    reader = csv.reader(chain([header], text), delimiter=delimiter, strict=True)
    rows = _cells(lines, reader, first)
    names = next((cells for _, cells in rows if isinstance(cells, list)), [])
    if any(map(_ADDRESS.match, map(str.strip, names))):  # there is no header
        columns = _without_header(lines.name, names, column)
        rows = chain([(f"{lines.name}:{first}", names)], rows)
    else:
        sample = [next(rows, None) for _ in range(0 if _known(names) or column else SAMPLE)]
        read = [row for row in sample if row is not None]
        columns = _columns(lines.name, names, column, [cells for _, cells in read if isinstance(cells, list)])
        rows = chain(read, rows)
    for place, cells in rows:
        if isinstance(cells, BadRow):
            yield cells
        else:
            yield from _table_rows(place, cells, columns, delimiter)


def is_header(line: str) -> bool:
    """Whether a list that begins with this line is a table."""
    if _ADDRESS.search(line):
        return False
    return _SEPARATOR.fullmatch(line) is not None or _known(next(csv.reader([line], delimiter=_delimiter(line)), []))


def _delimiter(header: str) -> str:
    """The delimiter that splits the header into columns; of several, preferably one that yields a column of images."""
    found = sorted((sign for sign in DELIMITERS if sign in header), key=header.find)
    return next((sign for sign in found if _known(next(csv.reader([header], delimiter=sign), []))), (*found, ",")[0])


def _cells(lines: Lines, reader: Iterator[list[str]], first: int) -> Iterator[tuple[str, list[str] | BadRow]]:
    """Each row that isn't empty, with its place."""
    place = f"{lines.name}:{first}"
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield place, BadRow(place, f"the row is not CSV: {error}", "")
        else:
            if cells is None:
                return
            if lines.fault:
                yield place, lines.bad(place, ", ".join(cells))
            elif any(map(str.strip, cells)):
                yield place, cells
        place = f"{lines.name}:{lines.number + 1}"


def _plain(cell: str) -> str:
    return cell.strip().lower()


def _known(names: list[str]) -> bool:
    """Whether a column's name says that it holds the images."""
    return any(_plain(name) in SOURCE_NAMES for name in names) or len(_alike(names)) == 1


def _alike(names: list[str]) -> list[int]:
    return [place for place, name in enumerate(names) if re.sub(r"[\W_]+", " ", name.lower()).strip() in OTHER_NAMES]


def _columns(name: str, names: list[str], column: str | None, sample: list[list[str]]) -> Columns:
    plain = [_plain(cell) for cell in names]
    if column is not None:
        source = _chosen(name, names, column)
    elif any(cell in SOURCE_NAMES for cell in plain):
        fields = tuple("source" if cell in SOURCE_NAMES else cell if cell in FIELDS else None for cell in plain)
        _check_fields(name, names, fields)
        return Columns(fields, "images" in plain, tuple(plain))
    elif len(alike := _alike(names)) == 1:
        source = alike[0]
    else:
        source = _by_content(name, names, sample)
    taken = (*SOURCE_NAMES, plain[source])
    fields = tuple(
        "source" if place == source else cell if cell in FIELDS and cell not in taken else None
        for place, cell in enumerate(plain)
    )
    _check_fields(name, names, fields)
    return Columns(fields, True, tuple(plain))


def _chosen(name: str, names: list[str], column: str) -> int:
    plain = [_plain(cell) for cell in names]
    if _plain(column) in plain:
        return plain.index(_plain(column))
    if column.isdecimal() and 1 <= int(column) <= len(names):
        return int(column) - 1
    raise InvalidSource(f"{name}: no column {column!r}{nearest(column, [cell.strip() for cell in names])}")


def _by_content(name: str, names: list[str], sample: list[list[str]]) -> int:
    """The only column with addresses."""
    places = {place for cells in sample for place, cell in enumerate(cells) if _ADDRESS.match(cell.strip())}
    found = [names[place].strip() for place in sorted(places) if place < len(names)]
    if len(places) == 1 and found:
        return places.pop()
    header = cut(", ".join(map(_plain, names)))
    if found:
        several = " and ".join(map(repr, found[:3]))
        raise InvalidSource(f"{name}: several columns hold URLs ({several}); choose one: --column {found[0]!r}")
    wanted = "the first line must name the columns, and one must be 'source', 'url' or 'image', or be chosen with --column"
    first = f"; the first row is {cut(', '.join(sample[0]))!r}" if sample else ""
    raise InvalidSource(f"{name}: {wanted}; found {header!r}{first}")


def _without_header(name: str, cells: list[str], column: str | None) -> Columns:
    places = [place for place, cell in enumerate(cells) if _ADDRESS.match(cell.strip())]
    if column is not None:
        places = [_chosen(name, [""] * len(cells), column)]
    if len(places) > 1:
        raise InvalidSource(
            f"{name}: the first line has {len(places)} URLs and no names of columns: {cut(', '.join(cells))!r}; "
            f"add a line with names, or choose the images by number: --column {places[0] + 1}"
        )
    return Columns(tuple("source" if place == places[0] else None for place in range(len(cells))))


def _check_fields(name: str, names: list[str], fields: tuple[str | None, ...]) -> None:
    for one in fields:
        if one is not None and fields.count(one) > 1:
            raise InvalidSource(f"{name}: two columns hold the {one}: {cut(', '.join(map(_plain, names)))!r}")


def _table_rows(place: str, cells: list[str], columns: Columns, delimiter: str) -> Rows:
    row = _table_row(place, cells, columns, delimiter)
    if isinstance(row, BadRow):
        yield row
        return
    urls = (_BETWEEN if columns.several else _SURELY_BETWEEN).split(row.fields["source"])
    if len(urls) > 1 and len(row.fields.keys() & {"mask", "control_image", "boxes"}):
        reason = "several images share one mask, control image or boxes; write a row for each"
        yield BadRow(place, reason, cut(delimiter.join(cells)))
        return
    for url in urls:
        yield SourceRow(place, {**row.fields, "source": url}, columns=row.columns)


def _table_row(place: str, cells: list[str], columns: Columns, delimiter: str) -> SourceRow | BadRow:
    width = len(columns.fields)
    if len(cells) > width and any(map(str.strip, cells[width:])):
        reason = f"{len(cells)} values for {width} columns; put a value that contains {delimiter!r} in quotes"
        return BadRow(place, reason, cut(delimiter.join(cells)))
    pairs = zip(columns.fields, map(str.strip, cells), strict=False)
    fields = {field: cell for field, cell in pairs if field is not None and cell}
    if "source" not in fields:
        return BadRow(place, "no URL in the source column", cut(delimiter.join(cells)))
    return SourceRow(place, fields, columns=dict(zip(columns.names, map(str.strip, cells), strict=False)) or None)
