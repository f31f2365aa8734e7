"""The decoded image that every stage passes on, and the arrays it consists of."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagemill.worker.imaging.metadata.metadata import NOTHING, Metadata

Pixels = NDArray[np.uint8]
"""uint8, [height, width, 3] RGB or [height, width, 4] RGBA with straight alpha, C-contiguous."""

Grey = NDArray[np.uint8]
"""uint8, [height, width]."""

_STRIP = 1 << 20  # pixels flattened at once; the 16-bit intermediates of a strip take about 20 MB


@dataclass(frozen=True)
class Picture:
    """A decoded image.

    `format` is the source file's format and `icc` the profile of the pixels (None means sRGB). `full_size` is the source's
    upright (width, height), larger than `pixels` if the decoder was asked for a smaller picture. `as_stored` is true if the
    file shows exactly these pixels: a single frame, not rotated, scaled or colour-converted. `grey` is true if the source
    has no colour; an operation may still have added some. `notes` are on the source file (see facts.FILE_NOTES). `lossless` is
    true if the file is a WebP or JPEG XL that stores pixels without loss. `metadata` is what the result gets of the source's.
    """

    pixels: Pixels
    format: str = "png"
    icc: bytes | None = None
    full_size: tuple[int, int] = (0, 0)
    as_stored: bool = False
    grey: bool = False
    notes: tuple[str, ...] = ()
    lossless: bool = False
    metadata: Metadata = field(default=NOTHING, metadata={"stays": True})  # doesn't pass through the wall

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of `pixels`."""
        return self.pixels.shape[1], self.pixels.shape[0]


def array_of(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels of a Pillow image, [h, w] or [h, w, c], copied in strips: `np.array` would need three times the memory."""
    width, height = image.size
    rows = max(1, _STRIP // max(1, width))
    if height <= rows:
        return np.array(image)
    first = np.asarray(image.crop((0, 0, width, 1)))
    result = np.empty((height, *first.shape[1:]), first.dtype)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        result[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return result


def flatten(pixels: Pixels, background: int) -> Pixels:
    """RGB from RGBA, composited over grey level `background` (0 to 255), rounded to nearest.

    Pixels without alpha are returned unchanged. Large pictures are processed in strips to keep memory low.
    """
    if pixels.shape[2] != 4:
        return pixels
    result = np.empty((*pixels.shape[:2], 3), np.uint8)
    rows = max(1, _STRIP // max(1, pixels.shape[1]))
    for top in range(0, len(pixels), rows):
        strip = pixels[top : top + rows]
        alpha = strip[:, :, 3:].astype(np.uint16)
        mixed = strip[:, :, :3] * alpha  # at most 255 * 255, so 16 bits are enough
        mixed += background * (255 - alpha) + 127
        mixed //= 255
        result[top : top + rows] = mixed
    return result


def rgb_of(colour: str) -> tuple[int, int, int]:
    """(red, green, blue) of a colour written as `#rrggbb`."""
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue
