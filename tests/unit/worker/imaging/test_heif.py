"""What AVIF and HEIF files state in their boxes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.shared.errors import UnsupportedFormat
from imagemill.worker.imaging import codec
from imagemill.worker.imaging.heif import Stated, read
from tests.unit.worker.imaging.samples import SWAPPED, difference, picture, pixels, save, scene
from tests.unit.worker.imaging.test_colour import BT2020, COLOURS, P3, stored

AVIF = save("avif", scene(), quality=90)


def box(kind: bytes, *parts: bytes) -> bytes:
    payload = b"".join(parts)
    return struct.pack(">I4s", 8 + len(payload), kind) + payload


def nclx(primaries: int, transfer: int) -> bytes:
    return box(b"colr", b"nclx" + struct.pack(">HHHB", primaries, transfer, 6, 0x80))


PIXI, AV1C, HVCC = box(b"pixi", b"\0\0\0\0\3\x0a\x0a\x0a"), box(b"av1C", b"\x81\0\x40\0"), box(b"hvcC", bytes(17) + b"\xfa\xfa")
AV1C_12, OTHER = box(b"av1C", b"\x81\0\x60\0"), nclx(9, 16)


def file(*properties: bytes, owned: dict[int, list[int]], main: int = 1, version: int = 0, references: bytes = b"") -> bytes:
    """A file whose items own these properties, by their numbers."""
    layout = ">IB" if version else ">HB"
    table = b"".join(
        struct.pack(layout, item, len(own)) + bytes(0x80 | number for number in own) for item, own in owned.items()
    )
    container = box(b"ipco", *properties)
    return box(b"ftyp", b"avif\0\0\0\0") + box(
        b"meta",
        bytes(4),
        box(b"hdlr", bytes(24)),
        box(b"pitm", bytes([1, 0, 0, 0]) + struct.pack(">I", main)),
        references,
        box(b"iprp", container, box(b"ipma", bytes([version, 0, 0, 0]) + struct.pack(">I", len(owned)) + table)),
    )


GRID = box(b"iref", bytes(4), box(b"auxl", struct.pack(">HHH", 3, 1, 1)), box(b"dimg", struct.pack(">HHHH", 1, 2, 2, 3)))


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (file(nclx(12, 13), owned={1: [1]}), Stated((12, 13))),
        (file(OTHER, nclx(12, 13), owned={2: [1], 1: [2]}, version=1), Stated((12, 13))),
        (file(OTHER, nclx(12, 13), owned={2: [1], 1: [2]}, main=2), Stated((9, 16))),
        (file(box(b"colr", b"prof" + SWAPPED), nclx(1, 13), owned={1: [1, 2]}), Stated((1, 13))),
        (file(OTHER, owned={2: [1]}), Stated()),
        (file(PIXI, owned={1: [1]}), Stated(bits=10)),
        (file(AV1C, owned={1: [1]}), Stated(bits=10)),
        (file(AV1C_12, owned={1: [1]}), Stated(bits=12)),
        (file(HVCC, owned={1: [1]}), Stated(bits=10)),
        (file(HVCC, nclx(12, 13), owned={2: [1, 2], 1: []}, references=GRID), Stated((12, 13), 10)),
        (file(HVCC, OTHER, nclx(1, 13), owned={2: [1, 2], 1: [3]}, references=GRID), Stated((1, 13), 10)),
        (AVIF, Stated((1, 13))),
        (b"", Stated()),
        (box(b"ftyp", b"avif"), Stated()),
    ],
    ids=[
        "P3", "wide-numbers", "other-item", "profile-first", "none", "pixi", "AV1", "AV1-12", "HEVC", "grid", "grid-and-tile",
        "Pillow", "empty", "no-meta",
    ],
)  # fmt: skip
def test_read_finds_what_the_main_picture_states(data: bytes, wanted: Stated) -> None:
    assert read(data) == wanted


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_read_survives_damage(draw: st.DataObject) -> None:
    data = bytearray(draw.draw(st.sampled_from([AVIF[:600], file(HVCC, OTHER, owned={2: [1, 2], 1: []}, references=GRID)])))
    for place, value in draw.draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=5)):
        data[place] = value
    assert isinstance(read(bytes(data[: draw.draw(st.integers(0, len(data)))])), Stated)


# --- AVIF files ---


def avif(samples: np.ndarray, primaries: int, transfer: int, **options: bytes) -> bytes:
    data = save("avif", np.repeat(np.repeat(samples, 16, 1), 16, 0), quality=100, subsampling="4:4:4", **options)
    at = data.index(b"nclx") + 4
    return data[:at] + struct.pack(">HH", primaries, transfer) + data[at + 4 :]


@pytest.mark.parametrize(
    ("primaries", "transfer", "samples"),
    [
        (1, 13, COLOURS),
        (1, 1, COLOURS),
        (12, 13, stored(P3)),
        (9, 14, stored(BT2020)),
        (12, 4, stored(P3, 2.2)),
        (2, 2, COLOURS),
    ],
)
def test_code_points_of_avif(primaries: int, transfer: int, samples: np.ndarray) -> None:
    data = avif(samples, primaries, transfer)
    assert np.abs(pixels(data)[8:9, 8::16].astype(int) - COLOURS).max() <= 12
    kept = picture(data, icc="keep")
    assert np.abs(kept.pixels[8:9, 8::16].astype(int) - samples).max() <= 4
    assert (kept.icc is None) == (primaries in (1, 2))


@pytest.mark.parametrize(("transfer", "kind"), [(16, "PQ"), (18, "HLG")])
def test_hdr_avif_is_refused(transfer: int, kind: str) -> None:
    with pytest.raises(UnsupportedFormat, match=rf"the AVIF file is an HDR picture \({kind}\)"):
        codec.probe(avif(COLOURS, 9, transfer), max_pixels=100_000)


def test_profile_of_avif_counts_more_than_code_points() -> None:
    data = save("avif", scene(), quality=90, icc_profile=SWAPPED)
    assert codec.probe(data, max_pixels=10_000).icc == SWAPPED
    assert difference(pixels(data), scene()[:, :, [1, 0, 2]]) < 3


def test_avif_of_more_bits_gets_a_note() -> None:
    assert codec.probe(AVIF, max_pixels=10_000).notes == ()
    deep = bytearray(AVIF)
    start = deep.index(b"pixi") + 9
    deep[start - 9 : start - 5] = b"free"  # Pillow writes 8 bits only; libavif doesn't need this box, and checks it
    deep[deep.index(b"av1C") + 6] |= 0x40
    assert codec.probe(bytes(deep), max_pixels=10_000).notes == ("reduced_to_8_bits",)
