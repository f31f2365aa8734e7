"""Bytes to pixels and back: `probe` the header, `decode` to upright sRGB, `encode` fast.

Figures behind the choices are in bench/codec.py. Every error is an ImageError with a sentence.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagemill.shared.errors import NotAnImage, OperationFailed, OutOfMemory, sentence
from imagemill.worker.imaging import icc as profiles
from imagemill.worker.imaging import jpeg, png
from imagemill.worker.imaging.headers import Header, open_checked, probe, translated
from imagemill.worker.imaging.picture import Grey, Picture, Pixels, flatten
from imagemill.worker.imaging.scale import fit, resize, upright

__all__ = ["Encoded", "Header", "choose_format", "decode", "decode_mask", "encode", "fit", "probe", "resize"]

_WEBP_METHOD = 2  # of 0..6: half the time of 4 for a few per cent more bytes; 0 and 1 need 1.2 to 2 times the bytes
_WEBP_SIDE, _JPEG_SIDE = 16_383, 65_500
_STRIP = 256  # rows
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
"""Of the formats that are written."""


@dataclass(frozen=True)
class Encoded:
    """A finished file."""

    data: bytes
    format: str

    @property
    def content_type(self) -> str:
        """The MIME type."""
        return f"image/{self.format}"


@contextmanager
def _memory_checked() -> Iterator[None]:
    """OpenCV's and numpy's complaint that memory is short, as OutOfMemory."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory("the picture does not fit into memory") from error
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise OutOfMemory("the picture does not fit into memory") from error
        raise OperationFailed(f"the picture can't be scaled or turned ({sentence(error)})") from error


def decode(data: bytes, header: Header, *, edge: int | None = None, icc: Literal["srgb", "keep"] = "srgb") -> Picture:
    """The picture that `probe` found in `data`, upright, as uint8 RGB, or RGBA where it can be transparent.

    `edge` is the longest edge in pixels that the caller makes use of: a larger picture is scaled
    down to exactly fit it (`full_size` tells the source's), never up. With `icc="keep"` the pixels
    stay in their RGB profile, which `Picture.icc` then holds; grey and CMYK have no such profile
    and are converted in any case. Of animations the first frame is taken.

    Raises Truncated (also for damage), NotAnImage for what the format allows and we don't read,
    and OutOfMemory.
    """
    target = fit(header.stored_size, edge)
    with translated(header.format):
        if header.format == "jpeg":
            pixels, mode = jpeg.decode(data, header.stored_size, target)
        else:
            pixels, mode = _by_pillow(data, header)
    with _memory_checked():
        if mode != "CMYK":  # its black is no alpha, which `resize` would weigh by
            pixels = np.ascontiguousarray(resize(pixels, target))
        kept = header.icc if icc == "keep" and profiles.space(header.icc) == "RGB" and mode != "CMYK" else None
        colours = profiles.as_rgb(pixels, mode) if kept else profiles.to_srgb(pixels, mode, header.icc)
        grey = mode == "L" and header.icc is None
        same = grey or colours is pixels
        as_stored = same and header.orientation == 1 and target == header.stored_size and _one_frame(data, header.format)
        colours = np.ascontiguousarray(upright(resize(colours, target), header.orientation))
        return Picture(colours, format=header.format, icc=kept, full_size=header.size, as_stored=as_stored, grey=grey)


def _one_frame(data: bytes, format: str) -> bool:  # noqa: A002
    """Whether a file of a format that we write too is no animation."""
    if format == "png":
        return all(kind != b"acTL" for kind, _, _ in png.chunks(data))
    return format == "jpeg" or (format == "webp" and (data[12:16] != b"VP8X" or not data[20] & 2))


def _by_pillow(data: bytes, header: Header) -> tuple[NDArray[np.uint8], str]:
    """Pixels and mode: L [h, w], or RGB, RGBA or CMYK [h, w, c]."""
    key = None
    if header.format == "png":
        depth = data[24]  # of the first chunk, which `probe` has found to be the header
        data, key = png.checked(data)
    image = open_checked(data, header.format, header.stored_size)
    image.load()
    pixels, mode = _samples(image)
    if key is not None:
        alpha = png.colour_key(np.array(image) if image.mode == "I;16" else pixels, key, depth)
        return np.dstack([profiles.as_rgb(pixels, mode), alpha]), "RGBA"
    return pixels, mode


def _samples(image: Image.Image) -> tuple[NDArray[np.uint8], str]:
    """A Pillow image as L, RGB, RGBA or CMYK; the upper byte of 16 bits."""
    if image.mode.startswith("I;16"):
        return (np.array(image) >> 8).astype(np.uint8), "L"
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise NotAnImage(f"pixels of kind {image.mode!r} (32 bits, or Lab) are not supported")
    if image.has_transparency_data:
        mode = "RGBA"
    elif image.mode in ("1", "L"):
        mode = "L"
    else:
        mode = "CMYK" if image.mode == "CMYK" else "RGB"
    return np.array(image if image.mode == mode else image.convert(mode)), mode


def decode_mask(data: bytes, *, max_pixels: int) -> Grey:
    """A mask from an image file of any format: uint8 [height, width], upright, its values as they are.

    Where the file is transparent in places, alpha is the mask if all that is visible has one
    colour; else it is the brightness before black. No colour management. Raises what `probe`
    and `decode` raise.
    """
    pixels = decode(data, probe(data, max_pixels=max_pixels), icc="keep").pixels
    with _memory_checked():
        if pixels.shape[2] == 4 and int(pixels[:, :, 3].min()) < 255:
            alpha = pixels[:, :, 3]
            seen = pixels[:, :, :3][alpha > 0]
            if not len(seen) or (seen == seen[0]).all():
                return np.ascontiguousarray(alpha)
            pixels = flatten(pixels, 0)
        return np.asarray(cv2.cvtColor(pixels[:, :, :3], cv2.COLOR_RGB2GRAY), np.uint8)


def choose_format(source_format: str, wanted: Literal["same", "png", "webp", "jpeg"], has_alpha: bool) -> str:
    """The format to write: `wanted`, where `same` follows the source as far as it can.

    A JPEG that became transparent is written as PNG; GIF, BMP, TIFF and AVIF as PNG too. A
    transparent picture that is wanted as JPEG stays JPEG: `encode` lays it over white.
    """
    if wanted != "same":
        return wanted
    if source_format == "jpeg" and not has_alpha:
        return "jpeg"
    return "webp" if source_format == "webp" else "png"


def encode(picture: Picture, *, format: str, quality: int, clear: bool = True) -> Encoded:  # noqa: A002
    """`picture` as a file of `format` (png, webp or jpeg), its profile embedded where it has one.

    PNG is lossless. `quality`, 1 to 100, is of JPEG and of (always lossy) WebP. What came grey and has no colours now is
    written grey in PNG and JPEG. Colour under alpha 0 is cleared in WebP, and in PNG if `clear`; JPEG has no alpha, so it
    shows the picture over white. Raises OperationFailed for sides that the format can't hold, and OutOfMemory.
    """
    limit = {"webp": _WEBP_SIDE, "jpeg": _JPEG_SIDE}.get(format)
    if limit is not None and max(picture.size) > limit:
        name = "WebP" if format == "webp" else "JPEG"
        raise OperationFailed(
            f"{name} holds at most {limit:,} pixels per side, this picture has {max(picture.size):,}; choose format png"
        )
    with _memory_checked():
        pixels = picture.pixels[:, :, :1] if picture.grey and format != "webp" and _colourless(picture) else picture.pixels
        try:
            if format == "png":
                data = png.encode(pixels, picture.icc, clear=clear)
            elif format == "webp":
                data = _webp(pixels, quality, picture.icc)
            elif format == "jpeg":
                flat = flatten(pixels, 255) if pixels.shape[2] == 4 else pixels
                data = jpeg.encode(np.ascontiguousarray(flat), quality, picture.icc)
            else:
                raise OperationFailed(f"there is no output format {format!r} (valid: jpeg, png, webp)")
        except (ValueError, OSError) as error:
            raise OperationFailed(f"the picture can't be written as {format} ({sentence(error)})") from error
    return Encoded(data, format)


def _colourless(picture: Picture) -> bool:
    """Whether it is opaque, and its three channels are one; looked at a strip at a time, since comparing takes memory."""
    strips = (picture.pixels[top : top + _STRIP] for top in range(0, picture.size[1], _STRIP))
    return picture.pixels.shape[2] == 3 and all((strip == strip[:, :, :1]).all() for strip in strips)


def _webp(pixels: Pixels, quality: int, icc: bytes | None) -> bytes:
    pixels = png.clear_hidden(pixels) if pixels.shape[2] == 4 else pixels
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", quality=quality, method=_WEBP_METHOD, icc_profile=icc or b"")
    return out.getvalue()
