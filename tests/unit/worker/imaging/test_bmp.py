"""BMP: variants that Pillow misreads or doesn't read."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from imagemill.shared.errors import UnsupportedFormat
from imagemill.worker.imaging import codec
from tests.unit.worker.imaging.samples import SWAPPED, pixels

INDEXES = np.random.default_rng(1).integers(0, 2, (5, 9))


def bmp(rows: bytes, bits: int, palette: list[int], *, header: int = 40, compression: int = 0, profile: bytes = b"") -> bytes:
    """A 9 x 5 BMP, bottom row first, with a grey `palette`."""
    colours = b"".join(bytes([level, level, level, 0]) for level in palette)
    start = 14 + header + len(colours)
    fields = struct.pack("<IiiHHIIiiII", header, 9, 5, 1, bits, compression, len(rows), 0, 0, len(palette), 0)
    if header == 124:
        fields = fields.ljust(56, b"\0") + b"DEBM" + bytes(52) + struct.pack("<III", start + len(rows) - 14, len(profile), 0)
    size = start + len(rows) + len(profile)
    return b"BM" + struct.pack("<IHHI", size, 0, 0, start) + fields.ljust(header, b"\0") + colours + rows + profile


def packed(indexes: np.ndarray, bits: int) -> bytes:
    spread = indexes[::-1, :, None] >> np.arange(bits - 1, -1, -1) & 1
    rows = np.packbits(spread.reshape(len(indexes), -1).astype(np.uint8), axis=1)
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4))).tobytes()


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("palette", [[0, 255], [255, 0], [0, 200]])
def test_two_colours_of_any_depth(bits: int, palette: list[int]) -> None:
    found = pixels(bmp(packed(INDEXES, bits), bits, palette))
    assert (found == np.array(palette)[INDEXES][:, :, None]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_palette_whose_levels_are_its_indexes(bits: int) -> None:
    indexes = np.random.default_rng(2).integers(0, 2**bits, (5, 9))
    found = pixels(bmp(packed(indexes, bits), bits, [*range(2**bits)]))
    assert (found == indexes[:, :, None]).all()


def test_embedded_profile() -> None:
    colours = np.random.default_rng(3).integers(0, 256, (5, 9, 3), np.uint8)
    rows = np.pad(colours[::-1, :, ::-1].reshape(5, 27), ((0, 0), (0, 1))).tobytes()
    data = bmp(rows, 24, [], header=124, profile=SWAPPED)
    assert codec.probe(data, max_pixels=100).icc == SWAPPED
    assert np.abs(pixels(data).astype(int) - colours[:, :, [1, 0, 2]]).max() <= 2
    assert codec.probe(data[:-1], max_pixels=100).icc is None


@pytest.mark.parametrize(("bits", "compression"), [(2, 0), (64, 0), (24, 4), (24, 5), (32, 6)])
def test_other_variants_are_refused(bits: int, compression: int) -> None:
    with pytest.raises(UnsupportedFormat, match="this variant of BMP is not supported"):
        codec.probe(bmp(bytes(500), bits, [0, 255], compression=compression), max_pixels=100)
