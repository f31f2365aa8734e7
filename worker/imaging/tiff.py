"""TIFF: which layouts are read, and decoding.

Libraries misread some of the many layouts. So they only unpack here: a page is handed to Pillow as a grey picture of the bytes
that its rows consist of, and what these bytes mean is decided below. `_layout` is the list of what is read.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imagemill.shared.errors import Truncated, UnsupportedFormat
from imagemill.worker.imaging import tiff_pages as tag
from imagemill.worker.imaging.facts import FULL_PAGE, REDUCED, Facts, Samples, check_size
from imagemill.worker.imaging.pillow import open_checked
from imagemill.worker.imaging.png import MAX_PROFILE
from imagemill.worker.imaging.tiff_pages import Page, full_page

MAX_SAMPLES = 6
"""Per pixel: four colours, alpha and one more, which is ignored."""
MAX_XMP = 2**20

_WHITE_IS_ZERO, _GREY, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_COLOURS = {_WHITE_IS_ZERO: 1, _GREY: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}
_OTHER_COLOURS = {
    4: "a transparency mask", 8: "Lab colours", 9: "ICC Lab colours", 10: "ITU Lab colours", 32844: "LogL light levels",
    32845: "LogLuv light levels", 32803: "the raw data of a camera", 34892: "the raw data of a camera",
}  # fmt: skip
_NONE, _FAX, _JPEG = 1, frozenset({2, 3, 4}), 7
_PLAIN = frozenset({1, 5, 8, 32773, 32946, 34925, 50000})  # none, LZW, deflate, PackBits, deflate, LZMA, Zstandard
_OTHER_COMPRESSIONS = {
    6: "old-style JPEG",
    34712: "JPEG 2000",
    34887: "LERC",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_FORMATS = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
_BITS = frozenset({1, 2, 4, 8, 10, 12, 14, 16})
_ASSOCIATED, _IGNORED = 1, 0
_STRIP = 2**20  # samples interpreted at once

Array = NDArray[np.uint8 | np.uint16]


@dataclass(frozen=True)
class Layout:
    """What a page's bytes mean. `alpha` is the index of its sample; colour is multiplied by it if it is `associated`."""

    size: tuple[int, int]
    order: str
    bits: int
    samples: int
    meaning: int
    compression: int
    planar: bool
    differences: bool
    alpha: int | None
    associated: bool

    @property
    def colours(self) -> int:
        """Samples that are colours."""
        return _COLOURS[self.meaning]


def read_header(data: bytes, max_pixels: int) -> Facts:
    """What the file states of its full page. Raises UnsupportedFormat, NotAnImage, Truncated and TooManyPixels."""
    page, skipped = full_page(data)
    check_size(page.size, max_pixels)
    layout = _layout(page)
    if tag.TILES in page.entries:
        side = page.number(tag.TILE_WIDTH)
        check_size((side, page.number(tag.TILE_HEIGHT)), max_pixels)
        check_size((-(-page.size[0] // side) * side, page.size[1]), 2 * max_pixels)  # tiles stick out at the right
    source = page if tag.ORIENTATION in page.entries or page.above is None else page.above
    turn = source.number(tag.ORIENTATION) if tag.ORIENTATION in source.entries else None
    return Facts(
        page.size,
        xmp=page.raw(tag.XMP, MAX_XMP),
        icc=page.raw(tag.PROFILE, MAX_PROFILE),
        orientation=turn if turn is None or 1 <= turn <= 8 else 1,
        notes=(REDUCED,) * (layout.bits > 8) + (FULL_PAGE,) * skipped,
    )


def _layout(page: Page) -> Layout:
    """The layout of a page. Raises UnsupportedFormat if it isn't among those that are read."""
    meaning, compression = page.number(tag.PHOTOMETRIC, -1), page.number(tag.COMPRESSION, 1)
    samples, planar = page.number(tag.SAMPLES, 1), page.number(tag.PLANAR, 1) == 2
    depths, formats = {*page.numbers(tag.BITS, (1,))}, {*page.numbers(tag.SAMPLE_FORMAT, (1,))}
    bits, colours = max(depths), _COLOURS.get(meaning, 0)
    extra = page.numbers(tag.EXTRA_SAMPLES) or (2,) * (samples - colours)  # unspecified means alpha, as in other programs
    alphas = [at for at, kind in enumerate(extra[: samples - colours], colours) if kind != _IGNORED]
    differences = page.number(tag.PREDICTOR, 1)
    _refuse_if(
        (bool(formats & _FORMATS.keys()), f"{bits}-bit {_FORMATS.get(max(formats), '')} samples"),
        (not formats <= {1, 4}, f"samples of format {max(formats)}"),
        (meaning == -1, "no photometric interpretation, which says what samples mean,"),
        (colours == 0, _OTHER_COLOURS.get(meaning, f"colours of kind {meaning} (photometric interpretation)")),
        (len(depths) > 1, f"samples of {' and '.join(map(str, sorted(depths)))} bits"),
        (bits not in _BITS, f"{bits}-bit samples"),
        (compression not in {*_PLAIN, *_FAX, _JPEG}, _compressed(compression)),
        (not colours <= samples <= MAX_SAMPLES, f"{samples} samples per pixel"),
        (meaning == _CMYK and page.number(tag.INK_SET, 1) != 1, "inks other than CMYK"),
        (meaning == _CMYK and bool(alphas), "CMYK colours and transparency"),
        (meaning == _WHITE_IS_ZERO and bool(alphas), "inverted grey levels and transparency"),
        (meaning == _YCBCR and (compression != _JPEG or planar or samples > 3), "YCbCr colours in this layout"),
        (meaning == _PALETTE and (bits > 8 or compression == _JPEG), "a palette in this layout"),
        (compression in _FAX and (bits, samples) != (1, 1), "fax compression of grey or colour"),
        (compression == _JPEG and bits != 8, f"{bits}-bit JPEG compression"),
        (compression == _JPEG and not planar and samples not in (1, 3, 4), f"{samples} samples per pixel in JPEG compression"),
        (
            differences not in (1, 2) or (differences == 2 and bits not in (8, 16)),
            f"predictor {differences} for {bits}-bit samples",
        ),
    )
    alpha = alphas[0] if alphas else None
    associated = alpha is not None and extra[alpha - colours] == _ASSOCIATED
    return Layout(
        page.size, page.order, bits, samples, meaning, compression, planar, differences == 2, alpha, associated
    )  # fmt: skip


def _refuse_if(*conditions: tuple[bool, str]) -> None:
    reason = next((reason for holds, reason in conditions if holds), None)
    if reason is not None:
        raise UnsupportedFormat(f"TIFF files with {reason} are not supported")


def _compressed(compression: int) -> str:
    return (
        f"{_OTHER_COMPRESSIONS[compression]} compression"
        if compression in _OTHER_COMPRESSIONS
        else f"compression {compression}"
    )


def decode(data: bytes, size: tuple[int, int]) -> Samples:
    """Decode the full page, not rotated: L, RGB, RGBA or CMYK. Raises as `read_header`, and Pillow's exceptions on damage."""
    page, _ = full_page(data)
    layout = _layout(page)
    if layout.size != size:
        raise Truncated(f"the file has conflicting sizes: {size[0]} x {size[1]} and {layout.size[0]} x {layout.size[1]} pixels")
    needed = {*range(layout.colours), *([layout.alpha] if layout.alpha is not None else [])}
    planes = [_unpacked(page, layout, plane) for plane in sorted(needed)] if layout.planar else [_unpacked(page, layout, 0)]
    tables = _tables(page, layout)
    channels = tables.shape[1] + 1 if layout.alpha is not None else tables.shape[1]
    channels = 4 if layout.alpha is not None and layout.colours == 1 else channels
    width, height = size
    result = np.empty((height, width, channels), np.uint8)
    rows = max(1, _STRIP // (width * layout.samples))
    for top in range(0, height, rows):
        parts = [_values(plane[top : top + rows], layout) for plane in planes]
        values = np.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]
        at = layout.colours if layout.planar else layout.alpha
        _interpret(values, layout, tables, at if layout.alpha is not None else None, result[top : top + rows])
    if channels == 1:
        return Samples(result[:, :, 0], "L")
    return Samples(result, "CMYK" if layout.meaning == _CMYK else "RGB" if channels == 3 else "RGBA")


def _tables(page: Page, layout: Layout) -> NDArray[np.uint8]:
    """The 8-bit levels, [2^bits, colours], of each value of a sample: rounded, inverted or from the palette."""
    most = 2**layout.bits - 1
    if layout.meaning == _PALETTE:
        palette = np.array(page.numbers(tag.PALETTE)[: 3 * (most + 1)])
        if len(palette) != 3 * (most + 1):
            raise Truncated("the TIFF file's palette is cut short")
        if palette.max() > 255:  # some writers store 8 bits
            palette = palette >> 8  # others write 255 as 65280, which rounding would make 254
        return np.ascontiguousarray(palette.reshape(3, -1).T.astype(np.uint8))
    levels = _linear(layout.bits)
    levels = levels[::-1] if layout.meaning == _WHITE_IS_ZERO else levels
    return np.repeat(levels[:, None], layout.colours, axis=1)


def _linear(bits: int) -> NDArray[np.uint8]:
    most = 2**bits - 1
    levels: NDArray[np.int64] = (np.arange(most + 1) * 255 + most // 2) // most
    return levels.astype(np.uint8)


def _interpret(values: Array, layout: Layout, tables: NDArray[np.uint8], alpha: int | None, out: NDArray[np.uint8]) -> None:
    """Write the 8-bit pixels of `values` [h, w, samples] to `out`; `alpha` is the index of alpha in `values`."""
    colours = values[:, :, : layout.colours]
    if alpha is not None:
        out[:, :, 3] = _scaled(_linear(layout.bits), values[:, :, alpha])
    if layout.associated and alpha is not None:
        opacity = values[:, :, alpha, None].astype(np.uint32)
        out[:, :, :3] = np.minimum((colours * np.uint32(255) + opacity // 2) // np.maximum(opacity, 1), 255)
    elif layout.meaning == _PALETTE:
        out[:, :, :3] = tables[colours[:, :, 0]]
    else:
        out[:, :, : 3 if alpha is not None else out.shape[2]] = _scaled(tables[:, 0], colours)


def _scaled(levels: NDArray[np.uint8], values: Array) -> NDArray[np.uint8]:
    plain = len(levels) == 256 and levels[0] == 0
    return values.astype(np.uint8, copy=False) if plain else levels[values]


def _values(rows: Array, layout: Layout) -> Array:
    """The samples, [h, w, samples], of unpacked rows: [h, pieces, bytes], or [h, w, samples] where the library knew them."""
    if layout.compression not in _PLAIN:
        return rows
    count = 1 if layout.planar else layout.samples
    if layout.bits == 8:
        values: Array = rows
    elif layout.bits == 16:
        values = np.ascontiguousarray(rows).view(layout.order + "u2").astype(np.uint16, copy=False)
    else:
        bits = np.unpackbits(rows.view(np.uint8), axis=2)
        bits = bits[:, :, : bits.shape[2] // (layout.bits * count) * layout.bits * count]
        weights = 2 ** np.arange(layout.bits - 1, -1, -1, dtype=np.uint16)
        values = np.dot(bits.reshape(*rows.shape[:2], -1, layout.bits), weights)
    values = values.reshape(*rows.shape[:2], -1, count)
    if layout.differences:
        values = np.cumsum(values, axis=2, dtype=values.dtype)
    return values.reshape(len(rows), -1, count)[:, : layout.size[0]]


def _unpacked(page: Page, layout: Layout, plane: int) -> Array:
    """The rows of a plane, or of all samples together: [h, pieces, bytes], or [h, w, samples] where the library knows them."""
    width, height = layout.size
    count = 1 if layout.planar else layout.samples
    tiled = tag.TILES in page.entries
    piece = page.number(tag.TILE_WIDTH) if tiled else width
    high = min(page.number(tag.TILE_HEIGHT) if tiled else page.number(tag.ROWS_PER_STRIP, height) or height, 2**31 - 1)
    across, down = -(-width // piece), -(-height // high)
    tags: dict[int, Sequence[int] | bytes] = {tag.COMPRESSION: [layout.compression], tag.HEIGHT: [height], tag.PLANAR: [1]}
    for name in (tag.FILL_ORDER, tag.FAX3_OPTIONS, tag.FAX4_OPTIONS, tag.SUBSAMPLING):
        if name in page.entries:
            tags[name] = page.numbers(name)
    tables = page.raw(tag.JPEG_TABLES, 2**16)
    if tables is not None:
        tags[tag.JPEG_TABLES] = tables
    row = piece
    if layout.compression in _PLAIN:
        row = -(-piece * count * layout.bits // 8)
        tags |= {tag.BITS: [8], tag.SAMPLES: [1], tag.PHOTOMETRIC: [_GREY], tag.WIDTH: [row * across]}
    else:
        meaning = _YCBCR if layout.meaning == _YCBCR else {1: _GREY, 3: _RGB, 4: _CMYK}[count]
        tags |= {tag.BITS: [layout.bits] * count, tag.SAMPLES: [count], tag.PHOTOMETRIC: [meaning], tag.WIDTH: [width]}
    if tiled:
        tags |= {tag.TILE_WIDTH: [row], tag.TILE_HEIGHT: [high]}
    else:
        tags[tag.ROWS_PER_STRIP] = [min(high, height)]
    last = high if tiled else height - high * (down - 1)
    least = [row * high] * (across * down - 1) + [row * last] if layout.compression == _NONE else [1] * (across * down)
    tags |= _pieces(page, plane, least)
    image = open_checked(_rebuilt(page.data, tags), "tiff")
    image.load()
    found = np.array(image).view(np.uint8)
    if image.mode == "1":
        found = found // 255  # True arrives as 255
    return found.reshape(height, across, -1) if layout.compression in _PLAIN else found.reshape(height, width, count)


def _pieces(page: Page, plane: int, least: list[int]) -> dict[int, list[int]]:
    """Where the strips or tiles of a plane are, of `least` bytes each. Raises Truncated if they are not in the file."""
    places, lengths = (tag.TILES, tag.TILE_BYTES) if tag.TILES in page.entries else (tag.STRIPS, tag.STRIP_BYTES)
    of_plane = slice(plane * len(least), (plane + 1) * len(least))
    starts, sizes = page.numbers(places)[of_plane], page.numbers(lengths)[of_plane]
    rest = [len(page.data) - start for start in starts]  # what follows them here is the new directory
    if len(starts) < len(least) or any(left < wanted for left, wanted in zip(rest, least, strict=True)):
        raise Truncated("the TIFF file ends early: some of its strips or tiles are missing")
    if len(sizes) == len(least):
        rest = [min(size, left) for size, left in zip(sizes, rest, strict=True)]
    return {places: [*starts], lengths: rest}


def _rebuilt(data: bytes, tags: Mapping[int, Sequence[int] | bytes]) -> bytes:
    """The file with a new directory in place of all others: little-endian, as the bytes of samples are read one by one."""
    start = len(data) + len(data) % 2
    place = start + 2 + 12 * len(tags) + 4
    table, more = [struct.pack("<H", len(tags))], b""
    for number, values in sorted(tags.items()):
        short = isinstance(values, bytes) or max(values, default=0) < 2**16
        kind, layout = (7, "B") if isinstance(values, bytes) else (3, "H") if short else (4, "I")
        payload = struct.pack(f"<{len(values)}{layout}", *values)
        if len(payload) > 4:
            more, payload = more + payload + bytes(len(payload) % 2), struct.pack("<I", place + len(more))
        table.append(struct.pack("<HHI", number, kind, len(values)) + payload.ljust(4, b"\0"))
    return b"".join([b"II*\0", struct.pack("<I", start), data[8:], bytes(len(data) % 2), *table, bytes(4), more])
