"""Metadata as files hold it: find its blocks in a file of any format that is read.

Nothing here trusts the file, and nothing fails an image: what is damaged or too large is left out.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from imagemill.shared.errors import ImageError
from imagemill.worker.imaging import png
from imagemill.worker.imaging.metadata import boxes, exif, iptc, xmp

EXIF_START, XMP_START = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
XMP_KEYWORD = "XML:com.adobe.xmp"
MAX_TEXT, MAX_TEXTS = 2**16, 2**22
"""Bytes of one text of a PNG file, and of all, counting each as 4 kB at least."""
COMMENT = "Comment"
"""The keyword under which PNG files hold what JPEG files hold as a comment."""
_INCH = 0.0254  # metres
_XMP_TAG, _IPTC_TAG, _PHOTOSHOP_TAG = 700, 33723, 34377
_PIECES = 100_000


@dataclass(frozen=True)
class Blocks:
    """EXIF as a TIFF structure, an XMP packet, Photoshop resources by number, pixels per inch, and texts by PNG keyword."""

    exif: bytes = b""
    xmp: bytes = b""
    resources: Mapping[int, bytes] = field(default_factory=dict)
    dpi: tuple[float, float] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.exif or self.xmp or self.resources or self.dpi or self.texts)


def find(data: bytes, kind: str) -> Blocks:
    """The blocks of metadata in a file of format `kind`."""
    try:
        return _READERS[kind](data) if kind in _READERS else Blocks()
    except (ImageError, LookupError, ValueError, TypeError, struct.error, zlib.error):
        return Blocks()


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of each segment from its marker on, up to and including the first start of scan.

    Raises ValueError if the file isn't built like that.
    """
    at = 2
    for _ in range(_PIECES):
        while data[at + 1] == 0xFF:  # fill bytes
            at += 1
        marker = data[at + 1]
        if data[at] != 0xFF or marker < 0xC0 or marker in range(0xD0, 0xDA):
            raise ValueError("no segment where one is expected")
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, at, end
        if marker == 0xDA:
            return
        at = end
    raise ValueError("too many segments")


def _of_jpeg(data: bytes) -> Blocks:
    found, photoshop, dpi = Blocks(), b"", None
    for marker, start, end in jpeg_segments(data):
        content = data[start + 4 : min(end, start + 4 + 2**16)]
        if marker == 0xE0 and content[:5] == b"JFIF\0" and len(content) >= 12:
            unit, wide, high = struct.unpack_from(">BHH", content, 7)
            factor = {1: 1.0, 2: 2.54}.get(unit)
            dpi = (wide * factor, high * factor) if factor else None
        elif marker == 0xE1 and content.startswith(EXIF_START) and not found.exif:
            found = replace(found, exif=content[len(EXIF_START) :])
        elif marker == 0xE1 and content.startswith(XMP_START) and not found.xmp:
            found = replace(found, xmp=content[len(XMP_START) :])
        elif marker == 0xED and content.startswith(iptc.PHOTOSHOP_3):
            photoshop += content[len(iptc.PHOTOSHOP_3) :]
        elif marker == 0xFE and COMMENT not in found.texts:
            found = replace(found, texts={COMMENT: _decoded(content)})
    return replace(found, resources=iptc.resources(photoshop), dpi=dpi)


def _of_png(data: bytes) -> Blocks:
    found, texts, room = Blocks(), dict[str, bytes](), MAX_TEXTS
    for kind, start, end in png.chunks(data):
        content = data[start:end] if end - start <= xmp.MAX_PACKET else b""
        if kind == b"eXIf":
            found = replace(found, exif=content)
        elif kind == b"pHYs" and content[8:9] == b"\1":
            wide, high = struct.unpack_from(">II", content)
            found = replace(found, dpi=(_per_inch(wide), _per_inch(high)))
        elif kind in (b"tEXt", b"zTXt", b"iTXt") and room > 0:
            with suppress(ValueError, LookupError, zlib.error):
                keyword, text = _png_text(kind, content)
                texts.setdefault(keyword.decode("latin-1"), text)
                room -= len(text)
            room -= 2**12  # even a text that is empty or broken costs time
    found = replace(found, xmp=texts.pop(XMP_KEYWORD, b""))
    for name in [name for name in texts if name.startswith("Raw profile type ")]:  # as ImageMagick writes them
        found = _with_raw_profile(found, name.removeprefix("Raw profile type "), texts.pop(name))
    return replace(found, texts={name: _decoded(text) for name, text in texts.items() if len(text) <= MAX_TEXT})


def _png_text(kind: bytes, content: bytes) -> tuple[bytes, bytes]:
    """Keyword and text, which is UTF-8 in all of them here. Raises ValueError, LookupError or zlib.error."""
    keyword, _, rest = content.partition(b"\0")
    if kind == b"iTXt":
        packed, (_, _, text) = rest[0], rest[2:].split(b"\0", 2)
        return keyword, _inflated(text) if packed else text
    text = _inflated(rest[1:]) if kind == b"zTXt" else rest
    return keyword, text if keyword.startswith(b"Raw profile") else text.decode("latin-1").encode()


def _inflated(packed: bytes) -> bytes:
    inflate = zlib.decompressobj()
    text = inflate.decompress(packed, 2 * xmp.MAX_PACKET)
    return text if inflate.eof else b""


def _with_raw_profile(found: Blocks, name: str, text: bytes) -> Blocks:
    digits = b"".join(text.strip().split(b"\n")[2:])  # after the name and the length
    try:
        content = bytes.fromhex(digits.decode("ascii", "ignore"))
    except ValueError:
        return found
    if name in ("exif", "APP1") and content.startswith(EXIF_START) and not found.exif:
        return replace(found, exif=content[len(EXIF_START) :])
    if name in ("xmp", "APP1") and not content.startswith(EXIF_START) and not found.xmp:
        return replace(found, xmp=content.removeprefix(XMP_START))
    if name in ("iptc", "8bim"):
        known = iptc.resources(content.removeprefix(iptc.PHOTOSHOP_3))
        return replace(found, resources=known or {iptc.IPTC: content})
    return found


def riff_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, end) of each chunk's payload in a WebP file, as far as they are complete."""
    at = 12
    for _ in range(_PIECES):
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 > len(data) or at + 8 + length > len(data):
            return
        yield kind, at + 8, at + 8 + length
        at += 8 + length + length % 2


def _of_webp(data: bytes) -> Blocks:
    parts: dict[bytes, bytes] = {}
    for kind, start, end in riff_chunks(data):
        if kind in (b"EXIF", b"XMP ") and end - start <= xmp.MAX_PACKET:
            parts.setdefault(kind, data[start:end])
    return Blocks(parts.get(b"EXIF", b""), parts.get(b"XMP ", b""))


def _of_tiff(data: bytes) -> Blocks:
    _, first = exif.read(data)
    photoshop = iptc.resources(first[_PHOTOSHOP_TAG][2]) if _PHOTOSHOP_TAG in first else {}
    if _IPTC_TAG in first:
        photoshop = {iptc.IPTC: first[_IPTC_TAG][2]} | photoshop
    return Blocks(data, first.get(_XMP_TAG, (0, 0, b""))[2], photoshop)


def _of_bmp(data: bytes) -> Blocks:
    wide, high = struct.unpack_from("<ii", data, 38) if int.from_bytes(data[14:18], "little") >= 40 else (0, 0)
    return Blocks(dpi=(_per_inch(wide), _per_inch(high)))


def _of_boxes(data: bytes) -> Blocks:
    return _of_parts(boxes.metadata(data))


def _of_jxl(data: bytes) -> Blocks:
    return _of_parts(boxes.of_jxl(data))


def _of_parts(content: Mapping[str, bytes]) -> Blocks:
    return Blocks(content.get("exif", b""), content.get("xmp", b""))


def _per_inch(per_metre: int) -> float:
    whole = round(per_metre * _INCH)
    return float(whole) if round(whole / _INCH) == per_metre else per_metre * _INCH


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1")


_READERS: dict[str, Callable[[bytes], Blocks]] = {
    "jpeg": _of_jpeg,
    "png": _of_png,
    "webp": _of_webp,
    "tiff": _of_tiff,
    "bmp": _of_bmp,
    "avif": _of_boxes,
    "heic": _of_boxes,
    "jxl": _of_jxl,
}
