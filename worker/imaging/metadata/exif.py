"""EXIF: read the tags of a TIFF structure defensively, and write those that still hold after the picture was edited.

https://www.cipa.jp/std/documents/e/DC-X008-Translation-2019-E.pdf (CIPA DC-008, EXIF 2.32)
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

MAX_BLOCK = 2**20
"""Bytes of an EXIF block; a JPEG file has room for 64 kB, other formats for more."""
MAX_ENTRIES = 1_000
MAX_DIRECTORY = 2**22
"""Bytes of all values of a directory; they may overlap in a file, but don't here."""
MAX_VALUE = 2**16
"""Bytes of one value; nothing that describes a photo is larger, only embedded pictures are."""

ORIENTATION, X_RESOLUTION, Y_RESOLUTION, UNIT, ARTIST, COPYRIGHT, XP_AUTHOR = 274, 282, 283, 296, 315, 33432, 40093
_PHOTO, _GPS = 34665, 34853
COLOUR_SPACE, WIDTH, HEIGHT, MAKER_NOTE = 40961, 40962, 40963, 37500
_SHORT, _LONG, _RATIONAL = 3, 4, 5
_SIZES = {1: 1, 2: 1, _SHORT: 2, _LONG: 4, _RATIONAL: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}

# Of the first directory, only tags that describe the photo. The others describe how a file stores pixels, or hold other
# pictures: thumbnails, layers, previews.
_IMAGE_TAGS = frozenset(
    {269, 270, 271, 272, ORIENTATION, 285, 305, 306, ARTIST, 316, COPYRIGHT, 18246, 18249, *range(40091, 40096)}
)
_CREDITS = frozenset({ARTIST, COPYRIGHT, XP_AUTHOR})
# Components and compressed bits per pixel describe the former file, the next two its size; 40965 points to another directory.
_NOT_OF_PHOTO = frozenset({37121, 37122, WIDTH, HEIGHT, 40965})
_GAMMA = 42240

Entry = tuple[int, int, bytes]
"""Type, count, and the value in the block's byte order."""


@dataclass(frozen=True)
class Exif:
    """Tags by number in three directories; `order` is the byte order of their values, as in `struct`.

    `maker_note_at` is where the maker note stood: its own offsets are valid only there.
    """

    order: str = ">"
    image: Mapping[int, Entry] = field(default_factory=dict)
    photo: Mapping[int, Entry] = field(default_factory=dict)
    gps: Mapping[int, Entry] = field(default_factory=dict)
    maker_note_at: int = 0

    def __bool__(self) -> bool:
        return bool(self.image or self.photo or self.gps)


def read(data: bytes) -> tuple[Exif, dict[int, Entry]]:
    """The tags of an EXIF block or TIFF file that describe the photo, and all tags of its first directory.

    What is damaged is left out.
    """
    data = data.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return Exif(), {}
    first, _ = _directory(data, order, int.from_bytes(data[4:8], _endian(order)))
    photo, places = _directory(data, order, _pointer(first, _PHOTO, order))
    gps, _ = _directory(data, order, _pointer(first, _GPS, order))
    image = {tag: entry for tag, entry in first.items() if tag in _IMAGE_TAGS and len(entry[2]) <= MAX_VALUE}
    photo = {tag: e for tag, e in photo.items() if tag not in _NOT_OF_PHOTO and len(e[2]) <= MAX_VALUE}
    return Exif(order, image, photo, gps, places.get(MAKER_NOTE, 0)), first


def credits(exif: Exif) -> Exif:  # noqa: A001
    """Only the tags that name the creator and the owner of the rights."""
    return Exif(exif.order, {tag: entry for tag, entry in exif.image.items() if tag in _CREDITS})


def without_maker_note(exif: Exif) -> Exif:
    """The same tags without the camera maker's own block, which may be large."""
    return replace(exif, photo={tag: entry for tag, entry in exif.photo.items() if tag != MAKER_NOTE}, maker_note_at=0)


def resolution(first: Mapping[int, Entry], order: str) -> tuple[float, float] | None:
    """Horizontal and vertical pixels per inch that a first directory states; None if it states none."""
    unit = first.get(UNIT, (_SHORT, 1, struct.pack(order + "H", 2)))
    sides = [_rational(first.get(tag), order) for tag in (X_RESOLUTION, Y_RESOLUTION)]
    factor = {2: 1.0, 3: 2.54}.get(int.from_bytes(unit[2][:2], _endian(order)))
    return (sides[0] * factor, sides[1] * factor) if factor and sides[0] and sides[1] else None


def write(exif: Exif, *, size: tuple[int, int], srgb: bool, dpi: tuple[float, float] | None) -> bytes:
    """The EXIF block, without `Exif\\0\\0`, of an upright picture of `size` (width, height); empty if there is nothing to say.

    It has no thumbnail. `srgb` says that the pixels are sRGB now, whatever colour space they were in.
    """
    order, image, photo = exif.order, dict(exif.image), dict(exif.photo)
    if dpi is not None:
        image |= {X_RESOLUTION: _ratio(dpi[0], order), Y_RESOLUTION: _ratio(dpi[1], order), UNIT: _number(2, _SHORT, order)}
    if ORIENTATION in image:
        image[ORIENTATION] = _number(1, _SHORT, order)
    if photo:
        photo |= {WIDTH: _number(size[0], _LONG, order), HEIGHT: _number(size[1], _LONG, order)}
        if srgb:
            photo[COLOUR_SPACE] = _number(1, _SHORT, order)
            photo.pop(_GAMMA, None)
    if not (image or photo or exif.gps):
        return b""
    return _Writer(order, exif.maker_note_at, len(photo.get(MAKER_NOTE, (0, 0, b""))[2])).block(image, photo, exif.gps)


class _Writer:
    """Lays out directories and values one after the other, around the place that the maker note had."""

    def __init__(self, order: str, note_at: int, note_length: int) -> None:
        self._order = order
        self._note = range(note_at, note_at + note_length) if note_at >= 8 and note_at + note_length <= MAX_BLOCK else range(0)
        self._out = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))

    def block(self, image: dict[int, Entry], photo: Mapping[int, Entry], gps: Mapping[int, Entry]) -> bytes:
        for pointer, directory in ((_PHOTO, photo), (_GPS, gps)):
            if directory:
                image[pointer] = _number(self._directory(directory), _LONG, self._order)
        struct.pack_into(self._order + "I", self._out, 4, self._directory(image))
        return bytes(self._out)

    def _directory(self, entries: Mapping[int, Entry]) -> int:
        rows = []
        for tag, (kind, count, value) in sorted(entries.items()):
            if len(value) > 4:
                at = self._note.start if tag == MAKER_NOTE and self._note else self._place(len(value))
                self._put(at, value)
                value = struct.pack(self._order + "I", at)
            rows.append(struct.pack(self._order + "HHI", tag, kind, count) + value.ljust(4, b"\0"))
        table = struct.pack(self._order + "H", len(rows)) + b"".join(rows) + bytes(4)
        at = self._place(len(table))
        self._put(at, table)
        return at

    def _place(self, length: int) -> int:
        """The next free even offset."""
        at = len(self._out) + len(self._out) % 2
        if self._note and at < self._note.stop and at + length > self._note.start:
            at = self._note.stop + self._note.stop % 2
        return at

    def _put(self, at: int, content: bytes) -> None:
        self._out.extend(bytes(max(0, at + len(content) - len(self._out))))
        self._out[at : at + len(content)] = content


def _directory(data: bytes, order: str, at: int) -> tuple[dict[int, Entry], dict[int, int]]:
    """The entries of the directory at an offset, and where their values stand. Offset 0 means that there is none."""
    entries: dict[int, Entry] = {}
    places: dict[int, int] = {}
    total = 0
    if not 8 <= at <= len(data) - 2:
        return entries, places
    (count,) = struct.unpack_from(order + "H", data, at)
    for row in range(at + 2, min(at + 2 + 12 * min(count, MAX_ENTRIES), len(data) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", data, row)
        length = number * _SIZES.get(kind, 0)
        start = row + 8 if length <= 4 else struct.unpack_from(order + "I", data, row + 8)[0]
        if 0 < length <= min(MAX_BLOCK, MAX_DIRECTORY - total) and start + length <= len(data) and tag not in entries:
            total += length
            entries[tag], places[tag] = (kind, number, data[start : start + length]), start
    return entries, places


def _endian(order: str) -> Literal["little", "big"]:
    return "little" if order == "<" else "big"


def _pointer(entries: Mapping[int, Entry], tag: int, order: str) -> int:
    kind, _, value = entries.get(tag, (0, 0, b""))
    return int.from_bytes(value[:4], _endian(order)) if kind in (_LONG, 13) else 0


def _rational(entry: Entry | None, order: str) -> float:
    """The first rational number of an entry; 0 if it has none."""
    if entry is None or entry[0] != _RATIONAL:
        return 0.0
    above, below = struct.unpack_from(order + "II", entry[2])
    return above / below if below else 0.0


def _ratio(value: float, order: str) -> Entry:
    below = 1 if value == int(value) else 100
    return _RATIONAL, 1, struct.pack(order + "II", round(value * below), below)


def _number(value: int, kind: int, order: str) -> Entry:
    return kind, 1, struct.pack(order + ("H" if kind == _SHORT else "I"), value)
