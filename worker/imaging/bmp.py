"""BMP: what Pillow doesn't read or misreads.

Format: https://learn.microsoft.com/windows/win32/api/wingdi/ns-wingdi-bitmapv5header
"""

from __future__ import annotations

import struct

from PIL import ImagePalette
from PIL.ImageFile import ImageFile

_START, _V5 = 14, 124
_EMBEDDED = b"DEBM"  # "MBED", little-endian


def profile(data: bytes) -> bytes | None:
    """The embedded profile; None if there is none."""
    (length,) = struct.unpack_from("<I", data, _START)
    if length != _V5 or data[_START + 56 : _START + 60] != _EMBEDDED:
        return None
    at, size = struct.unpack_from("<II", data, _START + 112)
    return data[_START + at : _START + at + size] if _START + at + size <= len(data) else None


def corrected(data: bytes, image: ImageFile) -> None:
    """Make Pillow read the bits that a pixel really has: it takes two colours, black and white, for one bit per pixel."""
    (bits,) = struct.unpack_from("<H", data, _START + (10 if data[_START] == 12 else 14))
    if image.mode not in ("1", "L") or bits == {"1": 1, "L": 8}[image.mode] or not image.tile:
        return
    levels = (0, 255) if image.mode == "1" else range(2**bits)
    image._mode, image.palette = "P", ImagePalette.raw("RGB", bytes(level for level in levels for _ in range(3)))
    layout = {1: "P;1", 4: "P;4", 8: "P"}[bits]
    image.tile = [
        tile._replace(args=(layout, *(tile.args or ())[1:])) if tile.codec_name == "raw" else tile for tile in image.tile
    ]
