"""What the header of an image file states, as the reader of each format finds it, and the notes that reading may leave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imagemill.shared.errors import TooManyPixels, Truncated

NO_END, JUNK, REDUCED, FULL_PAGE, INVERTED = (
    "no_end_marker", "junk_skipped", "reduced_to_8_bits", "thumbnail_skipped", "cmyk_inverted",
)  # fmt: skip
FILE_NOTES = frozenset({NO_END, JUNK, REDUCED, FULL_PAGE, INVERTED})
"""Notes on the source file. Equal files get equal notes, so they never keep a result from being reused."""


@dataclass(frozen=True)
class Facts:
    """Of one file: `size` is (width, height) as stored.

    `icc` is the embedded profile, or an equivalent one if the file states its colours in another way (see
    imagemill.worker.imaging.colour). `orientation` is None where EXIF or XMP decide. `lossless` matters in formats that may
    be either.
    """

    size: tuple[int, int]
    exif: bytes | None = None
    xmp: bytes | None = None
    icc: bytes | None = None
    orientation: int | None = None
    notes: tuple[str, ...] = ()
    lossless: bool = False


@dataclass(frozen=True)
class Samples:
    """Decoded uint8 pixels as stored in the file: L [h, w], or RGB, RGBA or CMYK [h, w, c] (255 is full ink).

    `icc` is their profile where only the decoder knows it.
    """

    pixels: NDArray[np.uint8]
    mode: str
    notes: tuple[str, ...] = ()
    icc: bytes | None = None


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Raise Truncated if a side is zero, TooManyPixels if width times height exceeds `max_pixels`."""
    width, height = size
    if width < 1 or height < 1:
        raise Truncated(f"the image has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise TooManyPixels(f"the image has {width:,} x {height:,} pixels, more than the limit of {max_pixels:,}")
