"""Convert pixels from any colour profile to sRGB with LittleCMS."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from imagemill.worker.imaging.picture import Pixels, array_of

_SPACES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
_SAME = 2  # levels of 255 by which two encodings of sRGB may differ; the difference is invisible


def space(icc: bytes | None) -> str | None:
    """Colour space of a profile: RGB, L or CMYK; None for any other space and without a profile."""
    return _SPACES.get(icc[16:20]) if icc else None


def to_srgb(pixels: NDArray[np.uint8], mode: str, icc: bytes | None) -> Pixels:
    """Convert uint8 `pixels` of mode L [h, w], RGB, RGBA or CMYK [h, w, c] (255 is full ink) to sRGB, as RGB or RGBA.

    A profile that is broken or has the wrong colour space is ignored and the pixels are treated as sRGB.
    """
    described = space(icc)
    if icc is None or described is None or (described == "CMYK") != (mode == "CMYK"):
        return as_rgb(pixels, mode)
    transform = _transform(icc, described) if described != "L" or _is_grey(pixels) else None
    if transform is None:
        return as_rgb(pixels, mode)
    if described == "L":
        samples = pixels if mode == "L" else pixels[:, :, 0]
    else:
        samples = pixels if mode == "CMYK" else as_rgb(pixels, mode)[:, :, :3]
    image = ImageCms.applyTransform(_image(samples, described), transform)
    converted = array_of(cast(Image.Image, image))  # None only if it is applied in place
    return np.dstack([converted, pixels[:, :, 3]]) if mode == "RGBA" else converted


def as_rgb(pixels: NDArray[np.uint8], mode: str) -> Pixels:
    """Convert `pixels` of mode L, RGB, RGBA or CMYK to RGB or RGBA without colour management."""
    if mode == "L":
        return np.repeat(pixels[:, :, None], 3, axis=2)
    if mode == "CMYK":
        return array_of(_image(pixels, "CMYK").convert("RGB"))
    return pixels


def _is_grey(pixels: NDArray[np.uint8]) -> bool:
    return pixels.ndim == 2 or bool((pixels[:, :, 0] == pixels[:, :, 1]).all() and (pixels[:, :, 1] == pixels[:, :, 2]).all())


def _image(pixels: NDArray[np.uint8], mode: str) -> Image.Image:
    return Image.frombuffer(mode, (pixels.shape[1], pixels.shape[0]), np.ascontiguousarray(pixels), "raw", mode, 0, 1)


@lru_cache(maxsize=16)
def _transform(icc: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB; None if it would change nothing or the profile is broken.

    Relative colorimetric with black point compensation, as in image editors. Cached because a job's photos share a few
    profiles; LittleCMS lets threads share a transform.
    """
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(icc)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None  # a broken profile must not fail the image


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether the profile is sRGB, tested on a grid of colours because sRGB profiles go by dozens of names."""
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    grid = steps[None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    got = np.array(ImageCms.applyTransform(_image(grid, mode), transform))
    return bool(np.abs(got.astype(np.int16) - as_rgb(grid, mode)).max() <= _SAME)
