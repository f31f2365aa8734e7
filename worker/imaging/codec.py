"""Image files to pixels and back: `probe` reads the header, `decode` gives upright sRGB, `encode` and `unchanged` write a file.

bench/codec.py measures the choices made here. Every failure is an ImageError.
"""

from __future__ import annotations

import hashlib
import io
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from PIL import Image

from imagemill.shared.errors import OperationFailed, sentence
from imagemill.shared.messages import Format, KeepMetadata
from imagemill.worker.imaging import costs, headers, jpeg, opencv, png, reading
from imagemill.worker.imaging import icc as profiles
from imagemill.worker.imaging.headers import Header, translated
from imagemill.worker.imaging.metadata import files, metadata
from imagemill.worker.imaging.metadata.blocks import Blocks
from imagemill.worker.imaging.picture import Picture, Pixels, flatten
from imagemill.worker.imaging.room import Room
from imagemill.worker.imaging.scale import fit, resize, upright
from imagemill.worker.imaging.wall import shared_wall

__all__ = ["Encoded", "Header", "choose_format", "decode", "encode", "fit", "probe", "resize", "unchanged"]

_WEBP_METHOD = 2  # of 0 to 6: half the time of 4 for a few per cent more bytes; 0 and 1 give files 1.2 to 2 times larger
_AVIF_SPEED = 9  # of 0 to 10: a quarter of the time of 8 for a tenth more bytes; still six times the time of lossy WebP
_LONGEST_SIDES = {
    "webp": ("WebP", 16_383),
    "webp-lossless": ("WebP", 16_383),
    "jpeg": ("JPEG", 65_500),
    "avif": ("AVIF", 32_768),  # what libavif reads
}
_STRIP = 256  # rows
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "avif": "avif"}
"""File extension of each format that is written; `webp-lossless` is WebP."""
_room = Room()


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


def decode(
    data: bytes,
    header: Header,
    *,
    edge: int | None = None,
    icc: Literal["srgb", "keep"] = "srgb",
    keep: KeepMetadata = "none",
) -> Picture:
    """Decode the file that `probe` returned `header` for: upright, uint8, RGBA if it has transparency, otherwise RGB.

    A picture whose longest edge exceeds `edge` pixels is scaled down to fit it exactly; none is scaled up. With
    `icc="keep"`, pixels stay in their RGB profile, which is returned as `Picture.icc`; greyscale and CMYK files are always
    converted to sRGB. Only the first frame of an animation is decoded. `keep` says which metadata the picture brings along.

    Raises Truncated (also for damaged files), UnsupportedFormat for variants of a format that aren't read, TooCostly and
    OutOfMemory. A file that may cost more than its pixels is decoded behind the wall. Waits while other threads are decoding
    very many pixels.
    """
    with _room.taken(header.pixels):
        linear = costs.is_linear(data, header.format, header.icc, header.pixels)
        picture = (decode_here if linear else shared_wall.decode)(data, header, edge=edge, icc=icc)
    moved = header.orientation != 1 or fit(header.stored_size, edge) != header.stored_size
    return replace(picture, metadata=metadata.read(data, header.format, keep, moved=moved))


def decode_here(data: bytes, header: Header, *, edge: int | None = None, icc: Literal["srgb", "keep"] = "srgb") -> Picture:
    """`decode` in this process, whatever it costs, and without metadata."""
    target = fit(header.stored_size, edge)
    with translated(header.format):
        samples = reading.decode(data, header, target)
    pixels, mode = samples.pixels, samples.mode
    header = replace(header, icc=samples.icc or header.icc)
    with opencv.translated("decoding the picture"):
        if mode != "CMYK":  # `resize` would treat the fourth channel, black, as alpha
            pixels = np.ascontiguousarray(resize(pixels, target))
        kept = header.icc if icc == "keep" and profiles.space(header.icc) == "RGB" and mode != "CMYK" else None
        colours = profiles.as_rgb(pixels, mode) if kept else profiles.to_srgb(pixels, mode, header.icc)
        grey = mode == "L" and header.icc is None
        same = grey or colours is pixels
        as_stored = same and header.orientation == 1 and target == header.stored_size and _one_frame(data, header.format)
        colours = np.ascontiguousarray(upright(resize(colours, target), header.orientation))
    return Picture(
        colours,
        format=header.format,
        icc=kept,
        full_size=header.size,
        as_stored=as_stored,
        grey=grey,
        notes=(*header.notes, *samples.notes),
        lossless=header.lossless,
    )


def _one_frame(data: bytes, source_format: str) -> bool:
    """Whether the file has a single frame and a format that we also write."""
    if source_format == "avif":
        return data[8:12] == b"avif"  # sequences begin with avis
    if source_format == "png":
        return all(kind != b"acTL" for kind, _, _ in png.chunks(data))
    return source_format == "jpeg" or (source_format == "webp" and (data[12:16] != b"VP8X" or not data[20] & 2))


def choose_format(picture: Picture, wanted: Format) -> str:
    """The output format: `wanted`, or for `same` the source's format if possible.

    With `same`, lossless WebP stays lossless. HEIC and lossy JPEG XL are written as JPEG, and lossless JPEG XL, GIF, BMP and
    TIFF as PNG, as is everything transparent that would be a JPEG. A transparent picture explicitly wanted as JPEG stays JPEG:
    `encode` composites it over white.
    """
    if wanted != "same":
        return wanted
    if picture.format == "webp":
        return "webp-lossless" if picture.lossless else "webp"
    if picture.format == "avif":
        return "avif"
    lossy = picture.format in ("jpeg", "heic", "jxl") and not picture.lossless
    return "jpeg" if lossy and picture.pixels.shape[2] == 3 else "png"


def encode(picture: Picture, *, format: str, quality: int, clear: bool = True) -> Encoded:  # noqa: A002
    """Encode `picture` as png, webp, webp-lossless, jpeg or avif, with its colour profile and metadata if it has them.

    `quality` (1 to 100) applies to JPEG, AVIF and WebP; PNG and webp-lossless are lossless. A greyscale source that gained no
    colour is written as greyscale in PNG and JPEG. Colour under alpha 0 is cleared in lossy formats and, if `clear`, in all;
    JPEG has no alpha, so the picture is composited over white. Raises OperationFailed if the picture is too large for the
    format or can't be encoded, and OutOfMemory.
    """
    name, limit = _LONGEST_SIDES.get(format, ("", None))
    if limit is not None and max(picture.size) > limit:
        raise OperationFailed(
            f"{name} is limited to {limit:,} pixels per side and this picture has {max(picture.size):,}; use format png"
        )
    container = format.removesuffix("-lossless")
    blocks = picture.metadata.blocks(container, picture.size, srgb=picture.icc is None)
    with opencv.translated("encoding the picture"):
        narrow = picture.grey and format in ("png", "jpeg") and _colourless(picture)
        pixels = picture.pixels[:, :, :1] if narrow else picture.pixels
        try:
            if format == "png":
                data = png.encode(pixels, picture.icc, clear=clear)
            elif format == "jpeg":
                data = jpeg.encode(np.ascontiguousarray(flatten(pixels, 255)), quality, picture.icc)
            else:
                lossless = format == "webp-lossless"
                if pixels.shape[2] == 4 and (clear or not lossless):
                    pixels = png.clear_hidden(pixels)
                data = (_webp_lossless if lossless else _webp if format == "webp" else _avif)(
                    pixels, quality, picture.icc, blocks
                )
        except (ValueError, OSError) as error:
            raise OperationFailed(f"the picture can't be encoded as {format} ({sentence(error)})") from error
    if blocks and format in ("png", "jpeg"):
        data = files.rewritten(data, format, blocks) or data
    return Encoded(data, container, picture.size)


def unchanged(data: bytes, picture: Picture, *, format: str, keep: KeepMetadata) -> Encoded | None:  # noqa: A002
    """The source's file, if it shows exactly `picture` and has the format; only metadata that `keep` excludes is removed.

    None if the picture must be encoded again.
    """
    if not picture.as_stored or format.removesuffix("-lossless") != picture.format:
        return None
    if keep != "keep":
        blocks = picture.metadata.blocks(picture.format, picture.size, srgb=False)
        rewritten = files.rewritten(data, picture.format, blocks)
        if rewritten is None or _profile(rewritten) != _profile(data):  # EXIF alone may state the colours
            return None
        data = rewritten
    return Encoded(data, picture.format, picture.size)


def _profile(data: bytes) -> bytes | None:
    return probe(data, max_pixels=sys.maxsize).icc


def _colourless(picture: Picture) -> bool:
    """Whether the picture is RGB with three equal channels, compared in strips to save memory."""
    strips = (picture.pixels[top : top + _STRIP] for top in range(0, picture.size[1], _STRIP))
    return picture.pixels.shape[2] == 3 and all((strip == strip[:, :, :1]).all() for strip in strips)


def _webp(pixels: Pixels, quality: int, icc: bytes | None, blocks: Blocks) -> bytes:
    return _saved(pixels, "WEBP", icc, blocks, quality=quality, method=_WEBP_METHOD)


def _webp_lossless(pixels: Pixels, _: int, icc: bytes | None, blocks: Blocks) -> bytes:
    # Method 0 takes a third of the time of the others for 5 % more bytes. `exact` keeps the colour under alpha 0.
    return _saved(pixels, "WEBP", icc, blocks, lossless=True, exact=True, method=0, quality=20)


def _avif(pixels: Pixels, quality: int, icc: bytes | None, blocks: Blocks) -> bytes:
    sampling = "4:4:4" if quality >= 90 else "4:2:0"  # as in JPEG
    return _saved(pixels, "AVIF", icc, blocks, quality=quality, speed=_AVIF_SPEED, subsampling=sampling, max_threads=1)


def _saved(pixels: Pixels, kind: str, icc: bytes | None, blocks: Blocks, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, icc_profile=icc or b"", exif=blocks.exif, xmp=blocks.xmp, **options)
    return out.getvalue()
