"""IPTC-IIM records and the Photoshop image resources that hold them in JPEG and TIFF files.

https://www.iptc.org/std/IIM/4.2/specification/IIMV4.2.pdf, https://www.adobe.com/devnet-apps/photoshop/fileformatashtml/
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from imagemill.worker.imaging.metadata.xmp import DC, IPTC_CORE, PHOTOSHOP, Field, Form, Name

PHOTOSHOP_3 = b"Photoshop 3.0\0"
MAX_BLOCK = 2**16
IPTC, _FLAG, _URL = 0x0404, 0x040A, 0x040B  # the latter two: whether it is copyrighted, and the owner's web page
_RESOURCES = (IPTC, _FLAG, _URL)
_CHARSET, _VERSION = (1, 90), (2, 0)
_PREVIEWS = {(2, 200), (2, 201), (2, 202)}
_CREDITS = {_CHARSET, _VERSION, (2, 80), (2, 85), (2, 110), (2, 115), (2, 116), (2, 118)}
_AS_XMP: tuple[tuple[int, Name, Form], ...] = (
    (5, (DC, "title"), "alt"),
    (25, (DC, "subject"), "bag"),
    (40, (PHOTOSHOP, "Instructions"), "text"),
    (80, (DC, "creator"), "seq"),
    (85, (PHOTOSHOP, "AuthorsPosition"), "text"),
    (90, (PHOTOSHOP, "City"), "text"),
    (92, (IPTC_CORE, "Location"), "text"),
    (95, (PHOTOSHOP, "State"), "text"),
    (101, (PHOTOSHOP, "Country"), "text"),
    (105, (PHOTOSHOP, "Headline"), "text"),
    (110, (PHOTOSHOP, "Credit"), "text"),
    (115, (PHOTOSHOP, "Source"), "text"),
    (116, (DC, "rights"), "alt"),
    (120, (DC, "description"), "alt"),
    (122, (PHOTOSHOP, "CaptionWriter"), "text"),
)
"""Datasets of record 2, the XMP property that says the same (IPTC Photo Metadata Standard), and its form."""

Dataset = tuple[tuple[int, int], bytes]
"""(record, number) and value."""


def resources(block: bytes) -> dict[int, bytes]:
    """The resources about the photo in a Photoshop block; other resources are thumbnails, paths and settings."""
    found: dict[int, bytes] = {}
    at = 0
    while block[at : at + 4] == b"8BIM" and at + 12 <= len(block):
        (kind,) = struct.unpack_from(">H", block, at + 4)
        at += 6 + (block[at + 6] // 2 + 1) * 2  # a name with its length, padded to be even
        length = int.from_bytes(block[at : at + 4], "big")
        value = block[at + 4 : at + 4 + length]
        if kind in _RESOURCES and kind not in found and len(value) == length <= MAX_BLOCK:
            found[kind] = value
        at += 4 + length + length % 2
    return found


def photoshop_block(parts: Mapping[int, bytes]) -> bytes:
    """A Photoshop block of these resources; empty if there are none."""
    return b"".join(
        b"8BIM" + struct.pack(">HHI", kind, 0, len(value)) + value + bytes(len(value) % 2)
        for kind, value in parts.items()
        if value
    )


def cleaned(records: bytes, *, all_of_it: bool) -> bytes:
    """The datasets without previews; without `all_of_it`, only those about creators and rights. Empty if none is left."""
    kept = [(name, value) for name, value in _datasets(records) if name not in _PREVIEWS and (all_of_it or name in _CREDITS)]
    if all(name in (_CHARSET, _VERSION) for name, _ in kept):
        return b""
    return b"".join(struct.pack(">BBBH", 0x1C, *name, len(value)) + value for name, value in kept)


def as_xmp(records: bytes) -> Iterator[Field]:
    """The fields that have a counterpart in XMP, for formats that have no place for IPTC."""
    datasets = list(_datasets(records))
    utf8 = (_CHARSET, b"\x1b%G") in datasets
    for number, name, form in _AS_XMP:
        values = tuple(_text(value, utf8) for each, value in datasets if each == (2, number))
        if values:
            yield Field(name, form, values)


def _datasets(records: bytes) -> Iterator[Dataset]:
    at = 0
    while at + 5 <= len(records) and records[at] == 0x1C:
        record, number, length = struct.unpack_from(">BBH", records, at + 1)
        value = records[at + 5 : at + 5 + length]
        if length & 0x8000 or len(value) < length:  # extended datasets hold whole objects
            return
        yield (record, number), value
        at += 5 + length


def _text(value: bytes, utf8: bool) -> str:
    """Text in UTF-8, or in the code page of Windows where the record says nothing and it isn't UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("utf-8" if utf8 else "cp1252", errors="replace")
