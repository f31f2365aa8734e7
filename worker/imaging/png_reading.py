"""PNG: what the chunks state about colour and orientation, and decoding.

Format: https://www.w3.org/TR/png-3/
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.ImageFile import ImageFile

from imagemill.worker.imaging import colour, png
from imagemill.worker.imaging.facts import NO_END, REDUCED, Facts, Samples
from imagemill.worker.imaging.icc import as_rgb
from imagemill.worker.imaging.pillow import open_checked

MAX_TEXT = 2**20
"""Bytes of a compressed text that are read; EXIF has 64 KiB at most, and the orientation stands early in XMP."""

_COLOUR = (b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_XMP = b"XML:com.adobe.xmp"
_RAW = re.compile(rb"\s*(?:exif|app1|xmp|icc|icm)\s+\d+\s", re.IGNORECASE)


def read_header(data: bytes) -> Facts:
    """What the file states, without decoding. Raises as `png.chunks`."""
    size, depth, kind = (0, 0), 8, b""
    first, texts, exif, end = dict[bytes, bytes](), dict[bytes, bytes](), None, 0
    for kind, start, end in png.chunks(data):
        if kind == b"IHDR":
            size, depth = struct.unpack_from(">II", data, start), data[start + 8]
        elif kind == b"eXIf":
            exif = data[start:end]
        elif kind in _COLOUR or kind == b"IDAT":
            if b"IDAT" not in first:  # what comes later doesn't count
                first.setdefault(kind, data[start:end] if kind != b"IDAT" else b"")
        elif kind in _TEXTS:
            keyword, _, rest = data[start:end].partition(b"\0")
            if keyword == _XMP or keyword.startswith(b"Raw profile type "):
                texts.setdefault(keyword, _text(kind, rest))
    notes = (REDUCED,) * (depth == 16) + (NO_END,) * (kind != b"IEND")
    exif = exif or _raw(texts, "exif") or _raw(texts, "APP1")
    xmp = texts.get(_XMP) or _raw(texts, "xmp")
    return Facts(size, exif, xmp, _profile(first, texts), notes=notes)


def _profile(chunks: Mapping[bytes, bytes], texts: Mapping[bytes, bytes]) -> bytes | None:
    """The profile of the statement of colour that counts: cICP before iCCP before sRGB before gAMA with cHRM (PNG-3, 4.3).

    None for sRGB, and if nothing is stated or can't be read.
    """
    cicp = chunks.get(b"cICP", b"")
    if len(cicp) == 4 and cicp[2] == 0 and colour.known(cicp[0], cicp[1]):  # RGB is the only matrix that PNG has
        return colour.by_code_points(cicp[0], cicp[1], full_range=cicp[3] != 0, what="the PNG file")
    profile = _inflated(chunks[b"iCCP"].partition(b"\0")[2][1:], png.MAX_PROFILE) if b"iCCP" in chunks else None
    profile = profile or _raw(texts, "icc") or _raw(texts, "icm")
    if profile or b"sRGB" in chunks or len(chunks.get(b"gAMA", b"")) != 4:
        return profile
    gamma = int.from_bytes(chunks[b"gAMA"], "big") / 100_000
    corners = chunks.get(b"cHRM", b"")
    chromaticities = tuple(value / 100_000 for value in struct.unpack(">8I", corners)) if len(corners) == 32 else colour.SRGB
    return colour.by_gamma(gamma, chromaticities)


def _inflated(packed: bytes, limit: int) -> bytes | None:
    """Inflated bytes; None if they are damaged or more than `limit`: a broken profile must not fail the image."""
    inflate = zlib.decompressobj()
    try:
        plain = inflate.decompress(packed, limit)
    except zlib.error:
        return None
    return plain if inflate.eof else None


def _text(kind: bytes, rest: bytes) -> bytes:
    """The text of a tEXt, zTXt or iTXt chunk, from what follows its keyword."""
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif packed:
        rest = rest[1:]
    return (_inflated(rest, MAX_TEXT) or b"") if packed else rest


def _raw(texts: Mapping[bytes, bytes], name: str) -> bytes | None:
    """Metadata that ImageMagick writes as text: name, length and hexadecimal digits."""
    text = texts.get(b"Raw profile type " + name.encode(), b"")
    head = _RAW.match(text)
    try:
        found = bytes.fromhex(text[head.end() :].decode("ascii")) if head else b""
    except ValueError:
        return None
    return found.removeprefix(b"Exif\0\0") or None


def decode(data: bytes, size: tuple[int, int]) -> Samples:
    """Decode pixels: L, RGB or RGBA. 16 bits are rounded to 8. Raises Truncated, and Pillow's exceptions on damage."""
    depth, kind = data[24], data[25]  # `read_header` has checked that the header is the first chunk
    data, key = png.checked(data)
    image = open_checked(data, "png", size)
    if depth == 16:
        pixels, alpha = _rounded(data, image, kind, key)
    else:
        image.load()
        pixels, mode = samples(image)
        alpha = png.colour_key(pixels, key, depth) if key is not None else None
        if alpha is None:
            return Samples(pixels, mode)
    mode = "L" if pixels.ndim == 2 else "RGB"
    return Samples(np.dstack([as_rgb(pixels, mode), alpha]), "RGBA") if alpha is not None else Samples(pixels, mode)


def samples(image: ImageFile) -> tuple[NDArray[np.uint8], str]:
    """The pixels of a loaded Pillow image of 8 bits, as L, RGB or RGBA, and which of these."""
    mode = "RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB"
    return np.array(image if image.mode == mode else image.convert(mode)), mode


def _rounded(data: bytes, image: ImageFile, kind: int, key: bytes | None) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Grey [h, w] or RGB [h, w, 3], and alpha if there is any, of a 16-bit picture of colour type `kind`.

    Pillow keeps the upper bytes only; told that the samples are little-endian, it keeps the lower ones.
    """
    if kind == 0:
        wide: NDArray[np.uint16] = np.array(image)
        return _nearest((wide >> 8).astype(np.uint8), wide.astype(np.uint8)), _keyed(wide, key)
    if kind == 4:  # the two bytes of grey and of alpha, as if they were four channels
        bytes_of = _loaded(image, "RGBA")
        grey, alpha = (_nearest(bytes_of[:, :, at], bytes_of[:, :, at + 1]) for at in (0, 2))
        return grey, alpha
    name = "RGB" if kind == 2 else "RGBA"
    upper, lower = _loaded(image, name + ";16B"), _loaded(open_checked(data, "png"), name + ";16L")
    pixels = _nearest(upper, lower)
    if kind == 6:
        return np.ascontiguousarray(pixels[:, :, :3]), pixels[:, :, 3]
    return pixels, _keyed(upper * np.uint16(256) + lower, key) if key is not None else None


def _loaded(image: ImageFile, layout: str) -> NDArray[np.uint8]:
    image._mode = layout.partition(";")[0]
    image.tile = [tile._replace(args=layout) for tile in image.tile]
    image.load()
    return np.array(image)


def _keyed(wide: NDArray[np.uint16], key: bytes | None) -> NDArray[np.uint8] | None:
    return png.colour_key(wide, key, 16) if key is not None else None


def _nearest(upper: NDArray[np.uint8], lower: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The 8-bit levels nearest to 16-bit samples: value / 257, where value = 257 * upper + (lower - upper)."""
    up, down = cv2.subtract(lower, upper) > 128, cv2.subtract(upper, lower) > 128
    result: NDArray[np.uint8] = upper + up - down
    return result
