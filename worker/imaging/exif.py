"""What imagemill reads of EXIF (a small TIFF file) and XMP: the orientation, and whether a camera states Adobe RGB.

Broken metadata must not fail an image: what can't be read counts as missing.
"""

from __future__ import annotations

import re
import struct

_ORIENTATION, _EXIF, _COLOUR_SPACE, _INTEROPERABILITY = 0x0112, 0x8769, 0xA001, 0xA005
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])\s*[\"'<]")

Table = dict[int, tuple[int, bytes]]
"""Type and the four bytes of value or offset, by tag."""


def orientation(exif: bytes | None, xmp: bytes | None = None) -> int:
    """The orientation, 1 to 8: from EXIF, or else from XMP; 1 if it is missing or invalid."""
    order, table = _first_table(exif)
    if _ORIENTATION in table:
        kind, field = table[_ORIENTATION]
        value = _short(order, field)
        return value if kind == 3 and 1 <= value <= 8 else 1
    found = _XMP_ORIENTATION.search(xmp or b"")
    return int(found[1]) if found else 1


def says_adobe_rgb(exif: bytes | None) -> bool:
    """Whether EXIF states Adobe RGB, as cameras do (DCF: interoperability index R03, and no colour space of its own)."""
    order, table = _first_table(exif)
    details = _table(exif or b"", order, table.get(_EXIF))
    space = _short(order, details[_COLOUR_SPACE][1]) if _COLOUR_SPACE in details else None
    interoperability = _table(exif or b"", order, details.get(_INTEROPERABILITY))
    return space == 2 or (space != 1 and interoperability.get(1, (0, b""))[1][:3] == b"R03")


def _first_table(exif: bytes | None) -> tuple[str, Table]:
    exif = _bare(exif)
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    return (order, _table(exif, order, (4, exif[4:8]))) if order is not None else ("<", {})


def _bare(exif: bytes | None) -> bytes:
    return (exif or b"").removeprefix(b"Exif\0\0")


def _table(exif: bytes, order: str, pointer: tuple[int, bytes] | None) -> Table:
    """The table that a pointer leads to, as far as it is present."""
    exif, found = _bare(exif), Table()
    if pointer is None:
        return found
    try:
        (start,) = struct.unpack(order + "I", pointer[1])
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, field = struct.unpack_from(order + "HHI4s", exif, entry)
            found.setdefault(tag, (kind, field))
    except struct.error:
        pass
    return found


def _short(order: str, field: bytes) -> int:
    (value,) = struct.unpack_from(order + "H", field)
    return int(value)
