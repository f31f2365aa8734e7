"""What a file may cost, and which files are known to cost no more than their size and pixels suggest; all others go behind
the wall.

The promise, checked by bench/hostile.py: reading a file takes at most five times the CPU time of an ordinary PNG with as many
pixels, plus one second.
"""

from __future__ import annotations

import struct

from imagemill.worker.imaging import jpeg

PROBE_SECONDS = 0.25
DECODE_SECONDS = 0.5
SECONDS_PER_PIXEL = 55e-9
"""Of CPU time. An ordinary PNG takes 10 to 20 ns per pixel; AVIF, the slowest format for genuine files, up to 30."""

SPARE_BYTES = 96 * 2**20
BYTES_PER_PIXEL = 17
BYTES_PER_BYTE = 3
"""A helper's memory beyond what it has when idle, including the result."""
LARGE = 24_000_000
"""Pixels."""

FEW_SCANS = 10
"""Those of an ordinary progressive JPEG."""
FEW_TAGS = 64
SIMPLE_PROFILE = 2**18
CURVE_POINTS = 4096
_CLASSES = {b"mntr", b"scnr", b"prtr", b"spac"}
_CURVES = {b"rTRC", b"gTRC", b"bTRC", b"kTRC"}
_PIPELINES = (b"A2B", b"B2A", b"D2B", b"B2D")


def seconds_to_decode(pixels: int) -> float:
    """CPU seconds that decoding a picture may take."""
    return DECODE_SECONDS + SECONDS_PER_PIXEL * pixels


def bytes_to_decode(pixels: int, file: int) -> int:
    """Bytes of memory that decoding a picture from a file of `file` bytes may take."""
    return SPARE_BYTES + BYTES_PER_PIXEL * pixels + BYTES_PER_BYTE * file


def is_linear(data: bytes, kind: str, icc: bytes | None, pixels: int) -> bool:
    """Whether decoding takes time in proportion to the file's pixels and bytes, whatever is in it, and little memory.

    That holds for PNG, whose chunks `probe` has counted, and for JPEG with few passes over the picture, unless a colour profile
    needs more than a matrix and curves. Of large pictures, only JPEG can be decoded without copies on the way. Raises the
    errors of `jpeg.scans`.
    """
    if icc is not None and not is_simple(icc):
        return False
    if pixels > LARGE and (kind != "jpeg" or icc is not None):
        return False
    return kind == "png" or (kind == "jpeg" and jpeg.is_plain(data, FEW_SCANS))


def is_simple(icc: bytes) -> bool:
    """Whether LittleCMS will read only a matrix and short curves from a colour profile."""
    if not 132 <= len(icc) <= SIMPLE_PROFILE or icc[16:20] not in (b"RGB ", b"GRAY") or icc[12:16] not in _CLASSES:
        return False
    (count,) = struct.unpack_from(">I", icc, 128)
    if count > FEW_TAGS or 132 + 12 * count > len(icc):
        return False
    return all(_is_short(icc, *struct.unpack_from(">4sI", icc, 132 + 12 * number)) for number in range(count))


def _is_short(icc: bytes, tag: bytes, start: int) -> bool:
    """Whether a tag of a profile is a short curve, or one that no conversion reads."""
    if tag not in _CURVES:
        return not tag.startswith(_PIPELINES)
    points = int.from_bytes(icc[start + 8 : start + 12], "big")
    return icc[start : start + 4] == b"para" or (icc[start : start + 4] == b"curv" and points <= CURVE_POINTS)
