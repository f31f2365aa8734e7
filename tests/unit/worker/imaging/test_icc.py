"""Colour profiles: correct colours, and bad profiles never fail an image."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ImageCms

from imagemill.worker.imaging import icc
from tests.unit.worker.imaging.samples import SRGB, SWAPPED

LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def profile(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC version 2 profile with the given tags."""
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, payload in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(payload))
        body += payload + bytes(-len(payload) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s", start + len(body), 0x02400000, kind, space, pcs, b"acsp")
    head = head.ljust(68, b"\0") + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)  # D50
    return head.ljust(128, b"\0") + table + body


def dark_grey() -> bytes:
    """A grey profile with gamma 1.8, as on old Macs."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": white, b"kTRC": b"curv" + struct.pack(">IIH", 0, 1, round(1.8 * 256))})


def press() -> bytes:
    """A CMYK profile in which cyan prints mid grey, black prints black, magenta and yellow are invisible."""
    ramp = bytes(range(256))
    corners = bytearray()
    for inks in range(16):  # the first ink changes slowest
        lightness = 0 if inks & 1 else 128 if inks & 8 else 255
        corners += bytes([lightness, 128, 128])
    matrix = struct.pack(">9I", *(0x10000 if i % 4 == 0 else 0 for i in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + bytes(corners) + ramp * 3
    white = b"XYZ \0\0\0\0" + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": white, b"A2B0": table, b"A2B1": table})


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(9).integers(0, 256, shape, np.uint8)


def from_light(light: np.ndarray) -> np.ndarray:
    """sRGB levels of linear light from 0 to 1 (IEC 61966-2-1)."""
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(
    ("data", "space"),
    [(SRGB, "RGB"), (dark_grey(), "L"), (press(), "CMYK"), (LAB, None), (b"", None), (None, None), (b"short", None)],
    ids=["rgb", "grey", "cmyk", "lab", "empty", "none", "short"],
)
def test_space_of_profile(data: bytes | None, space: str | None) -> None:
    assert icc.space(data) == space


def test_to_srgb_converts_colours_but_not_alpha() -> None:
    pixels = noise(20, 30, 4)
    pixels[0, :3, :3] = np.eye(3) * 255
    got = icc.to_srgb(pixels, "RGBA", SWAPPED)
    assert got[0, :3, :3].tolist() == [[0, 255, 0], [255, 0, 0], [0, 0, 255]]
    assert np.abs(got[:, :, :3].astype(int) - pixels[:, :, [1, 0, 2]]).max() <= 2
    assert (got[:, :, 3] == pixels[:, :, 3]).all()
    assert (icc.to_srgb(np.ascontiguousarray(pixels[:, :, :3]), "RGB", SWAPPED) == got[:, :, :3]).all()


def test_to_srgb_leaves_srgb_unchanged() -> None:
    pixels = noise(20, 30, 4)
    at = SRGB.index(b"rXYZ") + 4
    red = struct.unpack_from(">I", SRGB, at)[0] + 8
    other = SRGB[: red + 3] + bytes([SRGB[red + 3] + 16]) + SRGB[red + 4 :]  # sRGB's red as another program rounds it
    assert (icc.to_srgb(pixels, "RGBA", SRGB) == pixels).all()
    assert (icc.to_srgb(pixels, "RGBA", other) == pixels).all()
    assert (icc.to_srgb(pixels, "RGBA", None) == pixels).all()


def test_to_srgb_applies_grey_profile() -> None:
    levels = np.arange(256, dtype=np.uint8)[None]
    got = icc.to_srgb(levels, "L", dark_grey())
    assert got.shape == (1, 256, 3)
    assert np.abs(got - from_light((levels / 255) ** 1.8)[:, :, None]).max() <= 2
    # the same when a decoder returned three equal channels, with or without alpha
    three = np.repeat(levels[:, :, None], 3, axis=2)
    assert (icc.to_srgb(three, "RGB", dark_grey()) == got).all()
    faint = icc.to_srgb(np.dstack([three, levels]), "RGBA", dark_grey())
    assert (faint == np.dstack([got, levels])).all()


def test_to_srgb_applies_cmyk_profile() -> None:
    inks = np.zeros((1, 5, 4), np.uint8)
    inks[0, 1, 0] = inks[0, 2, 1] = inks[0, 3, 2] = inks[0, 4, 3] = 255
    got = icc.to_srgb(inks, "CMYK", press())[0].astype(int)
    assert got.shape == (5, 3)
    assert np.ptp(got, axis=1).max() <= 3  # all grey
    white, cyan, magenta, yellow, black = got[:, 1].tolist()
    assert min(white, magenta, yellow) >= 253
    assert 110 <= cyan <= 130  # L* of 50
    assert black <= 3


def test_to_srgb_converts_cmyk_without_usable_profile() -> None:
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255]]], np.uint8)
    for unfit in (None, SWAPPED, dark_grey(), b"x" * 200):
        got = icc.to_srgb(inks, "CMYK", unfit)[0].tolist()
        assert got == [[255, 255, 255], [0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    "bad",
    [SRGB[:200], SRGB[:20] + b"x" * 300, press(), dark_grey(), LAB, b"x" * 128, b"\0" * 16 + b"RGB " + bytes(108)],
    ids=["cut", "overwritten", "of-ink", "of-grey", "lab", "text", "zeros"],
)
def test_to_srgb_ignores_broken_or_mismatched_profile(bad: bytes) -> None:
    pixels = noise(20, 30, 3)
    assert (icc.to_srgb(pixels, "RGB", bad) == pixels).all()


def test_to_srgb_keeps_grey_pixels_grey_in_colour_profile() -> None:
    levels = noise(20, 30)
    got = icc.to_srgb(levels, "L", SWAPPED)
    assert np.abs(got.astype(int) - levels[:, :, None]).max() <= 2


def test_as_rgb_repeats_grey_channel() -> None:
    levels = noise(5, 6)
    assert (icc.as_rgb(levels, "L") == levels[:, :, None]).all()
    assert icc.as_rgb(levels, "L").shape == (5, 6, 3)


def test_threads_can_share_a_profile() -> None:
    pixels = noise(100, 100, 3)
    wanted = icc.to_srgb(pixels, "RGB", SWAPPED)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: icc.to_srgb(pixels, "RGB", SWAPPED), range(40)):
            assert (got == wanted).all()
