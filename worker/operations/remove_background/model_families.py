"""rembg's model families: what each wants to see, and what its output means. Equal to rembg to the last bit.

rembg's own arithmetic (rembg/sessions, version 2.0.86) is in double precision from pictures of 8 bits, so a table of 256 levels
per channel gives the same numbers. Pillow's LANCZOS is kept for the same reason: on a picture of 1600 pixels OpenCV's
area averaging takes 3 ms instead of 15, but what it gives is 0.7 to 3.0 of 255 off, and a network may make much of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagemill.shared.errors import OperationFailed
from imagemill.worker.imaging.picture import Grey, Pixels, flatten
from imagemill.worker.operations.remove_background.matte import Map

WHOLE = 16_000_000  # pixels; for each of what it scales Pillow holds four bytes
STRIP = 256  # rows of a larger picture
FLAT = 1e-6  # a range of values below this is no subject and its background, but noise
HIDDEN = 128  # level of grey that a model sees where a picture is transparent


@dataclass(frozen=True)
class Family:
    """A way of making input and reading output, `size` pixels wide and high. `logits` come before a sigmoid."""

    size: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    logits: bool = False

    def tensor(self, rgb: Pixels, *, as_rembg: bool = False) -> NDArray[np.float32]:
        """The model's input float32 [3, size, size] from RGB or RGBA uint8 [h, w, 3 or 4].

        What is transparent is laid over grey, or, `as_rembg` does it, shown with the colours that alpha hides.
        """
        small = scaled(rgb, self.size, as_rembg=as_rembg)
        levels = np.arange(256) / max(float(small.max()), 1e-6)  # by the brightest value, whatever that is
        made = np.empty((3, self.size, self.size), np.float32)
        for channel, (mean, deviation) in enumerate(zip(self.mean, self.deviation, strict=True)):
            np.take(((levels - mean) / deviation).astype(np.float32), small[..., channel], out=made[channel])
        return made

    def matte(self, output: NDArray[np.float32]) -> Map:
        """The matte float32 [size, size], 0 to 1, from an image's raw output [1, size, size] or [size, size].

        Stretched so that it takes up the whole range; all 0 where the output is flat. Raises OperationFailed where
        it holds what is no number.
        """
        found: Map = output.reshape(output.shape[-2:]).astype(np.float32, copy=False)
        if self.logits:
            with np.errstate(over="ignore"):  # exp(-x) is infinite, the sigmoid 0
                found = np.asarray(1 / (1 + np.exp(-found)), np.float32)
        low, high = found.min(), found.max()
        if not np.isfinite(high - low):
            raise OperationFailed("the model's output is not finite")
        if high - low < FLAT:
            return np.zeros_like(found)
        return np.asarray((found - low) / (high - low), np.float32)


def scaled(pixels: Pixels, size: int, *, as_rembg: bool = False) -> Pixels:
    """RGB uint8 [size, size, 3] from RGB or RGBA uint8 [h, w, 3 or 4], as Pillow's LANCZOS scales.

    Transparent pixels are laid over grey, or, `as_rembg`, alpha is dropped. Enormous pictures go through in strips,
    first across and then down, so that little memory is needed; Pillow may do it the other way round, and round otherwise.
    """
    if as_rembg or pixels.shape[0] * pixels.shape[1] <= WHOLE:
        return _by_pillow(_opaque(pixels, as_rembg), size, size)
    across = np.empty((len(pixels), size, 3), np.uint8)
    for top in range(0, len(pixels), STRIP):
        strip = pixels[top : top + STRIP]
        across[top : top + STRIP] = _by_pillow(_opaque(strip, as_rembg), size, len(strip))
    return _by_pillow(across, size, size)


def _by_pillow(rgb: Pixels, width: int, height: int) -> Pixels:
    return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.LANCZOS))


def _opaque(pixels: Pixels, as_rembg: bool) -> Pixels:
    """RGB from RGB or RGBA."""
    return np.ascontiguousarray(pixels[..., :3]) if as_rembg else flatten(pixels, HIDDEN)


def in_bytes(matte: Map) -> Grey:
    """A matte 0..1 as uint8, cut off and not rounded, as rembg does it."""
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
"""By the model's name."""
