"""PNG: lossless for every reader, and errors for damaged files."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from imagemill.shared.errors import NotAnImage, Truncated
from imagemill.worker.imaging import png, png_reading
from imagemill.worker.imaging.facts import Facts
from tests.unit.worker.imaging.samples import png_by_hand, png_chunk

GREY, RGB, PALETTE = 0, 2, 3


def read(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.load()
    return np.array(image)


SMALL = png_by_hand(1, 1, 8, GREY, b"\0\x80")


@st.composite
def pictures(draw: st.DrawFn) -> np.ndarray:
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.sampled_from([3, 4])))
    # Few levels, so that alpha is often 0 and 255.
    levels = np.array([0, *draw(st.lists(st.integers(0, 255), min_size=1, max_size=6))], np.uint8)
    return np.random.default_rng(draw(st.integers(0, 2**32))).choice(levels, shape)


@settings(max_examples=100, deadline=None)
@given(pictures())
def test_encode_is_lossless_and_clears_hidden_pixels(pixels: np.ndarray) -> None:
    before = pixels.copy()
    got = read(png.encode(pixels))
    assert (pixels == before).all()
    if pixels.shape[2] == 3:
        assert (got == pixels).all()
        return
    seen = pixels[:, :, 3] > 0
    assert (got[seen] == pixels[seen]).all()
    assert (got[~seen] == 0).all()


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 777), (777, 1), (300_000, 3), (3, 100_000), (701, 603)])
def test_encode_handles_every_shape(size: tuple[int, int], channels: int) -> None:
    # Some pictures, and the rows of one, exceed the stripe that is compressed at once.
    pixels = np.random.default_rng(4).integers(1, 256, (size[1], size[0], channels), np.uint8)
    data = png.encode(pixels)
    assert (read(data) == pixels).all()
    assert png_reading.read_header(data) == Facts(size)


def test_encode_handles_non_contiguous_array() -> None:
    whole = np.random.default_rng(5).integers(1, 256, (50, 60, 4), np.uint8)
    assert (read(png.encode(whole[3:40:2, 5:50])) == whole[3:40:2, 5:50]).all()
    assert (read(png.encode(whole[:, :, :3])) == whole[:, :, :3]).all()


def test_encode_writes_valid_chunks() -> None:
    data = png.encode(np.random.default_rng(6).integers(0, 256, (600, 700, 4), np.uint8), b"profile")
    kinds, pixels = [], b""
    for kind, start, end in png.chunks(data):
        assert struct.unpack_from(">I", data, end) == (zlib.crc32(data[start - 4 : end]),)
        kinds.append(kind)
        pixels += data[start:end] if kind == b"IDAT" else b""
    assert kinds[:2] == [b"IHDR", b"iCCP"]
    assert kinds[-1] == b"IEND"
    assert set(kinds[2:-1]) == {b"IDAT"}
    assert end + 4 == len(data)
    assert len(zlib.decompress(pixels)) == 600 * (1 + 700 * 4)  # zlib verifies the checksum


def test_encode_compresses_smooth_and_flat_pictures() -> None:
    y, x = np.mgrid[:256, :256]
    smooth = np.dstack([x, y, (x + y) // 2]).astype(np.uint8)
    assert len(png.encode(smooth)) < smooth.nbytes // 20
    assert len(png.encode(np.full((1000, 1000, 3), 77, np.uint8))) < 20_000


def test_encode_embeds_profile() -> None:
    profile = np.random.default_rng(7).bytes(5000)
    data = png.encode(np.zeros((2, 2, 3), np.uint8), profile)
    assert png_reading.read_header(data).icc == profile
    assert Image.open(io.BytesIO(data)).info["icc_profile"] == profile


# --- reading ---


def test_read_header_returns_size_exif_and_profile() -> None:
    profile, exif = b"p" * 300, b"MM\0*anything"
    data = png_by_hand(
        1, 1, 8, GREY, b"\0\x80", png_chunk(b"iCCP", b"name\0\0" + zlib.compress(profile)), png_chunk(b"eXIf", exif)
    )
    assert png_reading.read_header(data) == Facts((1, 1), exif, icc=profile)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"name without end",
        b"name\0\0not deflated",
        b"name\0\0" + zlib.compress(b"p" * 999)[:-6],
        b"name\0\0" + zlib.compress(bytes(png.MAX_PROFILE + 1)),
    ],
    ids=["empty", "nothing", "no-deflate", "cut", "too-large"],
)
def test_read_header_ignores_bad_profile(payload: bytes) -> None:
    data = png_by_hand(1, 1, 8, GREY, b"\0\x80", png_chunk(b"iCCP", payload))
    assert png_reading.read_header(data) == Facts((1, 1))
    assert read(png.checked(data)[0]).tolist() == [[0x80]]


def test_read_header_inflates_huge_profile_in_little_memory() -> None:
    data = png_by_hand(1, 1, 8, GREY, b"\0\x80", png_chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(60_000_000), 1)))
    tracemalloc.start()
    try:
        assert png_reading.read_header(data).icc is None
        assert tracemalloc.get_traced_memory()[1] < 4 * png.MAX_PROFILE
    finally:
        tracemalloc.stop()


@settings(deadline=None)
@given(st.integers(0, len(SMALL) - 17))  # before the checksum of the pixels
def test_chunks_raises_truncated_on_cut_file(length: int) -> None:
    with pytest.raises(Truncated):
        list(png.chunks(SMALL[:length]))


def test_checked_ignores_data_after_end() -> None:
    assert png.checked(SMALL + b"anything")[0] == SMALL


@pytest.mark.parametrize(
    "data",
    [
        png.SIGNATURE + SMALL[33:],  # no header
        png.SIGNATURE + png_chunk(b"tEXt", b"a\0b") + SMALL[8:],  # not first
        SMALL[:33] + SMALL[8:],  # twice
        png.SIGNATURE + png_chunk(b"IHDR", SMALL[16:28]) + SMALL[33:],  # too short
    ],
)
def test_read_header_requires_one_complete_header_first(data: bytes) -> None:
    with pytest.raises(Truncated, match="header"):
        png_reading.read_header(data)


def test_number_of_chunks_is_limited() -> None:
    text = png_chunk(b"tEXt", b"a\0b")
    assert png_reading.read_header(SMALL[:33] + text * (png.MAX_CHUNKS - 3) + SMALL[33:]).size == (1, 1)
    with pytest.raises(NotAnImage, match="100,000 chunks"):
        png_reading.read_header(SMALL[:33] + text * (png.MAX_CHUNKS - 2) + SMALL[33:])


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"])
def test_checked_detects_wrong_checksum_in_pixel_chunk(kind: bytes) -> None:
    data = png_by_hand(1, 1, 8, PALETTE, b"\0\0", png_chunk(b"PLTE", b"abc"), png_chunk(b"tRNS", b"x"))
    start, end = next((start, end) for found, start, end in png.chunks(data) if found == kind)
    flipped = bytearray(data)
    flipped[end if kind == b"IEND" else start] ^= 1
    with pytest.raises(Truncated, match=kind.decode()):
        png.checked(bytes(flipped))


def test_checked_drops_other_chunks_even_if_broken() -> None:
    broken = bytearray(png_chunk(b"zTXt", b"key\0\0" + zlib.compress(b"text")))
    broken[-1] ^= 255
    data = SMALL[:33] + bytes(broken) + png_chunk(b"acTL", bytes(8)) + png_chunk(b"fcTL", b"?") + SMALL[33:]
    assert png.checked(data) == (SMALL, None)


# --- transparent colour ---


@pytest.mark.parametrize(
    ("depth", "samples", "key", "wanted"),
    [
        (1, [0b01000000], 1, [255, 0]),
        (2, [0b10110000], 3, [255, 0]),
        (4, [0x5F], 5, [0, 255]),
        (8, [100, 101], 101, [255, 0]),
        (16, [1, 200, 1, 201], 0x01C9, [255, 0]),  # differs in its lower byte only
    ],
)
def test_colour_key_matches_grey_at_every_depth(depth: int, samples: list[int], key: int, wanted: list[int]) -> None:
    data = png_by_hand(2, 1, depth, GREY, bytes([0, *samples]), png_chunk(b"tRNS", struct.pack(">H", key)))
    pixels, found = png.checked(data)
    assert found is not None
    grey = read(pixels)
    grey = grey.astype(np.uint16) if depth == 16 else grey.astype(np.uint8) * np.uint8(255 if depth == 1 else 1)
    assert png.colour_key(grey, found, depth).tolist() == [wanted]


@pytest.mark.parametrize("depth", [8, 16])
def test_colour_key_must_match_all_channels(depth: int) -> None:
    pixels = np.array([[[10, 20, 30], [10, 20, 31], [10, 20, 30]]], np.uint16 if depth == 16 else np.uint8)
    key = struct.pack(">HHH", 10, 20, 30)
    assert png.colour_key(pixels, key, depth).tolist() == [[0, 255, 0]]


def test_checked_keeps_palette_transparency() -> None:
    data = png_by_hand(1, 1, 8, PALETTE, b"\0\0", png_chunk(b"PLTE", b"abc"), png_chunk(b"tRNS", b"x"))
    assert png.checked(data) == (data, None)


def test_colour_key_raises_truncated_on_short_key() -> None:
    with pytest.raises(Truncated, match="tRNS"):
        png.colour_key(np.zeros((1, 1, 3), np.uint8), b"\0\1\0\1", 8)


def test_checked_accepts_other_text_and_filters() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "a" * 2000, zip=True)
    pixels = np.random.default_rng(8).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=text, optimize=True)
    assert (read(png.checked(file.getvalue())[0]) == pixels).all()


def test_encode_keeps_hidden_colour_unless_cleared() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    pixels[::2, :, 3] = 0
    with Image.open(io.BytesIO(png.encode(pixels, clear=False))) as image:
        assert np.array_equal(np.array(image), pixels)
    with Image.open(io.BytesIO(png.encode(pixels))) as image:
        assert not np.array(image)[::2].any()
