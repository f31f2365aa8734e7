"""rembg's model families: how each one's input is prepared and its output read, bit for bit as in rembg if asked for.

rembg (rembg/sessions, version 2.0.86) calculates in double precision from 8-bit images, so a lookup table of 256 levels per
channel gives the same numbers. Pillow's LANCZOS takes 22 ms for an image of 1600 pixels. So unless rembg's exact pixels are
asked for, large images are first halved and then filtered by OpenCV, in 6 ms. With ISNet's real weights, at 320 pixels, that
added 0.02 to 0.2 of 255 to the difference of four 12-megapixel photos' mattes to rembg's (before, 0.02 to 0.5); averaging
areas instead adds 0.1 to 1.6. Random weights can't tell: with them, even the scaling done while decoding changes mattes by
10.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from imagemill.shared.errors import ConfigurationError, ModelUnavailable, OperationFailed
from imagemill.shared.options.base import validation_sentence
from imagemill.worker.imaging.picture import Grey, Pixels, flatten
from imagemill.worker.imaging.scale import reduced
from imagemill.worker.models import added
from imagemill.worker.operations.open_model import missing_model
from imagemill.worker.operations.remove_background.matte import Map

WHOLE = 16_000_000  # most pixels scaled in one piece; Pillow takes four bytes for each
STRIP = 256  # rows per strip of a larger image
LONG = 2.5  # largest aspect ratio of an image that is halved
SHARPER = np.array([-1, 26, -1]) / 24  # undoes an average over one pixel, to the second order
LEFT = 1.25  # an image is halved as long as its shorter side stays this many times the model's
FLAT = 1e-6  # an output with a smaller range than this is noise: there is no subject
HIDDEN = 128  # grey level that the model sees in place of transparent pixels


@dataclass(frozen=True)
class Family:
    """How input is normalised and output read. `size` is the side of both in pixels; `logits` still need a sigmoid.

    `output` is the name of the output with the matte; None stands for the first.
    """

    size: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    logits: bool = False
    output: str | None = None

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
    """RGB uint8 [size, size, 3] from RGB or RGBA uint8 [h, w, 3 or 4], scaled by Pillow's LANCZOS, or nearly so if large.

    Transparent pixels are composited over grey; with `as_rembg`, alpha is dropped and the result is Pillow's. Very large
    panoramas are scaled in strips, first horizontally and then vertically, to save memory; Pillow may use the other order
    and so round differently.
    """
    height, width = pixels.shape[:2]
    halvings = 0 if as_rembg else _halvings(width, height, size)
    if halvings:
        small = reduced(pixels, halvings, partial(flatten, background=HIDDEN))
        return _filtered(small, size, width / 2**halvings, height / 2**halvings)
    if as_rembg or height * width <= WHOLE:
        return _by_pillow(_opaque(pixels, as_rembg), size, size)
    across = np.empty((len(pixels), size, 3), np.uint8)
    for top in range(0, len(pixels), STRIP):
        strip = pixels[top : top + STRIP]
        across[top : top + STRIP] = _by_pillow(_opaque(strip, as_rembg), size, len(strip))
    return _by_pillow(across, size, size)


def _halvings(width: int, height: int, size: int) -> int:
    """How many times to halve an image first: none if it is so long that `_filtered` would take longer than Pillow."""
    short, long = sorted((width, height))
    return int(math.log2(max(1, short / (LEFT * size)))) if long <= LONG * short else 0


def _filtered(pixels: Pixels, size: int, width: float, height: float) -> Pixels:
    """The upper left `width` and `height` of a halved image, smoothed with Lanczos' kernel and then sampled at `size`."""
    across, down = width / size, height / size
    smooth = cv2.sepFilter2D(pixels, -1, _lanczos(across), _lanczos(down), borderType=cv2.BORDER_REPLICATE)
    places = np.array([[across, 0, (across - 1) / 2], [0, down, (down - 1) / 2]])  # pixel centres map to pixel centres
    how = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(smooth, places, (size, size), flags=how, borderMode=cv2.BORDER_REPLICATE), np.uint8)


def _lanczos(scale: float) -> Map:
    """Lanczos' kernel with three lobes for a reduction by `scale`, which also restores the detail that halving weakened."""
    reach = math.ceil(3 * scale)
    at = np.arange(-reach, reach + 1) / scale
    kernel = np.where(np.abs(at) < 3, np.sinc(at) * np.sinc(at / 3), 0)
    return np.asarray(np.convolve(kernel / kernel.sum(), SHARPER), np.float32)


def _by_pillow(rgb: Pixels, width: int, height: int) -> Pixels:
    return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.LANCZOS))


def _opaque(pixels: Pixels, as_rembg: bool) -> Pixels:
    """RGB from RGB or RGBA."""
    return np.ascontiguousarray(pixels[..., :3]) if as_rembg else flatten(pixels, HIDDEN)


def in_bytes(matte: Map) -> Grey:
    """A matte 0..1 as uint8, truncated instead of rounded, as in rembg."""
    return (matte * 255).astype(np.uint8)


_IMAGENET = (0.485, 0.456, 0.406)
_U2NET = Family(320, _IMAGENET, (0.229, 0.224, 0.225))
_BIREFNET = Family(1024, _IMAGENET, (0.229, 0.224, 0.225), logits=True)
_VARIANTS = ("general", "general-lite", "portrait", "dis", "hrsod", "cod", "massive")

FAMILIES: dict[str, Family] = {
    "u2net": _U2NET,
    "u2netp": _U2NET,
    "u2net_human_seg": _U2NET,
    "silueta": _U2NET,
    "isnet-general-use": Family(1024, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)),
    "isnet-anime": Family(1024, _IMAGENET, (1.0, 1.0, 1.0)),
    **{f"birefnet-{variant}": _BIREFNET for variant in _VARIANTS},
    "bria-rmbg": Family(1024, _IMAGENET, (0.229, 0.224, 0.225)),
    "ben2": Family(1024, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # as its publisher does; rembg's ben_custom subtracts 0.5
}
"""The family of each model in the catalogue, by name."""


def family_of(weights: Path, model: str) -> Family:
    """The family of a model in the catalogue, or of one that the operator has added. Raises ModelUnavailable."""
    if model in FAMILIES:
        return FAMILIES[model]
    try:
        record = added.find(weights, model)
        if record is None or record.kind != "matting":
            raise missing_model(model, weights)
        return TypeAdapter(Family).validate_python(record.parameters)
    except ConfigurationError as error:
        raise ModelUnavailable(error.message) from error
    except ValidationError as error:
        raise ModelUnavailable(f"the record of {model} is damaged: {validation_sentence(error)}") from error
