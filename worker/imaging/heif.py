"""What the boxes of an AVIF or HEIF file say about its main picture: colour code points and bits per channel.

Format: ISO/IEC 14496-12 (boxes) and 23008-12 (items and their properties).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

MAX_BOXES = 10_000
"""In one box; real files have some dozens."""

_Part = tuple[bytes, int, int]
"""Kind, start and end of a box's payload."""


@dataclass(frozen=True)
class Stated:
    """`code_points` are primaries and transfer (H.273); None if the file doesn't state them. `bits` are per channel."""

    code_points: tuple[int, int] | None = None
    bits: int = 8


def read(data: bytes) -> Stated:
    """What the file states about its main picture. What can't be found or read counts as not stated."""
    try:
        meta = _find(data, b"meta", 0, len(data))
        properties = _of_main_item(data, meta) if meta is not None else []
        return Stated(_code_points(data, properties), _bits(data, properties))
    except (struct.error, IndexError):
        return Stated()


def sizes(data: bytes) -> list[tuple[int, int]]:
    """(width, height) of every picture in the file: the main one, its tiles, thumbnails and maps."""
    try:
        meta = _find(data, b"meta", 0, len(data))
        groups = _find(data, b"iprp", meta[1] + 4, meta[2]) if meta is not None else None
        container = _find(data, b"ipco", groups[1], groups[2]) if groups is not None else None
        properties = boxes(data, *container[1:]) if container is not None else ()
        return [struct.unpack_from(">II", data, start + 4) for kind, start, _ in properties if kind == b"ispe"]
    except struct.error:
        return []


def boxes(data: bytes, start: int, end: int) -> Iterator[_Part]:
    """Yield (kind, start, end) of each box's payload between two offsets, as far as they are complete."""
    for _ in range(MAX_BOXES):
        if start + 8 > end:
            return
        length, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start + 8)
            head = 16
        stop = end if length == 0 else start + length
        if length and (length < head or stop > end):
            return
        yield kind, start + head, stop
        start = stop


def _find(data: bytes, wanted: bytes, start: int, end: int) -> _Part | None:
    return next((box for box in boxes(data, start, end) if box[0] == wanted), None)


def _of_main_item(data: bytes, meta: _Part) -> list[_Part]:
    """The properties of the file's primary item, then those of the first item that it is made of, such as a grid's tile."""
    start, end = meta[1] + 4, meta[2]
    primary, groups = _find(data, b"pitm", start, end), _find(data, b"iprp", start, end)
    if primary is None or groups is None:
        return []
    wide = data[primary[1]] > 0
    (main,) = struct.unpack_from(">I" if wide else ">H", data, primary[1] + 4)
    container = _find(data, b"ipco", groups[1], groups[2])
    properties = list(boxes(data, *container[1:])) if container is not None else []
    tables = [box for box in boxes(data, groups[1], groups[2]) if box[0] == b"ipma"]
    owned = dict[int, list[int]]()
    for _, at, _ in tables:
        owned |= _associations(data, at)
    numbers = owned.get(main, []) + [number for part in _parts(data, meta, main)[:1] for number in owned.get(part, [])]
    return [properties[number - 1] for number in numbers if 1 <= number <= len(properties)]


def _parts(data: bytes, meta: _Part, main: int) -> list[int]:
    """The items that an item is made of."""
    references = _find(data, b"iref", meta[1] + 4, meta[2])
    if references is None:
        return []
    number, size = ("I", 4) if data[references[1]] > 0 else ("H", 2)
    for kind, at, _ in boxes(data, references[1] + 4, references[2]):
        origin, count = struct.unpack_from(f">{number}H", data, at)
        if kind == b"dimg" and origin == main:
            return [*struct.unpack_from(f">{count}{number}", data, at + size + 2)]
    return []


def _associations(data: bytes, at: int) -> dict[int, list[int]]:
    """The numbers of each item's properties, from the payload of an `ipma` box."""
    version, wide = data[at], data[at + 3] & 1
    (entries,) = struct.unpack_from(">I", data, at + 4)
    at += 8
    found = dict[int, list[int]]()
    for _ in range(min(entries, MAX_BOXES)):
        (item,) = struct.unpack_from(">H" if version == 0 else ">I", data, at)
        at += 2 if version == 0 else 4
        count = data[at]
        at += 1
        size, mask = (2, 0x7FFF) if wide else (1, 0x7F)
        found[item] = [int.from_bytes(data[at + size * n : at + size * n + size], "big") & mask for n in range(count)]
        at += size * count
    return found


def _code_points(data: bytes, properties: list[_Part]) -> tuple[int, int] | None:
    for kind, start, end in properties:
        if kind == b"colr" and data[start : start + 4] == b"nclx" and end - start >= 10:
            primaries, transfer = struct.unpack_from(">HH", data, start + 4)
            return primaries, transfer
    return None


def _bits(data: bytes, properties: list[_Part]) -> int:
    """From the list of bits per channel (`pixi`), else from the AV1 (`av1C`) or HEVC (`hvcC`) configuration."""
    by_kind = {kind: (start, end) for kind, start, end in reversed(properties)}
    if b"pixi" in by_kind:
        start, end = by_kind[b"pixi"]
        return max(data[start + 5 : min(end, start + 5 + data[start + 4])], default=8)
    if b"av1C" in by_kind:
        flags = data[by_kind[b"av1C"][0] + 2]
        return (12 if flags & 0x20 else 10) if flags & 0x40 else 8
    if b"hvcC" in by_kind:
        return 8 + (data[by_kind[b"hvcC"][0] + 17] & 7)
    return 8
