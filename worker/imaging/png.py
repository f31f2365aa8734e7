"""PNG: its chunks walked and checked, and a fast encoder (up filter in numpy, deflate by ISA-L).

Format: https://www.w3.org/TR/png-3/
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from imagemill.shared.errors import NotAnImage, Truncated

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 100_000
MAX_PROFILE = 4 * 2**20
"""Bytes of an ICC profile; the largest in use have about two million."""

_UP = 2
_STRIPE = 2**20  # bytes filtered and deflated at a time: they stay in the cache, and memory stays flat
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk's payload up to IEND; Truncated where one is missing or cut short."""
    position = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        if position + 12 > len(data):
            raise Truncated("the PNG file ends early")
        length, kind = struct.unpack_from(">I4s", data, position)
        start, end = position + 8, position + 8 + length
        if end + 4 > len(data):
            raise Truncated(f"the PNG file ends within its {kind.decode('latin-1')!r} chunk")
        if (kind == b"IHDR") != (position == len(SIGNATURE)) or (kind == b"IHDR" and length != 13):
            raise Truncated("the PNG file does not begin with its header")
        yield kind, start, end
        if kind == b"IEND":
            return
        position = end + 4
    raise NotAnImage(f"the PNG file has more than {MAX_CHUNKS:,} chunks")


def read_header(data: bytes) -> tuple[tuple[int, int], bytes | None, bytes | None]:
    """(width, height), the EXIF block and the ICC profile, where there are any; nothing is decoded."""
    size, exif, icc = (0, 0), None, None
    for kind, start, end in chunks(data):
        if kind == b"IHDR":
            size = struct.unpack_from(">II", data, start)
        elif kind == b"eXIf":
            exif = data[start:end]
        elif kind == b"iCCP" and icc is None:
            icc = _profile(data[start:end])
    return size, exif, icc


def _profile(payload: bytes) -> bytes | None:
    """The profile of an iCCP chunk: name, 0, method 0, deflated bytes. None where it is damaged or too large."""
    _, _, packed = payload.partition(b"\0")
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(packed[1:], MAX_PROFILE)
    except zlib.error:
        return None  # a broken profile doesn't fail the image
    return profile if inflate.eof else None


def checked(data: bytes) -> tuple[bytes, bytes | None]:
    """The file with its pixel chunks only, all check sums verified; and the colour key of a picture without palette.

    What is left out (text, profiles, further frames) can't trouble the decoder, and the key
    (tRNS) is for `colour_key`, since decoders compare it at the wrong depth. Raises Truncated.
    """
    view = memoryview(data)
    kept: list[bytes | memoryview] = [SIGNATURE]
    key, palette = None, False
    for kind, start, end in chunks(data):
        if kind not in _PIXEL_CHUNKS:
            continue
        if isal_zlib.crc32(view[start - 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise Truncated(f"the PNG file is damaged: wrong check sum of its {kind.decode()} chunk")
        if kind == b"IHDR":
            palette = data[start + 9] == 3
        if kind == b"tRNS" and not palette:
            key = data[start:end]
        else:
            kept.append(view[start - 8 : end + 4])
    return b"".join(kept), key


def colour_key(pixels: NDArray[np.uint8 | np.uint16], key: bytes, depth: int) -> NDArray[np.uint8]:
    """Alpha [h, w] uint8: 0 where `pixels` (L [h, w] or RGB [h, w, 3]) have the colour of `key`, else 255.

    `key` has 16 bits per channel at the file's `depth`. Of 16-bit colour only the upper bytes are
    compared, as nothing else is decoded; 16-bit grey is compared whole when it comes as uint16.
    """
    channels = 1 if pixels.ndim == 2 else 3
    if len(key) < 2 * channels:
        raise Truncated("the PNG file's tRNS chunk is cut short")
    wanted: NDArray[np.int64] = np.frombuffer(key, ">u2", channels).astype(np.int64)
    if pixels.dtype == np.uint8:
        wanted = wanted >> 8 if depth == 16 else (wanted & (2**depth - 1)) * 255 // (2**depth - 1)
    same = pixels == wanted if channels == 3 else (pixels == wanted[0])[:, :, None]
    return np.where(same.all(axis=2), np.uint8(0), np.uint8(255))


def _chunk(kind: bytes, payload: bytes) -> bytes:
    crc = isal_zlib.crc32(payload, isal_zlib.crc32(kind))
    return struct.pack(">I4s", len(payload), kind) + payload + struct.pack(">I", crc)


def clear_hidden(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGBA pixels [h, w, 4] with 0 in all four channels where alpha is 0: nobody sees it and it costs bytes."""
    words = np.ascontiguousarray(pixels).view("<u4")
    cleared: NDArray[np.uint8] = (words * (words > 0x00FFFFFF)).view(np.uint8)
    return cleared


def encode(pixels: NDArray[np.uint8], icc: bytes | None = None, *, clear: bool = True) -> bytes:
    """A PNG of `pixels` (grey [h, w, 1], RGB [h, w, 3] or RGBA [h, w, 4], uint8), colour under alpha 0 cleared if `clear`.

    Each row is stored as its difference to the row above: one subtraction per byte, where
    choosing the best filter per row costs most of an encoder's time.
    """
    height, width, channels = pixels.shape
    row_bytes = width * channels
    step = max(1, _STRIPE // row_bytes)
    deflate = isal_zlib.compressobj(2)  # as fast as level 1 on filtered photos, 1 % fewer bytes
    out = [
        SIGNATURE,
        _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)),
    ]
    if icc is not None:
        out.append(_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)))
    above = np.zeros((1, row_bytes), np.uint8)
    for top in range(0, height, step):
        stripe = clear_hidden(pixels[top : top + step]) if clear and channels == 4 else pixels[top : top + step]
        rows = np.ascontiguousarray(stripe).reshape(len(stripe), row_bytes)
        filtered = np.empty((len(rows), 1 + row_bytes), np.uint8)
        filtered[:, 0] = _UP
        np.subtract(rows[:1], above, out=filtered[:1, 1:])
        np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
        above = rows[-1:]
        packed = deflate.compress(filtered)
        if packed:
            out.append(_chunk(b"IDAT", packed))
    out += [_chunk(b"IDAT", deflate.flush()), _chunk(b"IEND", b"")]
    return b"".join(out)
