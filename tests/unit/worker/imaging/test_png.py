"""PNG: what goes in comes out again, whoever reads it; and what is damaged is said to be."""

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
from imagemill.worker.imaging import png

GREY, RGB, PALETTE = 0, 2, 3


def read(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.load()
    return np.array(image)


def chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def by_hand(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG of unfiltered `rows`, with further chunks before its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"".join([png.SIGNATURE, header, *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


SMALL = by_hand(1, 1, 8, GREY, b"\0\x80")


@st.composite
def pictures(draw: st.DrawFn) -> np.ndarray:
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.sampled_from([3, 4])))
    # Few levels, so that alpha is often 0 and 255.
    levels = np.array([0, *draw(st.lists(st.integers(0, 255), min_size=1, max_size=6))], np.uint8)
    return np.random.default_rng(draw(st.integers(0, 2**32))).choice(levels, shape)


@settings(max_examples=100, deadline=None)
@given(pictures())
def test_all_that_is_seen_comes_back_bit_for_bit_and_the_hidden_is_cleared(pixels: np.ndarray) -> None:
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
def test_every_shape_comes_back(size: tuple[int, int], channels: int) -> None:
    # Some are larger than the stripe that is packed at a time, one has rows that are.
    pixels = np.random.default_rng(4).integers(1, 256, (size[1], size[0], channels), np.uint8)
    data = png.encode(pixels)
    assert (read(data) == pixels).all()
    assert png.read_header(data) == (size, None, None)


def test_a_part_of_a_larger_array_is_written_as_it_looks() -> None:
    whole = np.random.default_rng(5).integers(1, 256, (50, 60, 4), np.uint8)
    assert (read(png.encode(whole[3:40:2, 5:50])) == whole[3:40:2, 5:50]).all()
    assert (read(png.encode(whole[:, :, :3])) == whole[:, :, :3]).all()


def test_files_are_correct_to_the_byte() -> None:
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
    assert len(zlib.decompress(pixels)) == 600 * (1 + 700 * 4)  # zlib verifies the check sum


def test_a_smooth_picture_gets_small_and_a_flat_one_tiny() -> None:
    y, x = np.mgrid[:256, :256]
    smooth = np.dstack([x, y, (x + y) // 2]).astype(np.uint8)
    assert len(png.encode(smooth)) < smooth.nbytes // 20
    assert len(png.encode(np.full((1000, 1000, 3), 77, np.uint8))) < 20_000


def test_a_profile_is_embedded_and_found_again() -> None:
    profile = np.random.default_rng(7).bytes(5000)
    data = png.encode(np.zeros((2, 2, 3), np.uint8), profile)
    assert png.read_header(data)[2] == profile
    assert Image.open(io.BytesIO(data)).info["icc_profile"] == profile


# --- reading ---


def test_the_header_has_size_exif_and_profile() -> None:
    profile, exif = b"p" * 300, b"MM\0*anything"
    data = by_hand(1, 1, 8, GREY, b"\0\x80", chunk(b"iCCP", b"name\0\0" + zlib.compress(profile)), chunk(b"eXIf", exif))
    assert png.read_header(data) == ((1, 1), exif, profile)


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
def test_a_bad_profile_is_left_out_and_never_fails_the_image(payload: bytes) -> None:
    data = by_hand(1, 1, 8, GREY, b"\0\x80", chunk(b"iCCP", payload))
    assert png.read_header(data) == ((1, 1), None, None)
    assert read(png.checked(data)[0]).tolist() == [[0x80]]


def test_a_profile_that_unpacks_to_much_takes_little_memory() -> None:
    data = by_hand(1, 1, 8, GREY, b"\0\x80", chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(60_000_000), 1)))
    tracemalloc.start()
    try:
        assert png.read_header(data)[2] is None
        assert tracemalloc.get_traced_memory()[1] < 4 * png.MAX_PROFILE
    finally:
        tracemalloc.stop()


@settings(deadline=None)
@given(st.integers(0, len(SMALL) - 1))
def test_a_file_without_its_end_is_truncated(length: int) -> None:
    with pytest.raises(Truncated):
        list(png.chunks(SMALL[:length]))


def test_what_follows_the_end_doesnt_matter() -> None:
    assert png.checked(SMALL + b"anything")[0] == SMALL


@pytest.mark.parametrize(
    "data",
    [
        png.SIGNATURE + SMALL[33:],  # no header
        png.SIGNATURE + chunk(b"tEXt", b"a\0b") + SMALL[8:],  # not first
        SMALL[:33] + SMALL[8:],  # twice
        png.SIGNATURE + chunk(b"IHDR", SMALL[16:28]) + SMALL[33:],  # too short
    ],
)
def test_the_header_comes_first_once_and_whole(data: bytes) -> None:
    with pytest.raises(Truncated, match="header"):
        png.read_header(data)


def test_chunks_without_end_are_refused() -> None:
    text = chunk(b"tEXt", b"a\0b")
    assert png.read_header(SMALL[:33] + text * (png.MAX_CHUNKS - 3) + SMALL[33:])[0] == (1, 1)
    with pytest.raises(NotAnImage, match="100,000 chunks"):
        png.read_header(SMALL[:33] + text * (png.MAX_CHUNKS - 2) + SMALL[33:])


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"])
def test_a_wrong_check_sum_where_the_pixels_are_is_damage(kind: bytes) -> None:
    data = by_hand(1, 1, 8, PALETTE, b"\0\0", chunk(b"PLTE", b"abc"), chunk(b"tRNS", b"x"))
    start, end = next((start, end) for found, start, end in png.chunks(data) if found == kind)
    flipped = bytearray(data)
    flipped[end if kind == b"IEND" else start] ^= 1
    with pytest.raises(Truncated, match=kind.decode()):
        png.checked(bytes(flipped))


def test_what_isnt_pixels_doesnt_reach_the_decoder_broken_or_not() -> None:
    broken = bytearray(chunk(b"zTXt", b"key\0\0" + zlib.compress(b"text")))
    broken[-1] ^= 255
    data = SMALL[:33] + bytes(broken) + chunk(b"acTL", bytes(8)) + chunk(b"fcTL", b"?") + SMALL[33:]
    assert png.checked(data) == (SMALL, None)


# --- the colour that stands for nothing ---


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
def test_a_grey_that_is_transparent_is_found_at_every_depth(
    depth: int, samples: list[int], key: int, wanted: list[int]
) -> None:
    data = by_hand(2, 1, depth, GREY, bytes([0, *samples]), chunk(b"tRNS", struct.pack(">H", key)))
    pixels, found = png.checked(data)
    assert found is not None
    grey = read(pixels)
    grey = grey.astype(np.uint16) if depth == 16 else grey.astype(np.uint8) * np.uint8(255 if depth == 1 else 1)
    assert png.colour_key(grey, found, depth).tolist() == [wanted]


@pytest.mark.parametrize("depth", [8, 16])
def test_a_colour_that_is_transparent_must_match_in_all_channels(depth: int) -> None:
    pixels = np.array([[[10, 20, 30], [10, 20, 31], [10, 20, 30]]], np.uint8)
    key = struct.pack(">HHH", *((level << 8 | 7 if depth == 16 else level) for level in (10, 20, 30)))
    assert png.colour_key(pixels, key, depth).tolist() == [[0, 255, 0]]


def test_a_palettes_transparency_is_left_to_the_decoder() -> None:
    data = by_hand(1, 1, 8, PALETTE, b"\0\0", chunk(b"PLTE", b"abc"), chunk(b"tRNS", b"x"))
    assert png.checked(data) == (data, None)


def test_a_key_that_is_too_short_is_damage() -> None:
    with pytest.raises(Truncated, match="tRNS"):
        png.colour_key(np.zeros((1, 1, 3), np.uint8), b"\0\1\0\1", 8)


def test_another_writers_text_and_filters_are_no_obstacle() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "a" * 2000, zip=True)
    pixels = np.random.default_rng(8).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=text, optimize=True)
    assert (read(png.checked(file.getvalue())[0]) == pixels).all()


def test_hidden_colour_stays_where_it_is_not_to_be_cleared() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    pixels[::2, :, 3] = 0
    with Image.open(io.BytesIO(png.encode(pixels, clear=False))) as image:
        assert np.array_equal(np.array(image), pixels)
    with Image.open(io.BytesIO(png.encode(pixels))) as image:
        assert not np.array(image)[::2].any()
