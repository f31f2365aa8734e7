"""JPEG: headers as cameras and converters write them, scaled decoding, and errors for incomplete files."""

from __future__ import annotations

import base64
import io
import struct
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin

from imagemill.shared.errors import NotAnImage, TooCostly, Truncated, UnsupportedFormat
from imagemill.worker.imaging import jpeg
from imagemill.worker.imaging.facts import Facts
from imagemill.worker.imaging.headers import translated

EOI = b"\xff\xd9"


def scene(width: int = 160, height: int = 120) -> np.ndarray:
    """Smooth colours with one dark corner."""
    y, x = np.mgrid[:height, :width]
    pixels = np.dstack([x * 200 / width + 30, y * 200 / height + 30, (x + y) * 200 / (width + height)]).astype(np.uint8)
    pixels[: height // 4, : width // 4] //= 4
    return pixels


def save(pixels: np.ndarray, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def size_of(data: bytes) -> tuple[int, int]:
    return jpeg.read_header(data).size


def decode(data: bytes, target: tuple[int, int] | None = None) -> tuple[np.ndarray, str]:
    with translated("jpeg"):
        found = jpeg.decode(data, size_of(data), target or size_of(data))
    return found.pixels, found.mode


def by_pillow(data: bytes, mode: str = "RGB") -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert(mode))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def blocks(factors: list[tuple[int, int]], across: int = 5, down: int = 4) -> bytes:
    """A JPEG of random flat 8x8 blocks, with any sampling factors (horizontal, vertical) per channel."""
    source = np.random.default_rng(1)
    bits, last = "", [0] * len(factors)
    for _ in range(across * down):
        for channel, (h, v) in enumerate(factors):
            for level in source.integers(20, 60, h * v).tolist():
                step, last[channel] = level - last[channel], level
                length = abs(step).bit_length()
                value = step if step > 0 else step + (1 << length) - 1
                bits += f"{length:04b}" + (f"{value:0{length}b}" if length else "") + "0"
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    high, wide = (8 * count * max(factor[axis] for factor in factors) for axis, count in ((1, down), (0, across)))
    frame = b"".join(bytes([number, h << 4 | v, 0]) for number, (h, v) in enumerate(factors, 1))
    return b"".join([
        b"\xff\xd8",
        segment(0xDB, b"\0" + b"\x10" * 64),
        segment(0xC0, struct.pack(">BHHB", 8, high, wide, len(factors)) + frame),
        segment(0xC4, bytes([0, 0, 0, 0, 9, *[0] * 12, *range(9)])),  # DC: four bits per length
        segment(0xC4, bytes([0x10, 1, *[0] * 15, 0])),  # AC: one bit for end of block
        segment(0xDA, bytes([len(factors)]) + b"".join(bytes([n, 0]) for n in range(1, len(factors) + 1)) + b"\0\x3f\0"),
        scan,
        EOI,
    ])  # fmt: skip


# --- the header ---


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"mode": "L"}, {"mode": "CMYK"}], ids=str)
def test_read_header_returns_size(options: dict[str, Any]) -> None:
    assert jpeg.read_header(save(scene(160, 90), **options)) == Facts((160, 90))


@pytest.mark.parametrize("length", [200, 65_519, 65_520, 200_000])
def test_read_header_returns_profile_of_any_size(length: int) -> None:
    profile = np.random.default_rng(2).bytes(length)
    for data in (save(scene(), icc_profile=profile), jpeg.encode(scene(), 80, profile)):
        assert jpeg.read_header(data).icc == profile
        assert Image.open(io.BytesIO(data)).info["icc_profile"] == profile


def test_read_header_joins_profile_parts_in_any_order_if_complete() -> None:
    first, second = (segment(0xE2, b"ICC_PROFILE\0" + bytes([number, 2]) + part) for number, part in ((1, b"ab"), (2, b"cd")))
    data = save(scene())
    assert jpeg.read_header(data[:2] + second + first + data[2:]).icc == b"abcd"
    assert jpeg.read_header(data[:2] + second + data[2:]).icc is None
    assert jpeg.read_header(data[:2] + segment(0xE2, b"ICC_PROFILE\0") + data[2:]).icc is None


def test_read_header_returns_first_exif_block() -> None:
    data = save(scene())
    more = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>") + segment(0xE1, b"Exif\0\0one") + segment(0xE1, b"Exif\0\0two")
    assert jpeg.read_header(data[:2] + more + data[2:]).exif == b"one"


ODD = {
    "comment": lambda data: data[:2] + segment(0xFE, b"hello") + data[2:],
    "fill": lambda data: data[:2] + b"\xff" * 9 + data[2:],
    "broken-exif": lambda data: data[:2] + segment(0xE1, b"Exif\0\0" + b"x" * 24) + data[2:],
    "future-jfif": lambda data: data[:11] + b"\x09" + data[12:],
    "adobe-twice": lambda data: data[:2] + segment(0xEE, b"Adobe\0\x64\0\0\0\0\x01") * 2 + data[2:],
    "trailing": lambda data: data + b"anything" * 100,
    "trailing-jpeg": lambda data: data + data,  # phones append previews and depth maps
    "zeros-before-the-end": lambda data: data[:-2] + bytes(7) + EOI,
}


@pytest.mark.parametrize("oddity", ODD)
@pytest.mark.parametrize("progressive", [False, True])
def test_decode_tolerates_harmless_irregularity(oddity: str, progressive: bool) -> None:
    data = save(scene(), progressive=progressive)
    odd = ODD[oddity](data)
    assert odd != data
    for target in ((160, 120), (80, 60)):
        assert (decode(odd, target)[0] == decode(data, target)[0]).all()


def test_decode_keeps_adobe_marker_when_stripping_metadata() -> None:
    ycck = simplejpeg.encode_jpeg(np.dstack([scene(), scene()[:, :, 0]]), quality=90, colorspace="CMYK")
    odd = ycck[:2] + segment(0xE0, b"JFIF\0\x09\1\0\0\1\0\1\0\0") + ycck[2:]
    with pytest.raises(ValueError, match="JFIF"):
        simplejpeg.decode_jpeg(odd, strict=True)
    assert (decode(odd)[0] == decode(ycck)[0]).all()


@pytest.mark.parametrize(
    "data",
    [b"", EOI, b"\xff\xe0\0\1", save(scene())[2:400], bytes(90), b"\xff" * 90],
    ids=["nothing", "empty", "no-length", "half-a-header", "zeros", "fill"],
)
def test_read_header_raises_truncated_on_cut_header(data: bytes) -> None:
    with pytest.raises(Truncated):
        jpeg.read_header(b"\xff\xd8" + data)


def test_read_header_raises_truncated_without_frame() -> None:
    data = save(scene())
    start = data.index(b"\xff\xc0")
    with pytest.raises(Truncated, match="no frame"):
        jpeg.read_header(data[:start] + data[start + 19 :])


def test_number_of_segments_and_scans_is_limited() -> None:
    data = save(scene(), progressive=True)
    comments = segment(0xFE, b"") * (jpeg.MAX_SEGMENTS + 1)
    with pytest.raises(NotAnImage, match="10,000 segments"):
        jpeg.read_header(data[:2] + comments + data[2:])
    last = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(TooCostly, match="limit is 100 scans"):
        decode(data[:-2] + last * jpeg.MAX_SCANS + EOI)
    with pytest.raises(TooCostly, match="limit is 100"):
        decode(data[:-2] + last * jpeg.MAX_SCANS)


def test_decode_rejects_conflicting_sizes() -> None:
    data = save(scene())
    with pytest.raises(Truncated, match="200 x 120 and 160 x 120"):
        jpeg.decode(data, (200, 120), (200, 120))
    start = data.index(b"\xff\xc0")
    small = data[start : start + 5] + struct.pack(">HH", 16, 16) + data[start + 9 : start + 19]
    with pytest.raises((Truncated, UnsupportedFormat)):
        decode(data[:start] + small + data[start:])


# --- pixels ---


@pytest.mark.parametrize("kind", ["4:4:4", "4:2:2", "4:2:0", "4:4:0", "4:1:1"])
@pytest.mark.parametrize("size", [(160, 120), (1, 1), (7, 31), (17, 9)])
def test_decode_supports_common_subsampling(kind: str, size: tuple[int, int]) -> None:
    pixels = scene(*size)
    data = simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling=kind.replace(":", ""))
    got, mode = decode(data)
    assert (got.shape, mode) == (pixels.shape, "RGB")
    assert difference(got, by_pillow(data)) < 1.5


UNUSUAL = [[(2, 2), (2, 1), (1, 2)], [(1, 1), (2, 2), (1, 1)], [(3, 1), (1, 1), (1, 1)], [(1, 4), (1, 1), (1, 1)]]


@pytest.mark.parametrize("factors", UNUSUAL, ids=str)
def test_decode_supports_unusual_subsampling(factors: list[tuple[int, int]]) -> None:
    data = blocks(factors)
    got, mode = decode(data)
    assert mode == "RGB"
    assert got.std() > 3
    assert (got == by_pillow(data)).all()


def test_decode_returns_one_channel_for_grey() -> None:
    got, mode = decode(save(scene(), "L", quality=95))
    assert (got.shape, mode) == ((120, 160), "L")
    assert difference(got, np.array(Image.fromarray(scene()).convert("L"))) < 2


def test_decode_returns_full_ink_as_255_for_cmyk_and_ycck() -> None:
    ink = np.zeros((32, 32, 4), np.uint8)
    ink[:, :, 0], ink[:, :, 3] = 255, 60
    file = io.BytesIO()
    Image.frombytes("CMYK", (32, 32), ink.tobytes()).save(file, "JPEG", quality=100)
    ycck = simplejpeg.encode_jpeg(255 - ink, quality=100, colorspace="CMYK")
    assert simplejpeg.decode_jpeg_header(ycck)[2] == "YCCK"
    for data in (file.getvalue(), ycck):
        got, mode = decode(data)
        assert mode == "CMYK"
        assert np.abs(got.astype(int) - ink).max() <= 3


@pytest.mark.parametrize(
    ("size", "target", "factor"),
    [
        ((4000, 3000), (4000, 3000), 1),
        ((4000, 3000), (2001, 1501), 1),
        ((4000, 3000), (2000, 1500), 2),
        ((4000, 3000), (1600, 1200), 2),
        ((4001, 3001), (1000, 750), 4),
        ((4000, 3000), (500, 375), 8),
        ((4000, 3000), (10, 8), 8),
        ((9, 9), (2, 2), 8),  # a fraction of a pixel counts as one
        ((1, 1), (1, 1), 8),
    ],
)
def test_shrink_factor_is_largest_that_covers_target(size: tuple[int, int], target: tuple[int, int], factor: int) -> None:
    assert jpeg.shrink_factor(size, target) == factor


@settings(max_examples=60, deadline=None)
@given(st.integers(16, 130), st.integers(16, 130), st.integers(1, 130), st.sampled_from(["RGB", "L", "CMYK"]))
def test_scaled_decoding_covers_target_and_whole_picture(width: int, height: int, edge: int, mode: str) -> None:
    target = min(width, edge), min(height, edge)
    data = save(scene(width, height), mode, quality=90, subsampling=0)
    got, found = decode(data, target)
    factor = jpeg.shrink_factor((width, height), target)
    assert found == mode
    assert got.shape[:2] == (-(-height // factor), -(-width // factor))
    tall, wide = (-length % factor for length in (height, width))
    full = np.pad(by_pillow(data, mode).reshape(height, width, -1), ((0, tall), (0, wide), (0, 0)), mode="edge")
    means = full.reshape(got.shape[0], factor, got.shape[1], factor, -1).mean(axis=(1, 3))
    assert np.abs(got.reshape(means.shape) - means).mean() < 5


KINDS = {
    "baseline": save(scene(), quality=90),
    "progressive": save(scene(), quality=90, progressive=True),
    "grey": save(scene(), "L"),
    "cmyk": save(scene(), "CMYK"),
    "restarts": save(scene(), quality=90, restart_marker_blocks=4),
    "unusual": blocks(UNUSUAL[0]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edge", [1, 1000])
def test_decode_raises_truncated_on_cut_file(kind: str, edge: int) -> None:
    data = KINDS[kind]
    width, height = size_of(data)
    for share in (0.5, 0.7, 0.9, 0.99):
        with pytest.raises(Truncated):
            decode(data[: int(len(data) * share)], (min(edge, width), min(edge, height)))


@pytest.mark.parametrize("kind", KINDS)
def test_decode_raises_truncated_on_cut_file_with_end_marker(kind: str) -> None:
    data = KINDS[kind]
    with pytest.raises(Truncated):
        decode(data[: int(len(data) * 0.7)] + EOI)


# --- harmless damage ---


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"unusual"}))
@pytest.mark.parametrize("end", [b"", b"\xff"], ids=["none", "half"])
@pytest.mark.parametrize("edge", [1, 1000])
def test_decode_reads_complete_picture_without_end_marker(kind: str, end: bytes, edge: int) -> None:
    data = KINDS[kind]
    width, height = size_of(data)
    target = min(edge, width), min(edge, height)
    found = jpeg.decode(data[:-2] + end, (width, height), target)
    assert (found.pixels == decode(data, target)[0]).all()
    assert found.notes == ("no_end_marker",)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_reads_no_picture_that_lacks_pixels(kind: str) -> None:
    data = KINDS[kind]
    fillings = [b"", bytes(9000), b"<p>Bad gateway</p>" * 500, b"\xff" * 9000]
    for length in (len(data) - 3, len(data) - 4, len(data) - 12, len(data) - 60):
        for filling in fillings:
            with pytest.raises(Truncated):
                decode(data[:length] + filling)


def test_decode_reads_no_picture_that_lacks_scans() -> None:
    data = KINDS["progressive"]
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"][1:]
    tables = [data.rindex(b"\xff\xc4", 0, at) for at in scans]
    assert len(scans) > 5
    for end in (*scans, *tables):
        with pytest.raises(Truncated):
            decode(data[:end])


ARITHMETIC = base64.b64decode(  # of 16 x 16 grey noise; no library that the tests have writes it
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6jq62rZ4C8yb"
    "qmx5moq6T/yQALCAAQABABAREA/8wABgAQEAX/2gAIAQEAAD8A9a6eVS9F7EZuhUQI673aRgABo00GcGfQTclEHGOzdB0+xDZh39wX1OxtlrDR"
    "inoBQIrmZm2rZQenDPd1P2itXhZSpAWJ/9k="
)


def test_arithmetic_coding_is_read_only_with_its_end_marker() -> None:
    assert (decode(ARITHMETIC)[0] == by_pillow(ARITHMETIC, "L")).all()
    for data in (ARITHMETIC[:-2], ARITHMETIC[:-30]):  # where pixels are missing, libjpeg doesn't complain
        with pytest.raises(Truncated):
            decode(data)


JUNK = [b"junk", b"\xff\0", b"\0\0\0", b"\xff\0anything\xff\0"]


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"unusual"}))
@pytest.mark.parametrize("junk", JUNK)
def test_decode_skips_junk_between_segments_before_the_scan(kind: str, junk: bytes) -> None:
    data = KINDS[kind]
    for _, start, _ in list(jpeg._segments(data)):
        odd = data[: start - 4] + junk + data[start - 4 :]
        found = jpeg.decode(odd, size_of(odd), size_of(odd))
        assert (found.pixels == decode(data)[0]).all()
        assert found.notes == ("junk_skipped",)
    both = jpeg.decode(odd[:-2], size_of(odd), size_of(odd))
    assert sorted(both.notes) == ["junk_skipped", "no_end_marker"]


# --- CMYK ---


def unmarked(ink: np.ndarray, *, inverted: bool = False) -> bytes:
    """A CMYK JPEG without Adobe's marker."""
    file = io.BytesIO()
    stored = ink if inverted else 255 - ink  # Pillow inverts again
    Image.frombytes("CMYK", (ink.shape[1], ink.shape[0]), stored.tobytes()).save(file, "JPEG", quality=100)
    data = file.getvalue()
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def inks(black: str) -> np.ndarray:
    """A scene with white paper as ink, with all, some or none of its black made of black ink."""
    light = scene().astype(float) / 255
    light[:20, 100:] = 1
    share = {"all": 1.0, "some": 0.6, "none": 0.0}[black]
    key = (1 - light.max(axis=2, keepdims=True)) * share
    colour = np.clip((1 - light - key) / np.maximum(1 - key, 1e-6), 0, 1)
    return np.round(np.dstack([colour, key]) * 255).astype(np.uint8)


@pytest.mark.parametrize("black", ["all", "some", "none"])
@pytest.mark.parametrize("inverted", [False, True])
def test_cmyk_without_adobe_marker_is_read_as_it_says_unless_that_is_impossible(black: str, inverted: bool) -> None:
    ink = inks(black)
    data = unmarked(ink, inverted=inverted)
    found = jpeg.decode(data, size_of(data), size_of(data))
    assert np.abs(found.pixels.astype(int) - ink).max() <= 6
    assert found.notes == (("cmyk_inverted",) if inverted else ())


# --- kinds that are not read ---


@pytest.mark.parametrize(
    ("marker", "bits", "reason"),
    [
        *((0xC0 + number, 8, "of a lossless or hierarchical kind") for number in (3, 5, 6, 7, 11, 13, 14, 15)),
        (0xC1, 12, "with 12 bits"),
        (0xC2, 12, "with 12 bits"),
    ],
)
def test_read_header_refuses_other_kinds(marker: int, bits: int, reason: str) -> None:
    data = bytearray(save(scene()))
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = marker, bits
    with pytest.raises(UnsupportedFormat, match=f"JPEG files {reason} are not supported"):
        jpeg.read_header(bytes(data))


# --- writing ---


def test_encode_gets_larger_and_closer_with_quality() -> None:
    files = [jpeg.encode(scene(), quality, None) for quality in (10, 50, 80, 95)]
    assert sorted(files, key=len) == files
    likeness = [difference(by_pillow(data), scene()) for data in files]
    assert sorted(likeness, reverse=True) == likeness
    assert likeness[-1] < 1.5


@pytest.mark.parametrize(("quality", "sampling"), [(1, 2), (89, 2), (90, 0), (100, 0)])
def test_encode_keeps_full_chroma_from_quality_90(quality: int, sampling: int) -> None:
    image = Image.open(io.BytesIO(jpeg.encode(scene(), quality, None)))
    assert JpegImagePlugin.get_sampling(image) == sampling


def test_encode_rejects_too_large_profile() -> None:
    with pytest.raises(ValueError, match="profile"):
        jpeg.encode(scene(), 80, bytes(255 * 65_519 + 1))
