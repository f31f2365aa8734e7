"""Open files with Pillow, by format and without its own limits."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import AvifImagePlugin, BmpImagePlugin, GifImagePlugin, Image, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from imagemill.shared.errors import Truncated

# Naming Pillow's classes keeps its other decoders (EPS, PDF, FITS, ...) unreachable.
OPENERS: dict[str, Callable[[io.BytesIO], ImageFile]] = {
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "avif": AvifImagePlugin.AvifImageFile,
}


def open_checked(data: bytes, kind: str, size: tuple[int, int] | None = None) -> ImageFile:
    """Open `data` with Pillow without decoding pixels. Raises Truncated if Pillow finds another size than `size`."""
    # Pillow's own limit is global and only warns below twice its value. Ours is per call, and checked before pixels are
    # decoded. Every thread sets the same value, so they can't interfere.
    Image.MAX_IMAGE_PIXELS = None
    image = OPENERS[kind](io.BytesIO(data))
    if size is not None and image.size != size:
        raise Truncated(f"the file has conflicting sizes: {size[0]} x {size[1]} and {image.width} x {image.height} pixels")
    return image
