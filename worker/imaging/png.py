"""PNG: chunk parsing and checking, and a fast encoder (up filter in numpy, deflate by ISA-L).

What the chunks say about colour and orientation is read in imagemill.worker.imaging.png_reading.

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

MAX_PROFILES = 4
"""Valid files have one; each is inflated again."""

_UP = 2
_STRIPE = 2**20  # bytes filtered and deflated at once: small enough for the CPU cache, and memory stays constant
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, end) of each chunk's payload up to IEND, or to the end of a file that lost its end marker.

    In such a file, nothing is missing before the checksum of the last IDAT chunk; whether it has all pixels, the decoder finds
    out. Raises Truncated if a chunk is missing or cut short.
    """
    position, pixels = len(SIGNATURE), False
    for _ in range(MAX_CHUNKS):
        length, kind = struct.unpack_from(">I4s", data, position) if position + 8 <= len(data) else (0, b"")
        start, end = position + 8, position + 8 + length
        cut = end + 4 > len(data)
        if cut and pixels and kind != b"IDAT":
            return
        if not kind:
            raise Truncated("the PNG file ends early")
        if cut and (kind != b"IDAT" or end > len(data)):
            raise Truncated(f"the PNG file ends inside its {kind.decode('latin-1')!r} chunk")
        if (kind == b"IHDR") != (position == len(SIGNATURE)) or (kind == b"IHDR" and length != 13):
            raise Truncated("the PNG file does not start with a valid header")
        yield kind, start, end
        if cut or kind == b"IEND":
            return
        pixels = pixels or kind == b"IDAT"
        position = end + 4
    raise NotAnImage(f"the PNG file has more than {MAX_CHUNKS:,} chunks")


def checked(data: bytes) -> tuple[bytes, bytes | None]:
    """The file reduced to its pixel chunks, with all checksums verified, and the colour key of a picture without palette.

    Without the other chunks (text, profiles, further frames), their contents can't fail the decoder. The key (tRNS) is
    returned for `colour_key` because decoders compare it at the wrong depth. A lost end marker is added. Raises Truncated.
    """
    view = memoryview(data)
    kept: list[bytes | memoryview] = [SIGNATURE]
    key, palette, kind = None, False, b""
    for kind, start, end in chunks(data):
        if kind not in _PIXEL_CHUNKS:
            continue
        if end + 4 > len(data):
            kept.append(chunk(kind, data[start:end]))
            continue
        if isal_zlib.crc32(view[start - 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise Truncated(f"the PNG file is damaged: wrong checksum in its {kind.decode()} chunk")
        if kind == b"IHDR":
            palette = data[start + 9] == 3
        if kind == b"tRNS" and not palette:
            key = data[start:end]
        else:
            kept.append(view[start - 8 : end + 4])
    if kind != b"IEND":
        kept.append(chunk(b"IEND", b""))
    return b"".join(kept), key


def colour_key(pixels: NDArray[np.uint8 | np.uint16], key: bytes, depth: int) -> NDArray[np.uint8]:
    """Alpha, uint8 [h, w]: 0 where `pixels` (L [h, w] or RGB [h, w, 3]) equal the colour in `key`, otherwise 255.

    `key` has 16 bits per channel at the file's bit `depth`; at 16 bits, `pixels` are the file's own uint16. Raises Truncated.
    """
    channels = 1 if pixels.ndim == 2 else 3
    if len(key) < 2 * channels:
        raise Truncated("the PNG file's tRNS chunk is cut short")
    wanted: NDArray[np.int64] = np.frombuffer(key, ">u2", channels).astype(np.int64)
    if depth < 16:
        wanted = (wanted & (2**depth - 1)) * 255 // (2**depth - 1)
    same = pixels == wanted if channels == 3 else (pixels == wanted[0])[:, :, None]
    return np.where(same.all(axis=2), np.uint8(0), np.uint8(255))


def chunk(kind: bytes, payload: bytes) -> bytes:
    """A chunk with its length and checksum."""
    crc = isal_zlib.crc32(payload, isal_zlib.crc32(kind))
    return struct.pack(">I4s", len(payload), kind) + payload + struct.pack(">I", crc)


def clear_hidden(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGBA pixels [h, w, 4] with all four channels 0 where alpha is 0: invisible colour only costs bytes."""
    words = np.ascontiguousarray(pixels).view("<u4")
    cleared: NDArray[np.uint8] = (words * (words > 0x00FFFFFF)).view(np.uint8)
    return cleared


def encode(pixels: NDArray[np.uint8], icc: bytes | None = None, *, clear: bool = True) -> bytes:
    """Encode uint8 `pixels` (grey [h, w, 1], RGB [h, w, 3] or RGBA [h, w, 4]); `clear` removes colour under alpha 0.

    Each row is stored as its difference from the row above: one subtraction per byte, whereas choosing the best filter for
    each row takes most of an encoder's time.
    """
    height, width, channels = pixels.shape
    row_bytes = width * channels
    step = max(1, _STRIPE // row_bytes)
    deflate = isal_zlib.compressobj(2)  # as fast as level 1 on filtered photos, 1 % fewer bytes
    out = [
        SIGNATURE,
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)),
    ]
    if icc is not None:
        out.append(chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)))
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
            out.append(chunk(b"IDAT", packed))
    out += [chunk(b"IDAT", deflate.flush()), chunk(b"IEND", b"")]
    return b"".join(out)
