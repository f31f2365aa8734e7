"""Read format, size, orientation and colour profile of an image file without decoding any pixels.

Sizes are parsed here rather than by Pillow for formats whose pixels Pillow would allocate on opening.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from PIL.Image import DecompressionBombError

from imagemill.shared.errors import EmptyFile, NotAnImage, OutOfMemory, Truncated, UnsupportedFormat, sentence
from imagemill.worker.imaging import bmp, colour, exif, heic, heif, jpeg, jxl, png, png_reading, tiff
from imagemill.worker.imaging.facts import REDUCED, Facts, check_size
from imagemill.worker.imaging.pillow import OPENERS, open_checked

MAX_PIECES = 100_000
MAX_BLOCKS = 1_000_000

FORMATS = ("jpeg", *OPENERS, "heic", "jxl")
_STARTS = {
    b"\xff\xd8\xff": "jpeg",
    png.SIGNATURE: "png",
    **dict.fromkeys((b"GIF87a", b"GIF89a"), "gif"),
    **dict.fromkeys((jxl.BARE, jxl.CONTAINER), "jxl"),
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "tiff"),
}
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_OF_CAMERAS = frozenset({"jpeg", "webp"})  # formats in which EXIF is the only place for the camera's colour space
_BMP_HEADERS = {size.to_bytes(4, "little") for size in (12, 16, 40, 52, 56, 64, 108, 124)}
# (offset, magic bytes, name) of files that people send by mistake; the error names them.
_OTHERS = (
    (0, b"%PDF", "a PDF document"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"%!PS", "a PostScript document"),
    (0, b"PK\x03\x04", "a ZIP archive or office document"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image"),
    (4, b"ftyp", "a video or another kind of media file"),
)


@dataclass(frozen=True)
class Header:
    """Header of an image file: `size` is the upright (width, height), `orientation` (EXIF, 1 to 8) is applied by `decode`.

    `icc` is the file's profile, or an equivalent one if it states its colours in another way. `notes` are among
    `facts.FILE_NOTES`. `lossless` is true for a WebP or JPEG XL file that stores pixels without loss.
    """

    format: str
    size: tuple[int, int]
    orientation: int = 1
    icc: bytes | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    lossless: bool = False

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.size[0] * self.size[1]

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) as stored in the file, before applying the orientation."""
        return (self.size[1], self.size[0]) if self.orientation >= 5 else self.size


def probe(data: bytes, *, max_pixels: int) -> Header:
    """Read the header of an image file in any supported format, recognised by content.

    Raises EmptyFile, NotAnImage, UnsupportedFormat, Truncated (also for damaged files), or TooManyPixels if the picture, or
    anything else the decoder would allocate for it, exceeds `max_pixels`.
    """
    kind = sniff(data)
    with translated(kind):
        facts = _BOUNDED[kind](data, max_pixels) if kind in _BOUNDED else _READERS[kind](data)
    check_size(facts.size, max_pixels)
    turn = facts.orientation or exif.orientation(facts.exif, facts.xmp)
    icc = facts.icc if facts.icc is not None and 128 <= len(facts.icc) <= png.MAX_PROFILE else None
    if icc is None and kind in _OF_CAMERAS and exif.says_adobe_rgb(facts.exif):
        icc = colour.adobe_rgb()
    return Header(kind, (facts.size[1], facts.size[0]) if turn >= 5 else facts.size, turn, icc, facts.notes, facts.lossless)


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
    if data[4:8] == b"ftyp" and any(brand in data[8:64] for brand in _HEIC_BRANDS):
        return "heic"
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
    """Turn the exceptions that decoders raise on bad data into Truncated, UnsupportedFormat or OutOfMemory."""
    name = {"webp": "WebP", "jxl": "JPEG XL"}.get(kind, kind.upper())
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(f"not enough memory to decode the {name} file") from error
    except NotImplementedError as error:
        raise UnsupportedFormat(f"this variant of {name} is not supported ({sentence(error)})") from error
    # Pillow's plugins are Python code that trusts its input; on bad data they raise any of these.
    except (
        OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError,
        EOFError, RuntimeError, struct.error, zlib.error, DecompressionBombError,
    ) as error:  # fmt: skip
        if str(error).startswith("Unsupported"):
            raise UnsupportedFormat(f"this variant of {name} is not supported ({sentence(error)})") from error
        raise Truncated(f"the {name} file ends early or is damaged ({sentence(error)})") from error


def _read_webp(data: bytes) -> Facts:
    """Canvas size, EXIF, XMP and profile. https://developers.google.com/speed/webp/docs/riff_container"""
    size, found, position = None, dict[bytes, bytes](), 12
    coding = b""  # of the first picture
    for _ in range(MAX_PIECES):
        if position + 8 > len(data):
            break
        kind, length = struct.unpack_from("<4sI", data, position)
        start = position + 8
        if not coding:
            coding = kind if kind in (b"VP8 ", b"VP8L") else data[start + 16 : start + 20] if kind == b"ANMF" else b""
        if kind == b"VP8X" and size is None:
            wide, high = (int.from_bytes(data[at : at + 3], "little") for at in (start + 4, start + 7))
            size = (wide + 1, high + 1)
        elif kind == b"VP8L" and size is None:
            (bits,) = struct.unpack_from("<I", data, start + 1)
            size = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        elif kind == b"VP8 " and size is None:
            wide, high = struct.unpack_from("<HH", data, start + 6)
            size = (wide & 0x3FFF, high & 0x3FFF)
        elif kind in (b"ICCP", b"EXIF", b"XMP "):
            found[kind] = data[start : start + length]
        position = start + length + (length & 1)
    if size is None:
        raise Truncated("the WebP file ends inside its header")
    return Facts(size, found.get(b"EXIF"), found.get(b"XMP "), found.get(b"ICCP"), lossless=coding == b"VP8L")


def _read_gif(data: bytes) -> Facts:
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
            return Facts((max(wide, x + w), max(high, y + h)))
        elif head == 0x3B:
            raise Truncated("the GIF file has no picture")
        else:
            extension = head == 0x21
            position += 2 if extension else 1
    raise NotAnImage(f"the GIF file has more than {MAX_BLOCKS:,} blocks before its picture")


def _read_bmp(data: bytes) -> Facts:
    """Size, and the profile of version 5."""
    return Facts(open_checked(data, "bmp").size, icc=bmp.profile(data))  # Pillow allocates nothing for it


def _read_heif(data: bytes, kind: str) -> Facts:
    """What the decoder says, which opens the file without decoding, and what the boxes say about colour.

    An embedded profile counts more than code points (ISO/IEC 23000-22, 7.3.6.4). The orientation is that of the boxes, which
    the decoder puts into EXIF.
    """
    image, stated = open_checked(data, kind), heif.read(data)
    icc = image.info.get("icc_profile")
    if icc is None and stated.code_points is not None:
        icc = colour.by_code_points(*stated.code_points, what=f"the {kind.upper()} file")
    return Facts(image.size, image.info.get("exif"), icc=icc, notes=(REDUCED,) * (stated.bits > 8))


_READERS: dict[str, Callable[[bytes], Facts]] = {
    "jpeg": jpeg.read_header,
    "png": png_reading.read_header,
    "webp": _read_webp,
    "gif": _read_gif,
    "bmp": _read_bmp,
    "avif": partial(_read_heif, kind="avif"),
    "jxl": jxl.read_header,
}
PARSED_HERE = frozenset({"jpeg", "png", "webp", "gif"})
"""Formats whose headers our own code reads, in a time that depends only on the size of the file."""
# These hold more pictures than the one that is read, or sizes that only their readers know.
_BOUNDED: dict[str, Callable[[bytes, int], Facts]] = {"tiff": tiff.read_header, "heic": heic.read_header}
