"""PNG files that lost their end, and what texts in them say about orientation and colour."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from imagemill.shared.errors import Truncated
from imagemill.worker.imaging import png, png_reading
from imagemill.worker.imaging.facts import Facts
from imagemill.worker.imaging.headers import probe, translated
from tests.unit.worker.imaging.samples import png_by_hand, png_chunk

GREY = 0
SMALL = png_by_hand(1, 1, 8, GREY, b"\0\x80")

# --- a lost end ---

LARGE = png.encode(np.random.default_rng(9).integers(0, 256, (600, 700, 3), np.uint8))  # several IDAT chunks
INTERLACED = png_by_hand(2, 1, 8, GREY, b"\0\x10\0\x20", interlaced=True)


@pytest.mark.parametrize("data", [SMALL, LARGE, INTERLACED], ids=["small", "large", "interlaced"])
@pytest.mark.parametrize("lost", range(1, 17))
def test_complete_picture_without_end_is_read(data: bytes, lost: int) -> None:
    size = png_reading.read_header(data).size
    whole = png_reading.decode(data, size)
    facts = png_reading.read_header(data[:-lost])
    assert facts == Facts(size, notes=("no_end_marker",))
    assert (png_reading.decode(data[:-lost], size).pixels == whole.pixels).all()


@pytest.mark.parametrize("end", [png_chunk(b"tEXt", b"a\0b"), png_chunk(b"tEXt", b"a\0b")[:-5], png_chunk(b"IEND", b"")[:9]])
def test_what_follows_the_pixels_may_be_cut(end: bytes) -> None:
    data = SMALL[:-12] + end
    assert png_reading.read_header(data).notes == ("no_end_marker",)
    assert png_reading.decode(data, (1, 1)).pixels.tolist() == [[0x80]]


def test_picture_that_lacks_rows_is_truncated_wherever_it_is_cut() -> None:
    starts = [start for kind, start, _ in png.chunks(LARGE) if kind == b"IDAT"]
    assert len(starts) > 1
    for length in (starts[1] - 8, starts[1] - 4, starts[1], starts[1] + 1000, len(LARGE) - 17):
        with pytest.raises(Truncated), translated("png"):
            png_reading.decode(LARGE[:length], png_reading.read_header(LARGE[:length]).size)


# --- metadata as text ---

EXIF = b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def raw(name: str, payload: bytes) -> tuple[bytes, bytes]:
    """Keyword and text as ImageMagick writes them."""
    digits = payload.hex()
    lines = "\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    return f"Raw profile type {name}".encode(), f"\n{name}\n{len(payload):8}\n{lines}\n".encode()


def text_chunk(kind: bytes, keyword: bytes, text: bytes) -> bytes:
    packed = zlib.compress(text)
    payload = {
        b"tEXt": b"\0" + text,
        b"zTXt": b"\0\0" + packed,
        b"iTXt": b"\0\0\0\0\0" + text,
        b"packed iTXt": b"\0\1\0en\0key\0" + packed,
    }[kind]
    return png_chunk(kind[-4:], keyword + payload)


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"packed iTXt"])
@pytest.mark.parametrize(
    "text",
    [
        raw("exif", EXIF),
        raw("exif", b"Exif\0\0" + EXIF),
        raw("APP1", b"Exif\0\0" + EXIF),
        raw("xmp", XMP),
        (b"XML:com.adobe.xmp", XMP),
    ],
    ids=["exif", "Exif", "APP1", "raw-xmp", "xmp"],
)
@pytest.mark.parametrize("late", [False, True])
def test_orientation_in_text_counts(kind: bytes, text: tuple[bytes, bytes], late: bool) -> None:
    chunk = text_chunk(kind, *text)
    data = png_by_hand(2, 1, 8, GREY, b"\0\x10\x20", *([] if late else [chunk]))
    data = data[:-12] + chunk + data[-12:] if late else data
    header = probe(data, max_pixels=10)
    assert (header.orientation, header.size) == (6, (1, 2))


def test_exif_chunk_counts_more_than_text() -> None:
    upright = EXIF[:-7] + b"\1" + EXIF[-6:]
    for exif, wanted in ((upright, 1), (EXIF, 6)):
        data = png_by_hand(2, 1, 8, GREY, b"\0\x10\x20", text_chunk(b"tEXt", *raw("exif", EXIF)), png_chunk(b"eXIf", exif))
        assert probe(data, max_pixels=10).orientation == wanted


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nxyz"),
        png_chunk(b"tEXt", b"Raw profile type exif\0no length"),
        png_chunk(b"zTXt", b"Raw profile type exif\0\0not deflated"),
        png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(png_reading.MAX_TEXT + 1))),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp"),
        png_chunk(b"tEXt", b""),
    ],
    ids=["digits", "length", "deflate", "large", "short", "empty"],
)
def test_broken_text_is_ignored(chunk: bytes) -> None:
    assert png_reading.read_header(png_by_hand(1, 1, 8, GREY, b"\0\x80", chunk)) == Facts((1, 1), xmp=None)


def test_profile_as_text() -> None:
    data = png_by_hand(1, 1, 8, GREY, b"\0\x80", text_chunk(b"zTXt", *raw("icc", b"p" * 200)))
    assert png_reading.read_header(data).icc == b"p" * 200
