"""Image files to pixels and back: `probe` reads the header, `decode` gives upright sRGB, `encode` writes a file.

bench/codec.py measures the choices made here. Every failure is an ImageError.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagemill.shared.errors import NotAnImage, OperationFailed, sentence
from imagemill.worker.imaging import costs, headers, jpeg, opencv, png
from imagemill.worker.imaging import icc as profiles
from imagemill.worker.imaging.headers import Header, open_checked, translated
from imagemill.worker.imaging.picture import Grey, Picture, Pixels, array_of, flatten
from imagemill.worker.imaging.room import Room
from imagemill.worker.imaging.scale import fit, resize, upright
from imagemill.worker.imaging.wall import shared_wall

__all__ = ["Encoded", "Header", "choose_format", "decode", "decode_mask", "encode", "fit", "probe", "resize"]

_WEBP_METHOD = 2  # of 0 to 6: half the time of 4 for a few per cent more bytes; 0 and 1 give files 1.2 to 2 times larger
_LONGEST_SIDES = {"webp": ("WebP", 16_383), "jpeg": ("JPEG", 65_500)}
_STRIP = 256  # rows
_room = Room()
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
"""File extension of each output format."""


@dataclass(frozen=True)
class Encoded:
    """A finished file of MIME type `image/{format}`; `size` is (width, height)."""

    data: bytes
    format: str
    size: tuple[int, int]

    @cached_property
    def md5(self) -> str:
        """The MD5 of the file, in hex."""
        return hashlib.md5(self.data, usedforsecurity=False).hexdigest()


def probe(data: bytes, *, max_pixels: int) -> Header:
    """What `headers.probe` returns and raises; also TooCostly. Formats whose headers a library parses go behind the wall."""
    kind = headers.sniff(data)
    if kind in headers.PARSED_HERE:
        return headers.probe(data, max_pixels=max_pixels)
    return shared_wall.probe(data, kind, max_pixels=max_pixels)


def decode(data: bytes, header: Header, *, edge: int | None = None, icc: Literal["srgb", "keep"] = "srgb") -> Picture:
    """Decode the file that `probe` returned `header` for: upright, uint8, RGBA if it has transparency, otherwise RGB.

    A picture whose longest edge exceeds `edge` pixels is scaled down to fit it exactly; none is scaled up. With
    `icc="keep"`, pixels stay in their RGB profile, which is returned as `Picture.icc`; greyscale and CMYK files are always
    converted to sRGB. Only the first frame of an animation is decoded.

    Raises Truncated (also for damaged files), NotAnImage for unsupported variants of a format, TooCostly and OutOfMemory.
    What isn't known to cost no more than its pixels is decoded behind the wall. Waits while other threads decode very many.
    """
    pixels = header.size[0] * header.size[1]
    with _room.taken(pixels):
        if costs.is_linear(data, header.format, header.icc, pixels):
            return decode_here(data, header, edge=edge, icc=icc)
        return shared_wall.decode(data, header, edge=edge, icc=icc)


def decode_here(data: bytes, header: Header, *, edge: int | None = None, icc: Literal["srgb", "keep"] = "srgb") -> Picture:
    """`decode` in this process, whatever it costs."""
    target = fit(header.stored_size, edge)
    with translated(header.format):
        if header.format == "jpeg":
            pixels, mode = jpeg.decode(data, header.stored_size, target)
        else:
            pixels, mode = _by_pillow(data, header)
    with opencv.translated("decoding the picture"):
        if mode != "CMYK":  # `resize` would treat the fourth channel, black, as alpha
            pixels = np.ascontiguousarray(resize(pixels, target))
        kept = header.icc if icc == "keep" and profiles.space(header.icc) == "RGB" and mode != "CMYK" else None
        colours = profiles.as_rgb(pixels, mode) if kept else profiles.to_srgb(pixels, mode, header.icc)
        grey = mode == "L" and header.icc is None
        same = grey or colours is pixels
        as_stored = same and header.orientation == 1 and target == header.stored_size and _one_frame(data, header.format)
        colours = np.ascontiguousarray(upright(resize(colours, target), header.orientation))
        return Picture(colours, format=header.format, icc=kept, full_size=header.size, as_stored=as_stored, grey=grey)


def _one_frame(data: bytes, source_format: str) -> bool:
    """Whether the file has a single frame and a format that we also write."""
    if source_format == "png":
        return all(kind != b"acTL" for kind, _, _ in png.chunks(data))
    return source_format == "jpeg" or (source_format == "webp" and (data[12:16] != b"VP8X" or not data[20] & 2))


def _by_pillow(data: bytes, header: Header) -> tuple[NDArray[np.uint8], str]:
    """Pixels and their mode: L [h, w], or RGB, RGBA or CMYK [h, w, c]."""
    key = None
    if header.format == "png":
        depth = data[24]  # `probe` has checked that the header is the first chunk
        data, key = png.checked(data)
    image = open_checked(data, header.format, header.stored_size)
    image.load()
    vars(image).pop("_decoder", None)  # that of WebP keeps two copies of the picture
    pixels, mode = _samples(image)
    if key is not None:
        alpha = png.colour_key(np.array(image) if image.mode == "I;16" else pixels, key, depth)
        return np.dstack([profiles.as_rgb(pixels, mode), alpha]), "RGBA"
    return pixels, mode


def _samples(image: Image.Image) -> tuple[NDArray[np.uint8], str]:
    """Samples of a Pillow image as L, RGB, RGBA or CMYK; of 16-bit grey, the upper byte."""
    if image.mode.startswith("I;16"):
        return (np.array(image) >> 8).astype(np.uint8), "L"
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise NotAnImage(f"pixel format {image.mode!r} is not supported")
    if image.has_transparency_data:
        mode = "RGBA"
    elif image.mode in ("1", "L"):
        mode = "L"
    else:
        mode = "CMYK" if image.mode == "CMYK" else "RGB"
    return array_of(image if image.mode == mode else image.convert(mode)), mode


def decode_mask(data: bytes, *, max_pixels: int) -> Grey:
    """Decode a mask from an image file of any format: uint8 [height, width], upright, without colour management.

    If the file has transparent parts and one single visible colour, the mask is its alpha; otherwise it is the brightness,
    composited over black. Raises the errors of `probe` and `decode`.
    """
    pixels = decode(data, probe(data, max_pixels=max_pixels), icc="keep").pixels
    with opencv.translated("decoding the mask"):
        if pixels.shape[2] == 4 and int(pixels[:, :, 3].min()) < 255:
            alpha = pixels[:, :, 3]
            visible = pixels[:, :, :3][alpha > 0]
            if not len(visible) or (visible == visible[0]).all():
                return np.ascontiguousarray(alpha)
            pixels = flatten(pixels, 0)
        return np.asarray(cv2.cvtColor(pixels[:, :, :3], cv2.COLOR_RGB2GRAY), np.uint8)


def choose_format(source_format: str, wanted: Literal["same", "png", "webp", "jpeg"], has_alpha: bool) -> str:
    """The output format: `wanted`, or for `same` the source's format if possible.

    With `same`, a JPEG that became transparent is written as PNG, and so are GIF, BMP, TIFF and AVIF. A transparent picture
    explicitly wanted as JPEG stays JPEG: `encode` composites it over white.
    """
    if wanted != "same":
        return wanted
    if source_format == "jpeg" and not has_alpha:
        return "jpeg"
    return "webp" if source_format == "webp" else "png"


def encode(picture: Picture, *, format: str, quality: int, clear: bool = True) -> Encoded:  # noqa: A002
    """Encode `picture` as png, webp or jpeg, with its colour profile embedded if it has one.

    `quality` (1 to 100) applies to JPEG and to WebP, which is always lossy; PNG is lossless. A greyscale source that gained
    no colour is written as greyscale in PNG and JPEG. Colour under alpha 0 is cleared in WebP and, if `clear`, in PNG; JPEG
    has no alpha, so the picture is composited over white. Raises OperationFailed if the picture is too large for the format
    or can't be encoded, and OutOfMemory.
    """
    name, limit = _LONGEST_SIDES.get(format, ("", None))
    if limit is not None and max(picture.size) > limit:
        raise OperationFailed(
            f"{name} is limited to {limit:,} pixels per side and this picture has {max(picture.size):,}; use format png"
        )
    with opencv.translated("encoding the picture"):
        pixels = picture.pixels[:, :, :1] if picture.grey and format != "webp" and _colourless(picture) else picture.pixels
        try:
            if format == "png":
                data = png.encode(pixels, picture.icc, clear=clear)
            elif format == "webp":
                data = _webp(pixels, quality, picture.icc)
            else:
                data = jpeg.encode(np.ascontiguousarray(flatten(pixels, 255)), quality, picture.icc)
        except (ValueError, OSError) as error:
            raise OperationFailed(f"the picture can't be encoded as {format} ({sentence(error)})") from error
    return Encoded(data, format, picture.size)


def _colourless(picture: Picture) -> bool:
    """Whether the picture is RGB with three equal channels, compared in strips to save memory."""
    strips = (picture.pixels[top : top + _STRIP] for top in range(0, picture.size[1], _STRIP))
    return picture.pixels.shape[2] == 3 and all((strip == strip[:, :, :1]).all() for strip in strips)


def _webp(pixels: Pixels, quality: int, icc: bytes | None) -> bytes:
    pixels = png.clear_hidden(pixels) if pixels.shape[2] == 4 else pixels
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", quality=quality, method=_WEBP_METHOD, icc_profile=icc or b"")
    return out.getvalue()
