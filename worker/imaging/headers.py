"""Read format, size, orientation and colour profile of an image file without decoding any pixels.

Sizes are parsed here rather than by Pillow for formats whose pixels Pillow would allocate on opening.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from PIL import AvifImagePlugin, BmpImagePlugin, GifImagePlugin, Image, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from imagemill.shared.errors import EmptyFile, NotAnImage, OutOfMemory, TooManyPixels, Truncated, sentence
from imagemill.worker.imaging import jpeg, png

MAX_PIECES = 100_000
MAX_BLOCKS = 1_000_000
MAX_TAGS = 4_096

# Naming Pillow's classes keeps its other decoders (EPS, PDF, FITS, ...) unreachable.
_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile]] = {
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "avif": AvifImagePlugin.AvifImageFile,
}
FORMATS = ("jpeg", *_OPENERS)
_STARTS = {
    b"\xff\xd8\xff": "jpeg",
    png.SIGNATURE: "png",
    **dict.fromkeys((b"GIF87a", b"GIF89a"), "gif"),
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "tiff"),
}
_BMP_HEADERS = {size.to_bytes(4, "little") for size in (12, 16, 40, 52, 56, 64, 108, 124)}
# (offset, magic bytes, name) of files that people send by mistake; the error names them.
_OTHERS = (
    (0, b"%PDF", "a PDF document"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"%!PS", "a PostScript document"),
    (0, b"PK\x03\x04", "a ZIP archive or office document"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (0, b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image"),
    (4, b"ftyphe", "a HEIC image"),  # heic, heix, hevc, ...
    (4, b"ftypmif1", "a HEIC image"),
    (4, b"ftyp", "a video or another kind of media file"),
)


@dataclass(frozen=True)
class Header:
    """Header of an image file: `size` is the upright (width, height), `orientation` (EXIF, 1 to 8) is applied by `decode`."""

    format: str
    size: tuple[int, int]
    orientation: int = 1
    icc: bytes | None = field(default=None, repr=False)

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) as stored in the file, before applying the orientation."""
        return (self.size[1], self.size[0]) if self.orientation >= 5 else self.size


def probe(data: bytes, *, max_pixels: int) -> Header:
    """Read the header of an image file in any supported format, recognised by content.

    Raises EmptyFile, NotAnImage, Truncated (also for damaged files), or TooManyPixels if the picture, or anything else the
    decoder would allocate for it, exceeds `max_pixels`.
    """
    kind = sniff(data)
    with translated(kind):
        if kind in _READERS:
            size, exif, icc = _READERS[kind](data)
        else:
            if kind == "tiff":
                _check_tiff(data, max_pixels)
            image = open_checked(data, kind)  # allocates nothing for these formats
            size, icc = image.size, image.info.get("icc_profile")
            exif = image.info.get("exif") if kind == "avif" else None  # Pillow rotates TIFFs itself
    check_size(size, max_pixels)
    turn = orientation(exif) if exif else 1
    icc = icc if isinstance(icc, bytes) and 128 <= len(icc) <= png.MAX_PROFILE else None
    return Header(kind, (size[1], size[0]) if turn >= 5 else size, turn, icc)


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Raise Truncated if a side is zero, TooManyPixels if width times height exceeds `max_pixels`."""
    width, height = size
    if width < 1 or height < 1:
        raise Truncated(f"the image has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise TooManyPixels(f"the image has {width:,} x {height:,} pixels, more than the limit of {max_pixels:,}")


def sniff(data: bytes) -> str:
    """Recognise the format, one of FORMATS, by the first bytes. Raises EmptyFile or NotAnImage."""
    if not data:
        raise EmptyFile("the file is empty (0 bytes)")
    for start, name in _STARTS.items():
        if data.startswith(start):
            return name
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith(b"BM") and len(data) >= 18 and data[14:18] in _BMP_HEADERS:
        return "bmp"
    if data[4:8] == b"ftyp" and any(brand in data[8:64] for brand in (b"avif", b"avis")):
        return "avif"
    raise NotAnImage(f"the file is {_kind(data)}; supported formats are {', '.join(FORMATS)}")


def _kind(data: bytes) -> str:
    """A description of a file that is not a supported image; completes `the file is ...`."""
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "a web page"
    if start.startswith(b"<"):
        return "an SVG drawing" if b"<svg" in start else "XML"
    for offset, magic, name in _OTHERS:
        if data.startswith(magic, offset):
            return name
    printable = b"".join(start.split()).decode("latin-1")
    return "text" if printable.isascii() and printable.isprintable() else "of an unknown kind"


@contextmanager
def translated(kind: str) -> Iterator[None]:
    """Turn the exceptions that decoders raise on bad data into Truncated, NotAnImage or OutOfMemory."""
    name = {"webp": "WebP"}.get(kind, kind.upper())
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(f"not enough memory to decode the {name} file") from error
    except NotImplementedError as error:
        raise NotAnImage(f"this variant of {name} is not supported ({sentence(error)})") from error
    # Pillow's plugins are Python code that trusts its input; on bad data they raise any of these.
    except (
        OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError,
        EOFError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
    ) as error:  # fmt: skip
        raise Truncated(f"the {name} file ends early or is damaged ({sentence(error)})") from error


def open_checked(data: bytes, kind: str, size: tuple[int, int] | None = None) -> ImageFile:
    """Open `data` with Pillow without decoding pixels. Raises Truncated if Pillow finds another size than `size`."""
    # Pillow's own limit is global and only warns below twice its value. Ours is per call, and checked before pixels are
    # decoded. Every thread sets the same value, so they can't interfere.
    Image.MAX_IMAGE_PIXELS = None
    image = _OPENERS[kind](io.BytesIO(data))
    if size is not None and image.size != size:
        raise Truncated(f"the file has conflicting sizes: {size[0]} x {size[1]} and {image.width} x {image.height} pixels")
    return image


def orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, from an EXIF block (a small TIFF file); 1 if it is missing or invalid."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass  # broken metadata must not fail the image
    return 1


def _read_webp(data: bytes) -> tuple[tuple[int, int], bytes | None, bytes | None]:
    """Canvas size, EXIF block and profile. https://developers.google.com/speed/webp/docs/riff_container"""
    size, exif, icc, position = None, None, None, 12
    for _ in range(MAX_PIECES):
        if position + 8 > len(data):
            break
        kind, length = struct.unpack_from("<4sI", data, position)
        start = position + 8
        if kind == b"VP8X" and size is None:
            wide, high = (int.from_bytes(data[at : at + 3], "little") for at in (start + 4, start + 7))
            size = (wide + 1, high + 1)
        elif kind == b"VP8L" and size is None:
            (bits,) = struct.unpack_from("<I", data, start + 1)
            size = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        elif kind == b"VP8 " and size is None:
            wide, high = struct.unpack_from("<HH", data, start + 6)
            size = (wide & 0x3FFF, high & 0x3FFF)
        elif kind == b"ICCP":
            icc = data[start : start + length]
        elif kind == b"EXIF":
            exif = data[start : start + length]
        position = start + length + (length & 1)
    if size is None:
        raise Truncated("the WebP file ends inside its header")
    return size, exif, icc


def _read_gif(data: bytes) -> tuple[tuple[int, int], None, None]:
    """Size of canvas and first frame, which may extend beyond it. https://www.w3.org/Graphics/GIF/spec-gif89a.txt"""
    wide, high, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    extension = False
    for _ in range(MAX_BLOCKS):
        head = data[position]
        if extension:  # each of its blocks begins with its length; length 0 ends the extension
            extension = head != 0
            position += 1 + head
        elif head == 0x2C:
            x, y, w, h = struct.unpack_from("<HHHH", data, position + 1)
            return (max(wide, x + w), max(high, y + h)), None, None
        elif head == 0x3B:
            raise Truncated("the GIF file has no picture")
        else:
            extension = head == 0x21
            position += 2 if extension else 1
    raise NotAnImage(f"the GIF file has more than {MAX_BLOCKS:,} blocks before its picture")


_READERS = {"jpeg": jpeg.read_header, "png": png.read_header, "webp": _read_webp, "gif": _read_gif}
PARSED_HERE = frozenset(_READERS)
"""Formats whose headers are read by our own code, in a time that depends on the size of the file only."""


def _check_tiff(data: bytes, max_pixels: int) -> None:
    """Reject a TIFF whose tags alone would make a decoder allocate too much: for the picture, a tile or the strip list."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    first, counter, entry, step = ("Q", "Q", "HHQ", 20) if big else ("I", "H", "HHI", 12)
    (start,) = struct.unpack_from(order + first, data, 8 if big else 4)
    (count,) = struct.unpack_from(order + counter, data, start)
    start += struct.calcsize(counter)
    if count > MAX_TAGS:
        raise NotAnImage(f"the TIFF file has {count:,} tags; the limit is {MAX_TAGS:,}")
    values: dict[int, int] = {}
    pieces = 0
    for at in range(start, start + step * count, step):
        tag, kind, length = struct.unpack_from(order + entry, data, at)
        if tag in (273, 324):  # StripOffsets, TileOffsets
            pieces = max(pieces, length)
        elif tag in (256, 257, 322, 323):  # width and height of picture and tile
            if kind not in (3, 4, 16):  # libtiff would accept any integer type
                raise NotAnImage(f"TIFF files with sizes of type {kind} are not supported")
            (value,) = struct.unpack_from(order + {3: "H", 4: "I", 16: "Q"}[kind], data, at + (12 if big else 8))
            values[tag] = max(value, values.get(tag, 1))
    if pieces > MAX_PIECES:
        raise NotAnImage(f"the TIFF file has {pieces:,} strips or tiles; the limit is {MAX_PIECES:,}")
    for wide, high in ((256, 257), (322, 323)):
        check_size((values.get(wide, 1), values.get(high, 1)), max_pixels)
