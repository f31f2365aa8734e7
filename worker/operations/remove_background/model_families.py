"""rembg's model families: how each one's input is prepared and its output read, bit for bit as in rembg.

rembg (rembg/sessions, version 2.0.86) calculates in double precision from 8-bit images, so a lookup table of 256 levels
per channel gives the same numbers, and Pillow's LANCZOS is kept. It takes 22 ms for an image of 1600 pixels, so unless rembg's
very pixels are asked for, larger images are halved first, which takes 7 ms in all. With ISNet's real weights at 320 pixels,
this changed mattes of twelve photos by 0.1 to 1.1 of 255, and those of four 12-megapixel photos by 0.02 to 0.2 in
relation to rembg's. Averaging areas of any size (6 ms) changed them five times as much. Random weights, as used in tests,
tell nothing here: they turn a difference of 0.3 in the input into one of 10 in the matte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagemill.shared.errors import OperationFailed
from imagemill.worker.imaging.picture import Grey, Pixels, flatten
from imagemill.worker.imaging.scale import reduced
from imagemill.worker.operations.remove_background.matte import Map

WHOLE = 16_000_000  # most pixels scaled in one piece; Pillow takes four bytes for each
STRIP = 256  # rows per strip of a larger image
LEFT = 1.25  # an image is halved while its shorter side keeps so many times the model's
FLAT = 1e-6  # an output with a smaller range than this is noise: there is no subject
HIDDEN = 128  # grey level that the model sees in place of transparent pixels


@dataclass(frozen=True)
class Family:
    """How input is normalised and output read. `size` is the side of both in pixels; `logits` still need a sigmoid."""

    size: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    logits: bool = False

    def tensor(self, rgb: Pixels, *, as_rembg: bool = False) -> NDArray[np.float32]:
        """The model's input float32 [3, size, size] from RGB or RGBA uint8 [h, w, 3 or 4].

        Transparent pixels are composited over grey. With `as_rembg`, alpha is ignored, as rembg does.
        """
        small = scaled(rgb, self.size, as_rembg=as_rembg)
        levels = np.arange(256) / max(float(small.max()), 1e-6)  # relative to the brightest value, as in rembg
        tensor = np.empty((3, self.size, self.size), np.float32)
        for plane, out, mean, deviation in zip(cv2.split(small), tensor, self.mean, self.deviation, strict=True):
            cv2.LUT(plane, ((levels - mean) / deviation).astype(np.float32), dst=out)
        return tensor

    def matte(self, output: NDArray[np.float32]) -> Map:
        """The matte float32 [size, size], 0 to 1, from an image's raw output [1, size, size] or [size, size].

        Stretched to the full range; all 0 if the output is flat. Raises OperationFailed if a value is not finite.
        """
        values: Map = output.reshape(output.shape[-2:]).astype(np.float32, copy=False)
        if self.logits:
            with np.errstate(over="ignore"):  # where exp(-x) is infinite, the sigmoid is 0
                values = np.asarray(1 / (1 + np.exp(-values)), np.float32)
        low, high = values.min(), values.max()
        if not np.isfinite(high - low):
            raise OperationFailed("the model's output is not finite")
        if high - low < FLAT:
            return np.zeros_like(values)
        return np.asarray((values - low) / (high - low), np.float32)


def scaled(pixels: Pixels, size: int, *, as_rembg: bool = False) -> Pixels:
    """RGB uint8 [size, size, 3] from RGB or RGBA uint8 [h, w, 3 or 4], halved while it is large enough, then by LANCZOS.

    Transparent pixels are composited over grey. With `as_rembg`, alpha is dropped and nothing is halved. What is still very
    large then is scaled in strips, first horizontally and then vertically, to save memory; Pillow may use the other order
    and so round differently.
    """
    height, width = pixels.shape[:2]
    if as_rembg:
        return _by_pillow(np.ascontiguousarray(pixels[..., :3]), size, size)
    halvings = int(math.log2(max(1, min(height, width) / (LEFT * size))))
    if halvings:
        pixels = reduced(pixels, halvings, partial(flatten, background=HIDDEN))
    # The last row or column of an odd number is twice as large as what it shows.
    right, bottom = width / 2**halvings, height / 2**halvings
    if pixels.shape[0] * pixels.shape[1] <= WHOLE:
        return _by_pillow(flatten(pixels, HIDDEN), size, size, (right, bottom))
    across = np.empty((len(pixels), size, 3), np.uint8)
    for top in range(0, len(pixels), STRIP):
        strip = flatten(pixels[top : top + STRIP], HIDDEN)
        across[top : top + STRIP] = _by_pillow(strip, size, len(strip), (right, len(strip)))
    return _by_pillow(across, size, size, (size, bottom))


def _by_pillow(rgb: Pixels, width: int, height: int, corner: tuple[float, float] | None = None) -> Pixels:
    """All of `rgb`, or its part above and to the left of `corner`, scaled to `width` and `height`."""
    box = None if corner is None else (0, 0, *corner)
    return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.LANCZOS, box))


def in_bytes(matte: Map) -> Grey:
    """A matte 0..1 as uint8, truncated instead of rounded, as in rembg."""
    return (matte * 255).astype(np.uint8)


_IMAGENET = (0.485, 0.456, 0.406)
_U2NET = Family(320, _IMAGENET, (0.229, 0.224, 0.225))
_BIREFNET = Family(1024, _IMAGENET, (0.229, 0.224, 0.225), logits=True)

FAMILIES: dict[str, Family] = {
    "u2net": _U2NET,
    "u2netp": _U2NET,
    "u2net_human_seg": _U2NET,
    "silueta": _U2NET,
    "isnet-general-use": Family(1024, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)),
    "isnet-anime": Family(1024, _IMAGENET, (1.0, 1.0, 1.0)),
    "birefnet-general": _BIREFNET,
    "birefnet-general-lite": _BIREFNET,
}
"""The family of each model, by name."""
