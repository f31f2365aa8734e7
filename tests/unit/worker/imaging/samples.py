"""Image files and helpers shared by the tests of imaging."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from imagemill.worker.imaging import codec, png
from imagemill.worker.imaging.picture import Picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)
"""sRGB with red and green swapped."""


def scene(width: int = 64, height: int = 48, channels: int = 3) -> np.ndarray:
    """Smooth colours with one dark corner; alpha, if any, rises from 0 at the left to 255."""
    y, x = np.mgrid[:height, :width]
    pixels = np.dstack([x * 200 / width + 30, y * 200 / height + 30, (x + y) * 200 / (width + height)])
    pixels[: height // 4, : width // 4] /= 4
    return np.dstack([pixels, x * 255 // max(1, width - 1)][: channels - 2]).astype(np.uint8)


def save(kind: str, image: Image.Image | np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def picture(data: bytes, **options: Any) -> Picture:
    return codec.decode(data, codec.probe(data, max_pixels=1_000_000), **options)


def pixels(data: bytes, **options: Any) -> np.ndarray:
    found = picture(data, **options).pixels
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    return found


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b).mean())


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


LOSSLESS: dict[str, dict[str, Any]] = {
    "png": {},
    "bmp": {},
    "tiff": {},
    "webp": {"lossless": True, "exact": True},
    "avif": {"quality": 100, "subsampling": "4:4:4"},  # nearly lossless
}
FRAMES = {"save_all": True, "append_images": [Image.fromarray(255 - scene())]}


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def png_by_hand(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes, interlaced: bool = False) -> bytes:
    """A PNG of unfiltered `rows`, with `more` chunks before its pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    return b"".join([png.SIGNATURE, header, *more, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")])
