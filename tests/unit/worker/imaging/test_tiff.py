"""TIFF: every layout that is read gives its known pixels, and every other is refused with a sentence."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagemill.shared.errors import NotAnImage, Truncated, UnsupportedFormat
from imagemill.worker.imaging import codec
from tests.unit.worker.imaging.samples import SWAPPED, difference, picture, pixels, save, scene
from tests.unit.worker.imaging.tiffs import CMYK, DEFLATE, GREY, NONE, PACKBITS, PALETTE, RGB, WHITE_IS_ZERO, Sheet, tiff

SIZE = (19, 7)  # of no tile or strip a multiple
DEPTHS = (1, 2, 4, 8, 10, 12, 14, 16)


def values(bits: int, samples: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Random samples, black and white among them."""
    found = np.random.default_rng(bits + samples).integers(0, 2**bits, (size[1], size[0], samples))
    found[0, 0], found[0, 1] = 0, 2**bits - 1
    return found.astype(np.uint16 if bits > 8 else np.uint8)


def eight(samples: np.ndarray, bits: int) -> np.ndarray:
    return np.round(samples / (2**bits - 1) * 255).astype(np.uint8)


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[:, :, :1], 3, axis=2)


# --- what is read ---


@pytest.mark.parametrize("bits", DEPTHS)
@pytest.mark.parametrize("planar", [False, True], ids=["chunky", "planar"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compression", [NONE, DEFLATE, PACKBITS])
def test_rgb_of_every_depth_planes_byte_order_and_compression(bits: int, planar: bool, order: str, compression: int) -> None:
    stored = values(bits, 3)
    found = picture(tiff(Sheet(stored, bits, RGB, compression, planar), order=order))
    assert (found.pixels == eight(stored, bits)).all()
    assert found.notes == (("reduced_to_8_bits",) if bits > 8 else ())


@pytest.mark.parametrize("bits", DEPTHS)
@pytest.mark.parametrize("meaning", [GREY, WHITE_IS_ZERO])
@pytest.mark.parametrize("tile", [None, (16, 16)], ids=["strips", "tiles"])
def test_grey_of_every_depth(bits: int, meaning: int, tile: tuple[int, int] | None) -> None:
    stored = values(bits, 1)
    wanted = eight(stored if meaning == GREY else 2**bits - 1 - stored, bits)
    found = picture(tiff(Sheet(stored, bits, meaning, tile=tile)))
    assert (found.pixels == grey(wanted)).all()
    assert found.grey


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("tile", [None, (16, 32)], ids=["strips", "tiles"])
@pytest.mark.parametrize(("planar", "predictor"), [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("big", [False, True], ids=["classic", "BigTIFF"])
@pytest.mark.parametrize("reversed_bits", [False, True])
def test_pieces_and_predictor(
    bits: int, tile: tuple[int, int] | None, planar: bool, predictor: bool, big: bool, reversed_bits: bool
) -> None:
    stored = values(bits, 3)
    sheet = Sheet(stored, bits, RGB, DEFLATE, planar, tile, predictor=predictor, reversed_bits=reversed_bits)
    for order in "<>":
        assert (pixels(tiff(sheet, order=order, big=big)) == eight(stored, bits)).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [1, 256, 257])
def test_palette_of_8_or_16_bits(bits: int, scale: int) -> None:
    colours = np.random.default_rng(3).integers(0, 256, (2**bits, 3))
    colours[0] = 255
    stored = values(bits, 1)
    data = tiff(Sheet(stored, bits, PALETTE, tags={320: (colours.T * scale).ravel().tolist()}))
    assert (pixels(data) == colours[stored[:, :, 0]]).all()
    with pytest.raises(Truncated, match="palette"):
        picture(tiff(Sheet(stored, bits, PALETTE, tags={320: [1, 2, 3]})))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("extra", [[], [0]], ids=["4", "5"])
def test_cmyk_with_and_without_a_further_channel(bits: int, planar: bool, extra: list[int]) -> None:
    ink = values(bits, 4 + len(extra))
    wanted = Image.frombytes("CMYK", SIZE, eight(ink[:, :, :4], bits).tobytes()).convert("RGB")
    found = pixels(tiff(Sheet(ink, bits, CMYK, planar=planar, tags={338: extra} if extra else {})))
    assert (found == np.array(wanted)).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("meaning", "colours"), [(GREY, 1), (RGB, 3)])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(
    ("extra", "alpha"), [([2], 0), ([1], 0), (None, 0), ([0], None), ([0, 2], 1), ([2, 0], 0), ([999], 0)], ids=str
)
def test_transparency(bits: int, meaning: int, colours: int, planar: bool, extra: list[int] | None, alpha: int | None) -> None:
    most = 2**bits - 1
    stored = values(bits, colours + len(extra or [2]))
    wanted = eight(stored[:, :, :colours], bits)
    if extra == [1]:
        stored[:, :, :colours] = np.minimum(stored[:, :, :colours], stored[:, :, colours:])
        opacity = np.maximum(stored[:, :, colours:].astype(np.int64), 1)
        wanted = ((stored[:, :, :colours].astype(np.int64) * 255 + opacity // 2) // opacity).astype(np.uint8)
    wanted = grey(wanted) if colours == 1 else wanted
    if alpha is not None:
        wanted = np.dstack([wanted, np.round(stored[:, :, colours + alpha] / most * 255).astype(np.uint8)])
    data = tiff(Sheet(stored, bits, meaning, planar=planar, tags={338: extra} if extra is not None else {}))
    assert (pixels(data) == wanted).all()


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "zstd", "lzma"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_compressions_that_keep_all_bits(compression: str, mode: str) -> None:
    image = Image.fromarray(scene(channels=4)).convert(mode)
    found = pixels(save("tiff", image, compression=compression))
    assert (found == np.array(image.convert("RGB" if mode == "L" else mode))).all()


@pytest.mark.parametrize("compression", ["tiff_ccitt", "group3", "group4"])
@pytest.mark.parametrize("inverted", [False, True])
def test_fax(compression: str, inverted: bool) -> None:
    image = Image.fromarray(scene()).convert("1")
    found = pixels(save("tiff", image, compression=compression, tiffinfo={262: 0 if inverted else 1}))
    assert (found == np.array(image.convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
def test_jpeg_in_tiff(mode: str) -> None:
    image = Image.fromarray(scene()).convert(mode)
    assert difference(pixels(save("tiff", image, compression="jpeg", quality=95)), np.array(image.convert("RGB"))) < 3


def test_strips_without_lengths_and_of_any_height() -> None:
    stored = values(8, 3)
    for tags in ({279: None}, {278: None}, {278: [2**16 - 1]}):
        sheet = Sheet(stored, rows=SIZE[1] if 278 in tags else 3, tags=tags)
        assert (pixels(tiff(sheet)) == stored).all()


def test_profile_and_orientation() -> None:
    stored = values(8, 3)
    data = tiff(Sheet(stored, tags={274: [6], 34675: SWAPPED}))
    assert codec.probe(data, max_pixels=1000).icc == SWAPPED
    assert difference(pixels(data), np.rot90(stored, -1)[:, :, [1, 0, 2]]) < 1
    xmp = b'<x:xmpmeta tiff:Orientation="3"/>'
    assert (pixels(tiff(Sheet(stored, tags={700: xmp}))) == stored[::-1, ::-1]).all()
    assert (pixels(tiff(Sheet(stored, tags={700: xmp, 274: [1]}))) == stored).all()


# --- which page ---

FULL, OTHER = values(8, 3, (40, 24)), values(8, 3, (24, 40))
SMALL = FULL[::4, ::4]
THUMBNAIL = Sheet(SMALL, tags={254: [1]})


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (tiff(THUMBNAIL, Sheet(FULL)), True),
        (tiff(Sheet(SMALL, tags={255: [2]}), Sheet(FULL)), True),
        (tiff(Sheet(OTHER, tags={254: [4]}), Sheet(FULL)), True),
        (tiff(Sheet(SMALL), Sheet(FULL)), True),
        (tiff(Sheet(FULL[:13:4, ::4]), THUMBNAIL, Sheet(OTHER), Sheet(FULL[:13])), None),
        (tiff(THUMBNAIL, below=(Sheet(FULL),)), True),
        (tiff(THUMBNAIL, below=(Sheet(FULL[::2, ::2], tags={254: [1]}), Sheet(FULL)), order=">", big=True), True),
        (tiff(Sheet(FULL), THUMBNAIL), False),
        (tiff(Sheet(FULL), below=(THUMBNAIL,)), False),
        (tiff(Sheet(FULL), Sheet(255 - FULL)), False),
        (tiff(Sheet(FULL), Sheet(np.kron(OTHER, np.ones((3, 3, 1), np.uint8)))), False),  # other proportions: another picture
    ],
    ids=[
        "marked", "marked-as-of-old", "mask", "unmarked", "unmarked-among-others", "sub-page", "two-sub-pages", "last",
        "thumbnail-below", "pages", "other",
    ],
)  # fmt: skip
def test_the_full_page_is_read(data: bytes, note: bool | None) -> None:
    found = picture(data)
    assert (found.pixels == (FULL[:13] if note is None else FULL)).all()
    assert found.notes == (() if note is False else ("thumbnail_skipped",))


def test_a_lone_thumbnail_is_read() -> None:
    assert (pixels(tiff(THUMBNAIL)) == SMALL).all()


def test_pages_in_a_circle_end() -> None:
    data = bytearray(tiff(Sheet(FULL)))
    data[-4:] = data[4:8]
    assert (pixels(bytes(data)) == FULL).all()


def test_sub_pages_in_a_circle_end() -> None:
    data = bytearray(tiff(Sheet(FULL, tags={330: [0] * 3})))
    place = data.rindex(struct.pack("<HHI", 330, 4, 3)) + 8
    (values_at,) = struct.unpack_from("<I", data, place)
    struct.pack_into("<3I", data, values_at, *[int.from_bytes(data[4:8], "little")] * 3)
    assert (pixels(bytes(data)) == FULL).all()


def test_sub_page_takes_profile_and_orientation_from_its_page() -> None:
    found = picture(tiff(replace(THUMBNAIL, tags={254: [1], 274: [3], 34675: SWAPPED}), below=(Sheet(FULL),)), icc="keep")
    assert (found.pixels == FULL[::-1, ::-1]).all()
    assert found.icc == SWAPPED


# --- what is refused ---

EXTRA = {338: [2]}
REFUSED: dict[str, tuple[Sheet, str]] = {
    "float": (Sheet(values(16, 3), 16, tags={258: [32] * 3, 339: [3] * 3}), "32-bit floating-point samples"),
    "half": (Sheet(values(16, 3), 16, tags={339: [3] * 3}), "16-bit floating-point samples"),
    "signed": (Sheet(values(16, 1), 16, GREY, tags={339: [2]}), "16-bit signed samples"),
    "complex": (Sheet(values(16, 1), 16, GREY, tags={339: [6]}), "16-bit complex samples"),
    "32 bits": (Sheet(values(16, 1), 16, GREY, tags={258: [32]}), "32-bit samples"),
    "3 bits": (Sheet(values(8, 1), 8, GREY, tags={258: [3]}), "3-bit samples"),
    "565": (Sheet(values(8, 3), 8, tags={258: [5, 6, 5]}), "samples of 5 and 6 bits"),
    "CMYK with alpha": (Sheet(values(8, 5), 8, CMYK, tags=EXTRA), "CMYK colours and transparency"),
    "premultiplied CMYK": (Sheet(values(8, 5), 8, CMYK, tags={338: [1]}), "CMYK colours and transparency"),
    "inks": (Sheet(values(8, 4), 8, CMYK, tags={332: [2]}), "inks other than CMYK"),
    "inverted with alpha": (Sheet(values(8, 2), 8, WHITE_IS_ZERO, tags=EXTRA), "inverted grey levels and transparency"),
    "mask": (Sheet(values(1, 1), 1, 4), "a transparency mask"),
    "YCbCr": (Sheet(values(8, 3), 8, 6), "YCbCr colours in this layout"),
    "Lab": (Sheet(values(8, 3), 8, 8), "Lab colours"),
    "ICC Lab": (Sheet(values(8, 3), 8, 9), "ICC Lab colours"),
    "raw": (Sheet(values(16, 1), 16, 32803), "the raw data of a camera"),
    "LogLuv": (Sheet(values(16, 3), 16, 32845), "LogLuv light levels"),
    "unknown colours": (Sheet(values(8, 3), 8, 77), "colours of kind 77 (photometric interpretation)"),
    "no statement": (Sheet(values(8, 3), tags={262: None}), "no photometric interpretation, which says what samples mean"),
    "palette of 16 bits": (Sheet(values(16, 1), 16, PALETTE), "a palette in this layout"),
    "many samples": (Sheet(values(8, 7), 8, RGB, tags={338: [0] * 4}), "7 samples per pixel"),
    "few samples": (Sheet(values(8, 2), 8, RGB), "2 samples per pixel"),
    "old JPEG": (Sheet(values(8, 3), tags={259: [6]}), "old-style JPEG compression"),
    "JPEG 2000": (Sheet(values(8, 3), tags={259: [34712]}), "JPEG 2000 compression"),
    "unknown compression": (Sheet(values(8, 3), tags={259: [999]}), "compression 999"),
    "grey fax": (Sheet(values(8, 1), 8, GREY, tags={259: [4]}), "fax compression of grey or colour"),
    "deep JPEG": (Sheet(values(12, 1), 12, GREY, tags={259: [7]}), "12-bit JPEG compression"),
    "predictor of floats": (Sheet(values(8, 3), tags={317: [3]}), "predictor 3 for 8-bit samples"),
    "predictor of 4 bits": (Sheet(values(4, 1), 4, GREY, tags={317: [2]}), "predictor 2 for 4-bit samples"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_layouts_are_refused_with_what_they_are(kind: str) -> None:
    sheet, reason = REFUSED[kind]
    with pytest.raises(UnsupportedFormat) as caught:
        codec.probe(tiff(sheet), max_pixels=1000)
    assert caught.value.message.startswith(f"TIFF files with {reason}")
    assert caught.value.message.endswith("are not supported")


@pytest.mark.parametrize("tags", [{258: bytes(8)}, {259: [1] * 200_000}], ids=["type", "number"])
def test_odd_tags_are_refused(tags: Mapping[int, Any]) -> None:
    data = bytearray(tiff(Sheet(values(8, 3), tags=tags)))
    at = data.rindex(struct.pack("<H", next(iter(tags))))
    if 258 in tags:
        data[at + 2 : at + 4] = struct.pack("<H", 11)  # FLOAT
    with pytest.raises(NotAnImage, match=r"of type 11|200,000 values"):
        codec.probe(bytes(data), max_pixels=1000)


# --- what is cut off ---


@pytest.mark.parametrize("compression", [NONE, DEFLATE, PACKBITS])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_missing_rows_are_truncated(compression: int, tile: tuple[int, int] | None) -> None:
    data = bytearray(tiff(Sheet(values(8, 3), compression=compression, tile=tile)))
    whole = pixels(bytes(data))
    table = int.from_bytes(data[4:8], "little")
    offsets = data.index(struct.pack("<HH", 324 if tile else 273, 4), table)
    (count, place) = struct.unpack_from("<II", data, offsets + 4)
    last = place + 4 * (count - 1)
    struct.pack_into("<I", data, last, len(data) - 5)
    with pytest.raises(Truncated):
        picture(bytes(data))
    struct.pack_into("<I", data, last, 2**31)
    with pytest.raises(Truncated, match="strips or tiles are missing"):
        picture(bytes(data))
    assert whole.shape == (*SIZE[::-1], 3)


def test_few_strips_are_truncated() -> None:
    with pytest.raises(Truncated, match="strips or tiles are missing"):
        picture(tiff(Sheet(values(8, 3), tags={257: [SIZE[1] + 6]})))
