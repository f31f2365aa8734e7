"""What is read of EXIF and XMP, and that broken metadata fails no image."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imagemill.worker.imaging.exif import orientation, says_adobe_rgb


def exif(value: int, order: str = "<", kind: int = 3) -> bytes:
    """An EXIF block with another tag before its orientation."""
    mark = b"II" if order == "<" else b"MM"
    other = struct.pack(order + "HHII", 0x0100, 4, 1, 7)
    turn = struct.pack(order + "HHIHHI", 0x0112, kind, 1, value, 0, 0)
    return b"Exif\0\0" + mark + struct.pack(order + "HIH", 42, 8, 2) + other + turn


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("value", "wanted"), [*((n, n) for n in range(1, 9)), (0, 1), (9, 1), (65_535, 1)])
def test_orientation_is_read_in_both_byte_orders(order: str, value: int, wanted: int) -> None:
    assert orientation(exif(value, order)) == wanted
    assert orientation(exif(value, order).removeprefix(b"Exif\0\0")) == wanted
    assert orientation(exif(value, order, kind=7)) == 1


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 40))
@example(b"II*\0\xff\xff\xff\xff", 0)
def test_orientation_is_valid_for_broken_exif(noise: bytes, kept: int) -> None:
    assert 1 <= orientation(exif(6)[:kept] + noise) <= 8


@pytest.mark.parametrize("written", ['tiff:Orientation="6"', "tiff:Orientation='6'", "<tiff:Orientation>6</tiff:Orientation>"])
def test_orientation_in_xmp_counts_where_exif_has_none(written: str) -> None:
    xmp = f"<x:xmpmeta><rdf:Description {written} /></x:xmpmeta>".encode()
    assert orientation(None, xmp) == 6
    assert orientation(exif(3), xmp) == 3
    assert orientation(exif(1), xmp) == 1
    assert orientation(b"II*\0\xff\xff\xff\xff", xmp) == 6


@pytest.mark.parametrize("xmp", [b"", b'tiff:Orientation="9"', b'tiff:Orientation="66"', b'xtiff:Orient="6"'])
def test_orientation_is_1_for_missing_or_invalid_xmp(xmp: bytes) -> None:
    assert orientation(None, xmp) == 1


def camera(order: str, space: int | None, interoperability: bytes) -> bytes:
    """EXIF with a colour space and an interoperability index, as cameras write them."""
    entry = struct.Struct(order + "HHI4s")
    details = [] if space is None else [entry.pack(0xA001, 3, 1, struct.pack(order + "HH", space, 0))]
    details.append(entry.pack(0xA005, 4, 1, struct.pack(order + "I", 100)))
    parts = [
        (8, [entry.pack(0x8769, 4, 1, struct.pack(order + "I", 40))]),
        (40, details),
        (100, [entry.pack(1, 2, 4, interoperability + b"\0")]),
    ]
    block = bytearray(130)
    block[:8] = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    for start, entries in parts:
        table = struct.pack(order + "H", len(entries)) + b"".join(entries)
        block[start : start + len(table)] = table
    return b"Exif\0\0" + bytes(block)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("space", "index", "adobe"),
    [
        (65_535, b"R03", True),
        (None, b"R03", True),
        (2, b"R98", True),
        (1, b"R98", False),
        (1, b"R03", False),
        (65_535, b"THM", False),
    ],
)
def test_adobe_rgb_is_what_cameras_state(order: str, space: int | None, index: bytes, adobe: bool) -> None:
    assert says_adobe_rgb(camera(order, space, index)) == adobe
    for length in range(130):
        assert says_adobe_rgb(camera(order, space, index)[:length]) in (True, False)
