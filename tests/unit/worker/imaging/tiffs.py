"""TIFF files of any layout, written by hand: Pillow writes few of them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

NONE, DEFLATE, PACKBITS = 1, 8, 32773
GREY, WHITE_IS_ZERO, RGB, PALETTE, CMYK = 1, 0, 2, 3, 5


@dataclass
class Sheet:
    """A page of `values` [h, w, samples]; `tags` adds or replaces tags (None leaves one out), all of type SHORT."""

    values: np.ndarray
    bits: int = 8
    meaning: int = RGB
    compression: int = NONE
    planar: bool = False
    tile: tuple[int, int] | None = None
    rows: int = 3
    predictor: bool = False
    reversed_bits: bool = False
    tags: Mapping[int, list[int] | bytes | None] = field(default_factory=dict)


def tiff(*sheets: Sheet, order: str = "<", big: bool = False, below: tuple[Sheet, ...] = ()) -> bytes:
    """A file of pages; those `below` are sub-pages of the first."""
    data = bytearray((b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42))
    data += struct.pack(order + "HH", 8, 0) if big else b""
    pointer = "Q" if big else "I"
    link = len(data)
    data += bytes(struct.calcsize("<" + pointer))
    places = []
    for sheet in below:
        places.append(_append(data, sheet, order, pointer, []))
        struct.pack_into(order + pointer, data, len(data) - struct.calcsize("<" + pointer), 0)
    for number, sheet in enumerate(sheets):
        struct.pack_into(order + pointer, data, link, _append(data, sheet, order, pointer, places if number == 0 else []))
        link = len(data) - struct.calcsize("<" + pointer)
    return bytes(data)


def _append(data: bytearray, sheet: Sheet, order: str, pointer: str, below: list[int]) -> int:
    """Add a page, directory last, and return where that is."""
    height, width, samples = sheet.values.shape
    planes = np.split(sheet.values, samples, axis=2) if sheet.planar else [sheet.values]
    starts, sizes = [], []
    for plane in planes:
        for piece in _pieces(sheet, plane):
            packed = _packed(piece, sheet, order)
            starts.append(len(data))
            sizes.append(len(packed))
            data += packed
    tags: dict[int, list[int] | bytes | None] = {
        256: [width], 257: [height], 258: [sheet.bits] * samples, 259: [sheet.compression], 262: [sheet.meaning],
        277: [samples], 284: [2 if sheet.planar else 1], 317: [2 if sheet.predictor else 1],
        266: [2 if sheet.reversed_bits else 1],
        **({322: [sheet.tile[0]], 323: [sheet.tile[1]], 324: starts, 325: sizes} if sheet.tile else
           {273: starts, 278: [sheet.rows], 279: sizes}),
        **({330: below} if below else {}), **sheet.tags,
    }  # fmt: skip
    entries, room = [], struct.calcsize("<" + pointer)
    for tag, values in sorted(tags.items()):
        if values is None:
            continue
        layout, kind = ("B", 7) if isinstance(values, bytes) else (("I", 4) if tag in (273, 279, 324, 325, 330) else ("H", 3))
        payload = struct.pack(f"{order}{len(values)}{layout}", *values)
        if len(payload) > room:
            data += bytes(len(data) % 2)
            payload, place = struct.pack(order + pointer, len(data)), payload
            data += place
        entries.append(struct.pack(order + "HH" + pointer, tag, kind, len(values)) + payload.ljust(room, b"\0"))
    data += bytes(len(data) % 2)
    at = len(data)
    data += struct.pack(order + ("Q" if pointer == "Q" else "H"), len(entries)) + b"".join(entries) + bytes(room)
    return at


def _pieces(sheet: Sheet, plane: np.ndarray) -> list[np.ndarray]:
    height, width, _ = plane.shape
    if sheet.tile is None:
        return [plane[top : top + sheet.rows] for top in range(0, height, sheet.rows)]
    wide, high = sheet.tile
    padded = np.pad(plane, ((0, -height % high), (0, -width % wide), (0, 0)), constant_values=1)
    return [padded[y : y + high, x : x + wide] for y in range(0, height, high) for x in range(0, width, wide)]


def _packed(piece: np.ndarray, sheet: Sheet, order: str) -> bytes:
    if sheet.predictor:
        piece = np.diff(piece, axis=1, prepend=piece[:, :1] * 0)
    rows = piece.reshape(len(piece), -1)
    if sheet.bits in (8, 16):
        data = rows.astype(f"{order}u{sheet.bits // 8}").tobytes()
    else:
        bits = rows[:, :, None] >> np.arange(sheet.bits - 1, -1, -1) & 1
        data = np.packbits(bits.reshape(len(piece), -1).astype(np.uint8), axis=1).tobytes()
    if sheet.compression == DEFLATE:
        data = zlib.compress(data)
    elif sheet.compression == PACKBITS:
        data = b"".join(bytes([len(data[at : at + 128]) - 1]) + data[at : at + 128] for at in range(0, len(data), 128))
    return bytes(int(f"{byte:08b}"[::-1], 2) for byte in data) if sheet.reversed_bits else data
