"""Colour stated in numbers: each statement must give the colours that its standard defines."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from imagemill.shared.errors import UnsupportedFormat
from imagemill.worker.imaging import codec, colour
from imagemill.worker.imaging.codec import encode
from tests.unit.worker.imaging.samples import SRGB, SWAPPED, picture, pixels, png_by_hand, png_chunk, save, scene
from tests.unit.worker.imaging.test_exif import camera

P3 = np.array([[0.8224619, 0.1775381, 0], [0.0331942, 0.9668058, 0], [0.0170826, 0.0723974, 0.9105199]])
"""Linear sRGB to linear Display P3."""
BT2020 = np.array([[0.6274039, 0.3292830, 0.0433131], [0.0690973, 0.9195404, 0.0113623], [0.0163914, 0.0880133, 0.8955953]])
ADOBE = np.array([[0.7151256, 0.2848744, 0], [0, 1, 0], [0, 0.0411619, 0.9588381]])
SAME = np.eye(3)

COLOURS = np.array(
    [
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
        [255, 255, 255],
        [0, 0, 0],
        [128, 128, 128],
        [200, 120, 40],
        [30, 60, 90],
        [9, 5, 7],
    ],
    np.uint8,
)[None]
"""What is seen, in sRGB."""

P3_CORNERS = (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)


def light(levels: np.ndarray) -> np.ndarray:
    level = levels / 255
    return np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)


def like_srgb(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * np.clip(linear, 0, 1) ** (1 / 2.4) - 0.055)


def stored(matrix: np.ndarray, gamma: float | None = None, *, narrow: bool = False) -> np.ndarray:
    """COLOURS as a file with these primaries and this curve stores them."""
    linear = np.clip(light(COLOURS) @ matrix.T, 0, 1)
    levels = (like_srgb(linear) if gamma is None else linear ** (1 / gamma)) * 255
    return np.round(levels * 219 / 255 + 16 if narrow else levels).astype(np.uint8)


def png(samples: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    return png_by_hand(samples.shape[1], len(samples), 8, 2, rows, *(png_chunk(*chunk) for chunk in chunks))


def cicp(*numbers: int) -> tuple[bytes, bytes]:
    return b"cICP", bytes(numbers)


def gama(value: int) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", value)


def chrm(corners: tuple[float, ...]) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in corners))


def iccp(profile: bytes) -> tuple[bytes, bytes]:
    return b"iCCP", b"name\0\0" + zlib.compress(profile)


def near(found: np.ndarray, wanted: np.ndarray = COLOURS, *, within: int = 3) -> bool:
    """Equal, but for the rounding of 8 bits in a file, which weighs more in the dark."""
    return bool(np.abs(found.astype(int) - wanted).max() <= within)


# --- PNG ---


@pytest.mark.parametrize(
    ("numbers", "samples"),
    [
        ((1, 13, 0, 1), stored(SAME)),
        ((12, 13, 0, 1), stored(P3)),
        ((9, 13, 0, 1), stored(BT2020)),
        ((9, 14, 0, 1), stored(BT2020)),
        ((9, 15, 0, 1), stored(BT2020)),
        ((1, 1, 0, 1), stored(SAME)),
        ((1, 4, 0, 1), stored(SAME, 2.2)),
        ((12, 4, 0, 1), stored(P3, 2.2)),
        ((1, 5, 0, 1), stored(SAME, 2.8)),
        ((12, 2, 0, 1), stored(P3)),
        ((2, 4, 0, 1), stored(SAME, 2.2)),
        ((1, 13, 0, 0), stored(SAME, narrow=True)),
        ((12, 13, 0, 0), stored(P3, narrow=True)),
    ],
    ids=str,
)
def test_cicp_of_png(numbers: tuple[int, ...], samples: np.ndarray) -> None:
    assert near(pixels(png(samples, cicp(*numbers))))


def test_linear_light() -> None:
    for statement in (cicp(1, 8, 0, 1), gama(100_000)):
        found = pixels(png(stored(SAME, 1.0), statement))
        assert near(found[:, :6], COLOURS[:, :6])
        assert near(light(found) * 255, light(COLOURS) * 255)


def test_display_p3_red_is_srgb_red() -> None:
    assert pixels(png(np.array([[[234, 51, 35]]], np.uint8), cicp(12, 13, 0, 1))).tolist() == [[[255, 0, 0]]]


@pytest.mark.parametrize("transfer", [16, 18])
@pytest.mark.parametrize("others", [(), (iccp(SRGB),)])
def test_hdr_is_refused(transfer: int, others: tuple[tuple[bytes, bytes], ...]) -> None:
    kind = {16: "PQ", 18: "HLG"}[transfer]
    with pytest.raises(UnsupportedFormat, match=rf"the PNG file is an HDR picture \({kind}\)"):
        picture(png(COLOURS, *others, cicp(9, transfer, 0, 1)))


@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.6])
@pytest.mark.parametrize(("corners", "matrix"), [(None, SAME), (P3_CORNERS, P3), (colour.ADOBE_RGB, ADOBE)])
def test_gamma_and_chromaticities_of_png(gamma: float, corners: tuple[float, ...] | None, matrix: np.ndarray) -> None:
    bright = COLOURS[:, :7]  # 8 bits of linear light don't hold dark colours
    chunks = [gama(round(100_000 / gamma)), *([chrm(corners)] if corners else [])]
    assert near(pixels(png(stored(matrix, gamma)[:, :7], *chunks)), bright, within=7)


@pytest.mark.parametrize("value", [45_454, 45_455, 45_460])
def test_the_usual_gamma_stands_for_srgb(value: int) -> None:
    plain = picture(png(stored(SAME), gama(value), chrm(colour.SRGB)))
    assert (plain.pixels == COLOURS).all()
    assert plain.as_stored
    assert near(pixels(png(stored(P3), gama(value), chrm(P3_CORNERS))))


P3_CICP, LINEAR = cicp(12, 13, 0, 1), gama(100_000)


@pytest.mark.parametrize(
    ("chunks", "wanted"),
    [
        ((P3_CICP, iccp(SWAPPED), (b"sRGB", b"\0"), LINEAR), stored(P3)),
        ((LINEAR, (b"sRGB", b"\0"), iccp(SWAPPED), P3_CICP), stored(P3)),
        ((cicp(2, 2, 0, 1), iccp(SWAPPED)), COLOURS[:, :, [1, 0, 2]]),
        ((cicp(12, 13, 9, 1), iccp(SWAPPED)), COLOURS[:, :, [1, 0, 2]]),
        (((b"cICP", b"\x0c\x0d"), iccp(SWAPPED)), COLOURS[:, :, [1, 0, 2]]),
        ((iccp(SWAPPED), (b"sRGB", b"\0"), LINEAR), COLOURS[:, :, [1, 0, 2]]),
        (((b"sRGB", b"\0"), LINEAR, chrm(P3_CORNERS)), COLOURS),
        (((b"iCCP", b"name\0\0broken"), gama(100_000 * 10 // 18)), stored(SAME, 1.8)),
        ((chrm(P3_CORNERS),), COLOURS),
        ((gama(0),), COLOURS),
        ((gama(45_455), chrm((0.0,) * 8)), COLOURS),
        (((b"gAMA", b"\0"), (b"cHRM", b"\0")), COLOURS),
    ],
    ids=[
        "cICP", "cICP-last", "cICP-unknown", "cICP-YCbCr", "cICP-short", "iCCP", "sRGB", "gAMA-after-broken-iCCP", "cHRM-alone",
        "gAMA-0", "cHRM-0", "short",
    ],
)  # fmt: skip
def test_precedence_of_statements_in_png(chunks: tuple[tuple[bytes, bytes], ...], wanted: np.ndarray) -> None:
    assert near(pixels(png(wanted, *chunks)))


def test_statements_after_the_pixels_dont_count() -> None:
    data = png(COLOURS)
    end = data.index(b"IDAT") - 4 + 12 + int.from_bytes(data[data.index(b"IDAT") - 4 :][:4], "big")
    assert (pixels(data[:end] + png_chunk(*P3_CICP) + data[end:]) == COLOURS).all()


def test_grey_and_transparent_png() -> None:
    level = np.arange(0, 256, 5, dtype=np.uint8)
    found = pixels(png_by_hand(52, 1, 8, 0, b"\0" + level.tobytes(), png_chunk(*gama(55_556))))
    assert near(found[0], np.repeat(np.round(like_srgb((level / 255) ** 1.8) * 255)[:, None], 3, axis=1))
    clear = np.dstack([stored(P3), np.arange(9, dtype=np.uint8)[None]])
    found = pixels(png_by_hand(9, 1, 8, 6, b"\0" + clear.tobytes(), png_chunk(*P3_CICP)))
    assert near(found[:, :, :3])
    assert (found[:, :, 3] == clear[:, :, 3]).all()


@pytest.mark.parametrize("chunks", [(P3_CICP,), (gama(45_455), chrm(P3_CORNERS))], ids=["cICP", "cHRM"])
def test_kept_colours_get_an_equivalent_profile(chunks: tuple[tuple[bytes, bytes], ...]) -> None:
    kept = picture(png(stored(P3), *chunks), icc="keep")
    assert (kept.pixels == stored(P3)).all()
    assert kept.as_stored
    assert kept.icc is not None
    for form in ("png", "webp", "jpeg"):
        again = encode(kept, format=form, quality=95).data
        assert Image.open(io.BytesIO(again)).info["icc_profile"] == kept.icc
    assert near(pixels(encode(kept, format="png", quality=95).data))


# --- profiles ---


@pytest.mark.parametrize(
    ("primaries", "transfer"),
    [(number, 13) for number in (4, 5, 6, 7, 8, 9, 10, 11, 12, 22)] + [(1, number) for number in (4, 5, 8, 17)],
)
def test_profiles_are_valid_and_keep_white_and_black(primaries: int, transfer: int) -> None:
    data = colour.by_code_points(primaries, transfer, what="the file")
    assert data is not None
    assert len(data) == int.from_bytes(data[:4], "big")
    profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    assert ImageCms.getProfileDescription(profile).strip() == "RGB as stated by the file"
    white, black = pixels(png(np.array([[[255] * 3, [0] * 3]], np.uint8), cicp(primaries, transfer, 0, 1)))[0]
    assert np.abs(white.astype(int) - 255).max() <= 1
    assert black.max() == 0


@pytest.mark.parametrize(
    ("primaries", "transfer"), [(1, 13), (1, 1), (1, 2), (2, 2), (0, 13), (3, 8), (99, 13), (1, 3), (1, 9), (1, 77)]
)
def test_srgb_and_unknown_code_points_need_no_profile(primaries: int, transfer: int) -> None:
    assert colour.by_code_points(primaries, transfer, what="the file") is None


# --- EXIF ---


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_adobe_rgb_stated_by_cameras(kind: str) -> None:
    data = save(
        kind, np.repeat(np.repeat(stored(ADOBE, 563 / 256), 16, 1), 16, 0), exif=camera("<", 65_535, b"R03"), quality=100
    )
    middle = np.s_[8:9, 8::16]
    assert np.abs(pixels(data)[middle].astype(int) - COLOURS).max() <= 12
    assert picture(data, icc="keep").icc == colour.adobe_rgb()
    own = save(kind, scene(), exif=camera("<", 65_535, b"R03"), icc_profile=SWAPPED)
    assert codec.probe(own, max_pixels=10_000).icc == SWAPPED
