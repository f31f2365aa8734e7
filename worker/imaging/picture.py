"""A decoded image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""uint8, [height, width, 3] RGB or [height, width, 4] RGBA with straight alpha, C-contiguous."""

Grey = NDArray[np.uint8]
"""uint8, [height, width]."""


@dataclass(frozen=True)
class Picture:
    """A decoded image. `icc` is the profile its pixels are in (None is sRGB), `format` what it came as.

    `full_size` is the (width, height) that the source has, upright; larger than `pixels` where the
    decoder was told that a smaller picture is enough. `as_stored` says that the file shows just this:
    it was neither turned nor scaled nor were its colours converted, and it has no further frames. `grey`
    says that the file has no colours; what is made of it may have some.
    """

    pixels: Pixels
    format: str = "png"
    icc: bytes | None = None
    full_size: tuple[int, int] = (0, 0)
    as_stored: bool = False
    grey: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of `pixels`."""
        return self.pixels.shape[1], self.pixels.shape[0]
