"""Metadata in ISO base media files (AVIF, HEIC) and in JPEG XL containers.

ISO/IEC 14496-12 (iinf, iloc), ISO/IEC 23008-12 (items of type Exif and mime), ISO/IEC 18181-2.
"""

from __future__ import annotations

import struct

from imagemill.worker.imaging.heif import boxes

MAX_ITEM = 2**20
MAX_ITEMS = 4_096
MAX_PIECES = 64
_XMP_TYPE = b"application/rdf+xml"

Span = tuple[int, int]
"""Start and end in the file."""


def items(data: bytes) -> list[tuple[str, Span]]:
    """All items with EXIF (`exif`, a TIFF structure) or XMP (`xmp`); the span is empty if an item isn't stored in one piece.

    Raises struct.error, LookupError or ValueError.
    """
    found: list[tuple[str, Span]] = []
    for kind, start, end in boxes(data, 0, len(data)):
        if kind == b"meta":
            places = _places(data, start + 4, end)
            found += [(name, places.get(item, (0, 0))) for item, name in _items(data, start + 4, end).items()]
    return [(name, _checked(data, *span, is_exif=name == "exif")) for name, span in found]


def of_jxl(data: bytes) -> dict[str, bytes]:
    """`exif` and `xmp` of a JPEG XL file. Those that are compressed need the library brotli, of the extra `formats`."""
    found: dict[str, bytes] = {}
    for kind, start, end in boxes(data, 0, len(data)):
        content = data[start : min(end, start + MAX_ITEM)] if kind in (b"Exif", b"xml ", b"brob") else b""
        if kind == b"brob":
            kind, content = content[:4], _unpacked(content[4:])
        if kind in (b"Exif", b"xml ") and content:
            start, end = _checked(content, 0, len(content), is_exif=kind == b"Exif")
            found.setdefault("exif" if kind == b"Exif" else "xmp", content[start:end])
    return found


def _unpacked(packed: bytes) -> bytes:
    try:
        import brotli
    except ImportError:
        return b""
    try:
        return bytes(brotli.Decompressor().process(packed, output_buffer_limit=MAX_ITEM))
    except brotli.error:
        return b""


def _checked(data: bytes, start: int, end: int, *, is_exif: bool) -> Span:
    if is_exif and data[start : start + 4] not in (b"II*\0", b"MM\0*"):  # first, usually, the bytes before the structure
        start += 4 + int.from_bytes(data[start : start + 4], "big")
    return (start, end) if 0 < end - start <= MAX_ITEM and end <= len(data) else (0, 0)


def metadata(data: bytes) -> dict[str, bytes]:
    """The contents of the first `exif` and `xmp`, as far as the file has them."""
    return {name: data[start:end] for name, (start, end) in reversed(items(data))}


def _child(data: bytes, start: int, end: int, wanted: bytes) -> Span | None:
    return next(((first, last) for kind, first, last in boxes(data, start, end) if kind == wanted), None)


def _items(data: bytes, start: int, end: int) -> dict[int, str]:
    """`exif` or `xmp` by item ID."""
    found: dict[int, str] = {}
    info = _child(data, start, end, b"iinf")
    if info is None:
        return found
    wide = data[info[0]] > 0  # a wide count
    for kind, first, _ in boxes(data, info[0] + (8 if wide else 6), info[1]):
        if kind != b"infe" or data[first] < 2:
            continue
        form = ">I" if data[first] > 2 else ">H"
        (item,) = struct.unpack_from(form, data, first + 4)
        at = first + 4 + struct.calcsize(form) + 2
        name = data[at : at + 4]
        if name == b"Exif":
            found[item] = "exif"
        elif name == b"mime" and data[at + 4 : at + 260].partition(b"\0")[2].startswith(_XMP_TYPE):
            found[item] = "xmp"
    return found


def _places(data: bytes, start: int, end: int) -> dict[int, Span]:
    """Where the items stand that are stored in one piece."""
    location = _child(data, start, end, b"iloc")
    inside = _child(data, start, end, b"idat")
    found: dict[int, Span] = {}
    if location is None:
        return found
    at, version = location[0] + 4, data[location[0]]
    sizes = [data[at] >> 4, data[at] & 15, data[at + 1] >> 4, data[at + 1] & 15 if version else 0]
    offset_size, length_size, base_size, index_size = sizes
    id_size = 4 if version == 2 else 2
    at += 2
    count, at = _integer(data, at, id_size)
    for _ in range(min(count, MAX_ITEMS)):
        item, at = _integer(data, at, id_size)
        method, at = _integer(data, at, 2) if version else (0, at)
        base, at = _integer(data, at + 2, base_size)
        pieces, at = _integer(data, at, 2)
        if pieces > MAX_PIECES:
            raise ValueError(f"an item of {pieces} pieces")
        for _ in range(pieces):
            offset, at = _integer(data, at + index_size, offset_size)
            length, at = _integer(data, at, length_size)
        if pieces == 1 and (method == 0 or (method == 1 and inside)):
            first = base + offset + (inside[0] if method == 1 and inside else 0)
            found[item] = (first, first + length)
    return found


def _integer(data: bytes, at: int, size: int) -> tuple[int, int]:
    """The number of `size` bytes, and the offset behind it."""
    if at + size > len(data):
        raise ValueError("the box ends early")
    return int.from_bytes(data[at : at + size], "big"), at + size
