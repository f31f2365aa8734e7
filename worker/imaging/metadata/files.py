"""Put blocks of metadata into finished JPEG, PNG, WebP and AVIF files, in place of theirs; pixels stay as they are."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace

from imagemill.worker.imaging import heif, png
from imagemill.worker.imaging.metadata import boxes, exif, iptc
from imagemill.worker.imaging.metadata.blocks import (
    COMMENT,
    EXIF_START,
    XMP_KEYWORD,
    XMP_START,
    Blocks,
    jpeg_segments,
    riff_chunks,
)

_SEGMENT = 65_533  # bytes of a segment's payload
_INCH = 0.0254  # metres
_APPLICATION, _COMMENT = range(0xE0, 0xF0), 0xFE
_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in scans, 0xFF is followed by 0, another 0xFF or a restart marker
# Chunks of a PNG file that decide how its pixels look.
_PNG_LOOK = frozenset(
    (
        *(b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"),
        *(b"cHRM", b"cICP", b"gAMA", b"iCCP", b"mDCV", b"cLLI", b"sBIT", b"sRGB", b"bKGD"),
    )
)
_PNG_PROFILES = (b"Raw profile type icc\0", b"Raw profile type icm\0")
_AVIF_LOOK = {b"ftyp", b"meta", b"mdat", b"free", b"skip"}
_NO_EXIF = b"MM\0*\0\0\0\x08" + bytes(6)  # a directory without entries
_WITH_ALPHA, _WITH_EXIF, _WITH_XMP = 0x10, 8, 4


def rewritten(data: bytes, kind: str, blocks: Blocks) -> bytes | None:
    """The file of one of the formats that are written with exactly these blocks; None if it is not built in a usual way."""
    try:
        return _WRITERS[kind](data, blocks)
    except (LookupError, ValueError, struct.error):
        return None


def _jpeg(data: bytes, blocks: Blocks) -> bytes:
    """Of the other application segments, only those that decide the colours stay: Adobe's and the profile."""
    before, after = [b"\xff\xd8"], []
    for marker, start, end in jpeg_segments(data):
        content = data[start + 4 : end]
        if marker == 0xDA:
            after.append(data[start : _end_of_image(data, end)])
        elif marker == 0xE0 and content.startswith(b"JFIF\0") and len(content) >= 14:
            before[1:] = [_jfif(content, blocks.dpi)]  # must come first, once
        elif _decides_look(marker, content):
            after.append(data[start:end])
    if blocks.dpi and len(before) == 1 and not blocks.exif:  # a new JFIF segment could change how colours are read
        blocks = replace(blocks, exif=exif.write(exif.Exif(), size=(0, 0), srgb=False, dpi=blocks.dpi))
    photoshop = iptc.photoshop_block(blocks.resources)
    ours = (
        (0xE1, EXIF_START, blocks.exif),
        (0xE1, XMP_START, blocks.xmp),
        (0xED, iptc.PHOTOSHOP_3, photoshop),
        (_COMMENT, b"", blocks.texts.get(COMMENT, "").encode()),
    )
    segments = [
        struct.pack(">BBH", 0xFF, marker, len(start) + len(content) + 2) + start + content
        for marker, start, content in ours
        if content and fits_segment(len(start) + len(content))
    ]
    return b"".join([*before, *segments, *after])


def _decides_look(marker: int, content: bytes) -> bool:
    if marker in _APPLICATION:
        return marker == 0xEE or (marker == 0xE2 and content.startswith(b"ICC_PROFILE\0"))
    return marker != _COMMENT


def fits_segment(length: int) -> bool:
    """Whether a JPEG file can hold a block of this many bytes, including its identifier."""
    return length <= _SEGMENT


def _jfif(content: bytes, dpi: tuple[float, float] | None) -> bytes:
    """The segment with this resolution and without a thumbnail. Without `dpi`, only the aspect of a pixel stays."""
    density = struct.pack(">BHH", 1, *(round(side) for side in dpi)) if dpi else b"\0\0\1\0\1"
    density = content[7:12] if not dpi and not content[7] else density
    return b"\xff\xe0\0\x10" + content[:7] + density + b"\0\0"


def _end_of_image(data: bytes, at: int) -> int:
    """The offset behind the end marker. What follows is another picture, a video or a maker's data."""
    while found := _END.search(data, at):
        at = found.end()
        if data[at - 1] == 0xD9:
            return at
        at += max(2, int.from_bytes(data[at : at + 2], "big"))  # a table between scans, or the next scan's header
    return len(data)


def _png(data: bytes, blocks: Blocks) -> bytes:
    kept = [
        (kind, data[start - 8 : end + 4])
        for kind, start, end in png.chunks(data)
        if kind in _PNG_LOOK or (kind in (b"tEXt", b"zTXt") and data.startswith(_PNG_PROFILES, start))
    ]
    first_pixels = next(number for number, (kind, _) in enumerate(kept) if kind == b"IDAT")
    parts = [chunk for _, chunk in kept]
    return b"".join([png.SIGNATURE, *parts[:first_pixels], *_png_chunks(blocks), *parts[first_pixels:]])


def _png_chunks(blocks: Blocks) -> Iterator[bytes]:
    if blocks.dpi:
        yield png.chunk(b"pHYs", struct.pack(">IIB", *(round(side / _INCH) for side in blocks.dpi), 1))
    if blocks.exif:
        yield png.chunk(b"eXIf", blocks.exif)
    if blocks.xmp:
        yield png.chunk(b"iTXt", XMP_KEYWORD.encode() + bytes(5) + blocks.xmp)
    for keyword, text in blocks.texts.items():
        yield png.chunk(b"iTXt", keyword.encode("latin-1") + bytes(5) + text.encode())


def _webp(data: bytes, blocks: Blocks) -> bytes:
    chunks = {kind: data[start:end] for kind, start, end in reversed(list(riff_chunks(data)))}
    size, flags = _webp_canvas(chunks)
    ours = [(b"EXIF", blocks.exif, _WITH_EXIF), (b"XMP ", blocks.xmp, _WITH_XMP)]
    if b"VP8X" not in chunks and not (blocks.exif or blocks.xmp):
        return data[: 8 + int.from_bytes(data[4:8], "little")]
    for _, content, flag in ours:
        flags = flags | flag if content else flags & ~flag
    canvas = struct.pack("<I", flags) + b"".join((side - 1).to_bytes(3, "little") for side in size)
    look = [(kind, chunks[kind]) for kind in (b"ICCP", b"ALPH", b"VP8 ", b"VP8L") if kind in chunks]
    parts = [(b"VP8X", canvas), *look, *((kind, content) for kind, content, _ in ours if content)]
    body = b"".join(kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2) for kind, content in parts)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _webp_canvas(chunks: dict[bytes, bytes]) -> tuple[tuple[int, int], int]:
    """Size and flags of a still picture. Raises ValueError for an animation, which is not rewritten."""
    if b"VP8X" in chunks:
        header = chunks[b"VP8X"]
        if b"ANIM" in chunks or len(header) < 10:
            raise ValueError("an animation")
        width, height = (1 + int.from_bytes(header[at : at + 3], "little") for at in (4, 7))
        return (width, height), int.from_bytes(header[:4], "little")
    if b"VP8L" in chunks:
        (bits,) = struct.unpack_from("<I", chunks[b"VP8L"], 1)
        return ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1), _WITH_ALPHA * (bits >> 28 & 1)
    width, height = struct.unpack_from("<HH", chunks[b"VP8 "], 6)
    return (width & 0x3FFF, height & 0x3FFF), 0


def _avif(data: bytes, blocks: Blocks) -> bytes:
    """In AVIF files, every item has its place: the new contents stand where the former did, padded. Raises ValueError."""
    if not {kind for kind, _, _ in heif.boxes(data, 0, len(data))} <= _AVIF_LOOK:
        raise ValueError("an unusual box, which may hold anything")
    out = bytearray(data)
    left = {"exif": blocks.exif, "xmp": blocks.xmp}
    for name, (start, end) in boxes.items(data):
        content = left.pop(name, b"")
        if name == "exif":
            content = (content or _NO_EXIF).ljust(end - start, b"\0")
        if len(content) > end - start or not end:
            raise ValueError("no room for the metadata")
        out[start:end] = content.ljust(end - start)
    if any(left.values()):
        raise ValueError("no place for the metadata")
    return bytes(out)


_WRITERS: dict[str, Callable[[bytes, Blocks], bytes]] = {"jpeg": _jpeg, "png": _png, "webp": _webp, "avif": _avif}
