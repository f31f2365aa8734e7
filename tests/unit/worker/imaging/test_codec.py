"""Decoding: correct colours and orientation or an error, never part of a picture."""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imagemill.shared.errors import NotAnImage, OperationFailed, OutOfMemory, TooManyPixels, Truncated, UnsupportedFormat
from imagemill.worker.imaging import codec
from imagemill.worker.imaging.codec import encode
from tests.unit.worker.imaging.samples import (
    FRAMES,
    LOSSLESS,
    SRGB,
    SWAPPED,
    difference,
    exif,
    picture,
    pixels,
    png_by_hand,
    png_chunk,
    save,
    scene,
)

# Pillow warns about TIFF tags beyond the end of a file; tests that cut and damage files check for the error instead.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")

STILLS = {
    "png": save("png", scene()),
    "png-palette": save("png", Image.fromarray(scene()).quantize(32)),
    "jpeg": save("jpeg", scene()),
    "jpeg-progressive": save("jpeg", scene(), progressive=True),
    "jpeg-cmyk": save("jpeg", Image.fromarray(scene()).convert("CMYK")),
    "jpeg-grey": save("jpeg", Image.fromarray(scene()).convert("L")),
    "webp": save("webp", scene()),
    "webp-lossless": save("webp", scene(channels=4), lossless=True),
    "webp-alpha": save("webp", scene(channels=4)),
    "gif": save("gif", scene()),
    "bmp": save("bmp", scene()),
    "bmp-palette": save("bmp", Image.fromarray(scene()).quantize(32)),
    "avif": save("avif", scene()),
    "avif-alpha": save("avif", scene(channels=4)),
    "tiff": save("tiff", scene()),
    "tiff-lzw": save("tiff", scene(), compression="tiff_lzw"),
    "tiff-deflate": save("tiff", scene(), compression="tiff_adobe_deflate"),
    "tiff-jpeg": save("tiff", scene(), compression="jpeg"),
    "tiff-fax": save("tiff", Image.fromarray(scene()).convert("1"), compression="group4"),
}
ANIMATIONS = {kind: save(kind, scene(), **FRAMES) for kind in ("gif", "webp", "png", "tiff", "avif")}


# --- kinds of pixels ---


@pytest.mark.parametrize(
    ("kind", "channels"), [(kind, channels) for kind in LOSSLESS for channels in (3, 4) if (kind, channels) != ("bmp", 4)]
)
def test_decode_keeps_pixels_and_alpha(kind: str, channels: int) -> None:
    wanted = scene(channels=channels)
    found = picture(save(kind, wanted, **LOSSLESS[kind]))
    assert difference(found.pixels, wanted) < (1.5 if kind == "avif" else 1e-9)
    assert (found.format, found.icc, found.full_size) == (kind, None, (64, 48))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "I;16"])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_decode_converts_grey_palette_bilevel_and_16_bit_to_rgb(kind: str, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(scene()[:, :, 0].astype(np.uint16) * 257)
        wanted = np.repeat(scene()[:, :, :1], 3, axis=2)
    else:
        image = Image.fromarray(scene()).convert(mode)
        wanted = np.array(image.convert("RGBA" if mode == "LA" else "RGB"))
    assert (pixels(save(kind, image)) == wanted).all()


@pytest.mark.parametrize(("channels", "colour"), [(1, 0), (2, 4), (3, 2), (4, 6)])
@pytest.mark.parametrize("interlaced", [False, True])
def test_decode_rounds_16_bit_png(channels: int, colour: int, interlaced: bool) -> None:
    wide = np.random.default_rng(1).integers(0, 65536, (5, 9, channels), np.uint16)
    wide[0, :6] = np.array([0, 128, 129, 65_535 - 129, 65_535 - 128, 65_535])[:, None]
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [wide[y::down, x::across] for y, x, down, across in passes] if interlaced else [wide]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for part in parts if part.size for row in part)
    found = picture(png_by_hand(9, 5, 16, colour, rows, interlaced=interlaced))
    wanted = np.round(wide / 257).astype(np.uint8)
    if channels < 3:
        wanted = np.dstack([np.repeat(wanted[:, :, :1], 3, axis=2), wanted[:, :, 1:]])
    assert (found.pixels == wanted).all()
    assert found.notes == ("reduced_to_8_bits",)


@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
@pytest.mark.parametrize("edge", [None, 32, 25])
def test_decode_converts_cmyk_at_any_size(kind: str, edge: int | None) -> None:
    image = Image.fromarray(scene()).convert("CMYK")  # Pillow's conversion uses no black
    got = pixels(save(kind, image, **({"quality": 95} if kind == "jpeg" else {})), edge=edge)
    wanted = np.array(Image.fromarray(scene()).resize((got.shape[1], got.shape[0]), Image.Resampling.BOX))
    assert difference(got, wanted) < 3


def test_decode_converts_palette_with_transparency_to_rgba() -> None:
    image = Image.fromarray(scene()).quantize(8)
    alphas = bytes([0, 50, 100, 150, 200, 255])
    got = pixels(save("png", image, transparency=alphas))
    assert (got[:, :, :3] == np.array(image.convert("RGB"))).all()
    assert (got[:, :, 3] == np.frombuffer(alphas.ljust(8, b"\xff"), np.uint8)[np.array(image)]).all()
    single = pixels(save("gif", image, transparency=3))
    assert ((single[:, :, 3] == 0) == (np.array(image) == 3)).all()


@pytest.mark.parametrize(
    ("depth", "colour", "rows", "key", "wanted"),
    [
        (8, 2, b"\0\1\2\3\1\2\4", b"\0\1\0\2\0\3", [[1, 2, 3, 0], [1, 2, 4, 255]]),
        (16, 2, b"\0\1\0\2\0\3\0\1\0\2\0\3\1", b"\1\0\2\0\3\0", [[1, 2, 3, 0], [1, 2, 3, 255]]),
        (8, 0, b"\0\x10\x11", b"\0\x11", [[16, 16, 16, 255], [17, 17, 17, 0]]),
        (16, 0, b"\0\x10\1\x10\2", b"\x10\2", [[16, 16, 16, 255], [16, 16, 16, 0]]),
        (4, 0, b"\0\x1f", b"\0\x0f", [[17, 17, 17, 255], [255, 255, 255, 0]]),
        (2, 0, b"\0\x70", b"\0\1", [[85, 85, 85, 0], [255, 255, 255, 255]]),
        (1, 0, b"\0\x40", b"\0\0", [[0, 0, 0, 0], [255, 255, 255, 255]]),
    ],
)
def test_decode_converts_transparent_colour_to_alpha(
    depth: int, colour: int, rows: bytes, key: bytes, wanted: list[list[int]]
) -> None:
    assert pixels(png_by_hand(2, 1, depth, colour, rows, png_chunk(b"tRNS", key))).tolist() == [wanted]


@pytest.mark.parametrize("kind", ANIMATIONS)
def test_decode_returns_first_frame(kind: str) -> None:
    assert difference(pixels(ANIMATIONS[kind]), scene()) < 6


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("edge", [None, 24])
def test_decode_returns_upright_picture(kind: str, orientation: int, edge: int | None) -> None:
    back = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE}
    back |= {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM}
    back[8] = Image.Transpose.ROTATE_270
    seen = Image.fromarray(scene())
    stored = seen.transpose(back[orientation]) if orientation > 1 else seen
    found = picture(save(kind, stored, exif=exif(orientation)), edge=edge)
    assert found.full_size == (64, 48)
    assert found.size == ((64, 48) if edge is None else (24, 18))
    assert difference(found.pixels, np.array(seen.resize(found.size, Image.Resampling.BOX))) < 6


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_orientation_in_xmp_counts_without_exif(kind: str) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    stated = {"png": {"pnginfo": text}, "tiff": {"tiffinfo": {700: xmp}}}.get(kind, {"xmp": xmp})
    assert difference(pixels(save(kind, scene(), **stated)), scene()[::-1, ::-1]) < 6


# --- profiles ---


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
def test_decode_converts_profile_or_keeps_it_for_encode(kind: str) -> None:
    data = save(kind, scene(), icc_profile=SWAPPED, **LOSSLESS.get(kind, {"quality": 95}))
    converted, kept = picture(data), picture(data, icc="keep")
    assert converted.icc is None
    assert difference(converted.pixels, scene()[:, :, [1, 0, 2]]) < 3
    assert kept.icc == SWAPPED
    assert difference(kept.pixels, scene()) < 3
    for format in ("png", "webp", "jpeg"):  # noqa: A001
        again = encode(kept, format=format, quality=95).data
        assert Image.open(io.BytesIO(again)).info["icc_profile"] == SWAPPED
        assert difference(pixels(again), converted.pixels) < 6
        assert codec.probe(encode(converted, format=format, quality=95).data, max_pixels=10_000).icc is None


def test_decode_converts_grey_and_cmyk_even_when_keeping_profiles() -> None:
    grey = picture(save("png", Image.fromarray(scene()).convert("L"), icc_profile=SWAPPED), icc="keep")
    assert grey.pixels.shape == (48, 64, 3)
    ink = picture(save("jpeg", Image.fromarray(scene()).convert("CMYK"), icc_profile=SWAPPED), icc="keep")
    assert ink.icc is None


# --- broken files ---


@pytest.mark.parametrize("kind", STILLS)
def test_decode_raises_truncated_on_cut_file_at_any_size(kind: str) -> None:
    data = STILLS[kind]
    for share in (0.3, 0.5, 0.75, 0.95):
        for edge in (None, 10):
            with pytest.raises(Truncated):
                picture(data[: int(len(data) * share)], edge=edge)


@pytest.mark.parametrize("kind", STILLS)
def test_decode_rejects_size_that_differs_from_header(kind: str) -> None:
    header = codec.probe(STILLS[kind], max_pixels=10_000)
    for size in ((64, 47), (65, 48), (32, 24)):
        with pytest.raises(Truncated, match="conflicting sizes"):
            codec.decode(STILLS[kind], replace(header, size=size))


@pytest.mark.parametrize("data", [*STILLS.values(), *ANIMATIONS.values()], ids=[*STILLS, *(f"{kind}-2" for kind in ANIMATIONS)])
@settings(max_examples=40, deadline=None)
@given(draw=st.data())
def test_decode_of_cut_file_fails_or_gives_all_pixels(data: bytes, draw: st.DataObject) -> None:
    length = draw.draw(st.integers(1, len(data) - 1))
    with suppress(Truncated, NotAnImage, UnsupportedFormat):
        assert (pixels(data[:length]) == pixels(data)).all()


@pytest.mark.parametrize("data", [*STILLS.values(), *ANIMATIONS.values()], ids=[*STILLS, *(f"{kind}-2" for kind in ANIMATIONS)])
@settings(max_examples=60, deadline=None)
@given(draw=st.data())
def test_decode_of_damaged_file_fails_cleanly_or_gives_right_size(data: bytes, draw: st.DataObject) -> None:
    places = st.integers(0, len(data) - 1) | st.integers(0, min(len(data), 300) - 1)  # more often within headers
    damaged = bytearray(data)
    for place, value in draw.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=6)):
        damaged[place] = value
    try:
        header = codec.probe(bytes(damaged), max_pixels=200_000)
        found = codec.decode(bytes(damaged), header)
    except (Truncated, NotAnImage, UnsupportedFormat, TooManyPixels):
        return
    assert found.size == header.size == found.full_size
    assert found.pixels.shape[2] in (3, 4)


def opencv_error(code: int) -> cv2.error:
    error = cv2.error("Something is wrong")
    error.code = code
    return error


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (MemoryError(), OutOfMemory),
        (opencv_error(cv2.Error.StsNoMem), OutOfMemory),
        (opencv_error(cv2.Error.StsBadArg), OperationFailed),
    ],
    ids=["numpy", "opencv-memory", "opencv-other"],
)
def test_decode_translates_opencv_and_memory_errors(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(cv2, "resize", fail)
    with pytest.raises(kind) as caught:
        picture(STILLS["png"], edge=10)
    assert caught.value.__cause__ is raised


# --- scaling ---


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 100), st.sampled_from(["jpeg", "png", "webp"]))
def test_decode_scales_to_fit_edge_exactly(width: int, height: int, edge: int, kind: str) -> None:
    found = picture(save(kind, scene(width, height)), edge=edge)
    assert found.size == codec.fit((width, height), edge)
    assert found.full_size == (width, height)


@pytest.mark.parametrize("edge", [1000, 700, 511, 400, 250, 160, 100, 64])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_decode_of_reduced_jpeg_matches_scaled_original(edge: int, subsampling: int) -> None:
    y, x = np.mgrid[:750, :1000]
    busy = (127 + 100 * np.sin(x * x / 40_000 + y / 30))[:, :, None] * [1.0, 0.8, 0.6] + scene(1000, 750) // 5
    data = save("jpeg", np.clip(busy, 0, 255).astype(np.uint8), quality=92, subsampling=subsampling)
    found = pixels(data, edge=edge)
    whole = Image.fromarray(pixels(data)).resize((edge, edge * 3 // 4), Image.Resampling.BOX)
    assert difference(found[: edge * 3 // 4], np.array(whole)[: len(found)]) < 2.5


# --- pictures identical to their file ---

GREY = Image.fromarray(scene()).convert("L")
TURNED = Image.Exif()
TURNED[0x0112] = 3


@pytest.mark.parametrize(
    ("data", "options", "as_stored"),
    [
        (save("png", scene()), {}, True),
        (save("png", scene(channels=4)), {}, True),
        (save("jpeg", scene()), {}, True),
        (save("webp", scene(channels=4)), {}, True),
        (save("jpeg", GREY), {}, True),
        (save("jpeg", scene(), icc_profile=SRGB), {}, True),
        (save("jpeg", scene(), icc_profile=SWAPPED), {"icc": "keep"}, True),
        (save("jpeg", scene(), icc_profile=SWAPPED), {}, False),
        (save("jpeg", scene(), exif=TURNED), {}, False),
        (save("jpeg", scene()), {"edge": 32}, False),
        (save("jpeg", Image.fromarray(scene()).convert("CMYK")), {}, False),
        (save("png", scene(), **FRAMES), {}, False),
        (save("webp", scene(), **FRAMES), {}, False),
        (save("gif", scene()), {}, False),
        (save("bmp", scene()), {}, False),
    ],
    ids=[
        "png", "rgba png", "jpeg", "rgba webp", "grey jpeg", "srgb", "kept profile", "converted", "turned", "scaled", "cmyk",
        "animated png", "animated webp", "gif", "bmp",
    ],
)  # fmt: skip
def test_decode_sets_as_stored(data: bytes, options: dict[str, Any], as_stored: bool) -> None:
    assert picture(data, **options).as_stored == as_stored
