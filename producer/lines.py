"""The lines of a list as text, one at a time, whatever program wrote them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from imagemill.producer.rows import BadRow, cut
from imagemill.shared.errors import InvalidSource
from imagemill.shared.urls import percent_encoded

MAX_LINE = 65_536
"""Bytes per line of a list; a longer line is a bad row."""
_HEAD = 4096
_SAVE = "open it in a spreadsheet program and save it as CSV (UTF-8)"
_OTHERS = (
    (b"PK\x03\x04", f"this is an Excel or OpenDocument workbook, or another archive; {_SAVE}"),
    (b"\xd0\xcf\x11\xe0", f"this is an old Excel workbook; {_SAVE}"),
    (b"\x1f\x8b", "the list is compressed; unpack it first"),
    (b"%PDF", "this is a PDF, not a list"),
)


class Lines:
    """The lines of a list as text. `fault` is the first problem since the caller last took a bad row.

    UTF-8 and UTF-16 are read, with or without a byte order mark, and lines that end with a carriage return only. With
    `urls`, a line may be a `file://` URL with a name that is not UTF-8; it is percent-encoded. In a `table`, whose URLs are
    ASCII, lines that are not UTF-8 are read as Windows-1252, as spreadsheets write it, unless others turned out to be UTF-8.
    """

    def __init__(self, name: str, stream: BinaryIO, *, urls: bool = False, table: bool = False) -> None:
        self.name, self.number = name, 0
        self.fault: str | None = None
        self.table = table
        self._stream: Any = stream if hasattr(stream, "peek") else io.BufferedReader(cast(io.RawIOBase, stream))
        self._urls = urls
        self._encoding: str | None = None  # that some line needs

    def __iter__(self) -> Iterator[str]:
        head: bytes = self._stream.peek(_HEAD)[:_HEAD]
        for start, reason in _OTHERS:
            if head.startswith(start):
                raise InvalidSource(f"{self.name}: {reason}")
        encoding = _utf16(head)
        if encoding is None and b"\0" in head:
            raise InvalidSource(f"{self.name}: this is not text; save the list as UTF-8")
        bare = head.removesuffix(b"\r")
        if encoding is not None or (b"\r" in bare and b"\n" not in head):
            return self._translated(encoding or "utf-8-sig")
        return self._bytes()

    def _bytes(self) -> Iterator[str]:
        read = self._stream.readline
        while raw := read(MAX_LINE):
            self.number += 1
            if self.number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if len(raw) == MAX_LINE and not raw.endswith(b"\n"):
                self._too_long()
                while (rest := read(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
            yield self._text(raw)

    def _translated(self, encoding: str) -> Iterator[str]:
        """Lines in another encoding, or with other ends."""
        sixteen = encoding.startswith("utf-16")
        text = io.TextIOWrapper(self._stream, encoding, errors="replace" if sixteen else "surrogateescape", newline=None)
        try:
            while line := text.readline(MAX_LINE):
                self.number += 1
                if len(line) == MAX_LINE and not line.endswith("\n"):
                    self._too_long()
                    while (rest := text.readline(MAX_LINE)) and not rest.endswith("\n"):
                        pass
                if sixteen:
                    if "\ufffd" in line:
                        self.fault = self.fault or "the line is not UTF-16"
                    yield line.removeprefix("\ufeff")
                else:
                    yield self._text(line.encode(errors="surrogateescape"))
        finally:
            text.detach()

    def _too_long(self) -> None:
        self.fault = f"the line is longer than {MAX_LINE:,} bytes"

    def _text(self, raw: bytes) -> str:
        if raw.isascii():
            return raw.decode()
        try:
            text, needs = raw.decode(), "UTF-8"
        except UnicodeDecodeError:
            if self._urls and not self.fault and raw.lstrip().startswith(b"file:"):
                return percent_encoded(raw.decode(errors="surrogateescape"))
            try:
                text, needs = raw.decode("cp1252" if self.table else "utf-8"), "Windows-1252"
            except UnicodeDecodeError:
                self.fault = self.fault or "the line is not UTF-8"
                return raw.decode(errors="backslashreplace")
        if self._encoding not in (None, needs):
            self.fault = self.fault or f"the line is {needs} and an earlier one {self._encoding}; save the list as UTF-8"
        self._encoding = self._encoding or needs
        return text

    def bad(self, place: str, text: str) -> BadRow:
        """The latest line or row as a bad row, with `fault` as its reason; resets `fault`."""
        reason, self.fault = self.fault or "", None
        return BadRow(place, reason, cut(text.strip()))


def _utf16(head: bytes) -> str | None:
    """The encoding of a list that begins like this, if it is UTF-16: by its mark, or because every other byte of ASCII is 0."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return None  # UTF-32
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    pairs = len(head) // 2
    for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        zeros, others = head[first : 2 * pairs : 2].count(0), head[1 - first : 2 * pairs : 2].count(0)
        if pairs and not others and zeros >= 0.8 * pairs:
            return encoding
    return None
