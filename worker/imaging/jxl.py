"""JPEG XL with libjxl, which comes with the extra `formats`: the header is parsed here, because libjxl decodes on opening.

Format: ISO/IEC 18181-1 (codestream) and 18181-2 (container).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from imagemill.shared.errors import Truncated, UnsupportedFormat
from imagemill.worker.imaging import colour
from imagemill.worker.imaging.facts import REDUCED, Facts, Samples
from imagemill.worker.imaging.heif import boxes

BARE, CONTAINER = b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n"
MAX_EXTRA = 4
"""Channels besides the colours, of which only alpha is read; libjxl would allocate memory for each."""
_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}


def read_header(data: bytes) -> Facts:
    """Upright size, bits and kind of compression, without decoding. Raises Truncated and UnsupportedFormat."""
    _decoder()
    header = _Header(_codestream(data))
    return Facts(header.size, orientation=1, notes=(REDUCED,) * (header.bits > 8), lossless=not header.xyb)


def decode(data: bytes, size: tuple[int, int]) -> Samples:
    """Upright pixels of mode L, RGB or RGBA, and the profile they are in. Raises Truncated."""
    try:
        # The bare codestream: neither metadata nor instructions for restoring a JPEG file reach libjxl.
        _, info, packed, icc, _ = _decoder()(_codestream(data))
    except (RuntimeError, ValueError, OSError) as error:
        raise Truncated("the JPEG XL file ends early or is damaged") from error  # libjxl doesn't say more
    if (info.width, info.height) != size:
        raise Truncated(f"the file has conflicting sizes: {size[0]} x {size[1]} and {info.width} x {info.height} pixels")
    wide = info.mode == "I;16"  # only grey comes with more than 8 bits
    mode = "L" if wide else info.mode
    if mode not in ("L", "LA", "RGB", "RGBA"):
        raise UnsupportedFormat(f"the JPEG XL file has samples of kind {info.mode}, which isn't read")
    samples = np.frombuffer(packed, "<u2" if wide else np.uint8).reshape(size[1], size[0], len(mode))
    pixels = ((samples.astype(np.uint32) * 255 + 32_895) >> 16).astype(np.uint8) if wide else samples
    if mode == "LA":
        pixels, mode = pixels[:, :, (0, 0, 0, 1)], "RGBA"
    return Samples(np.ascontiguousarray(pixels[:, :, 0] if mode == "L" else pixels), mode, icc=icc or None)


def _decoder() -> Callable[[bytes], Any]:
    try:
        from pillow_jxl import Decoder
    except ImportError as error:
        raise UnsupportedFormat("reading JPEG XL images needs pip install 'imagemill[formats]'") from error
    return Decoder(num_threads=0)  # in this thread: the line decodes several pictures at once


def _codestream(data: bytes) -> bytes:
    """The picture itself, without its container. Raises Truncated if there is none."""
    if data.startswith(BARE):
        return data
    parts = [
        data[start + 4 * (kind == b"jxlp") : end]
        for kind, start, end in boxes(data, 0, len(data))
        if kind in (b"jxlc", b"jxlp")
    ]
    if not parts or not parts[0].startswith(BARE):
        raise Truncated("the JPEG XL file has no picture")
    return b"".join(parts)


class _Header:
    """The beginning of a codestream: SizeHeader and ImageMetadata, whose fields are bits, the lowest first."""

    def __init__(self, stream: bytes) -> None:
        self._bits = int.from_bytes(stream[2:4096], "little")
        self._left = 8 * len(stream[2:4096])
        width, height = self._size()
        self.bits, self.xyb, turn = 8, True, 1
        if not self._read(1):  # otherwise all fields have their defaults
            turn = self._extra_fields() if self._read(1) else 1
            self._depths()
            self.xyb = bool(self._read(1))
            if not self._read(1):  # otherwise sRGB
                self._colours()
        self.size = (height, width) if turn >= 5 else (width, height)

    def _read(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise Truncated("the JPEG XL file ends inside its header")
        value = self._bits & ((1 << count) - 1)
        self._bits >>= count
        return value

    def _choice(self, *ways: tuple[int, int]) -> int:
        """U32: one of four (offset, bits)."""
        offset, count = ways[self._read(2)]
        return offset + self._read(count)

    def _size(self) -> tuple[int, int]:
        small = self._read(1)
        ways = ((1, 9), (1, 13), (1, 18), (1, 30))
        height = 8 * (1 + self._read(5)) if small else self._choice(*ways)
        ratio = self._read(3)
        if ratio:
            return height * _RATIOS[ratio][0] // _RATIOS[ratio][1], height
        return 8 * (1 + self._read(5)) if small else self._choice(*ways), height

    def _extra_fields(self) -> int:
        """The orientation."""
        turn = 1 + self._read(3)
        if self._read(1):  # the size on paper
            self._size()
        if self._read(1) or self._read(1):
            raise UnsupportedFormat(
                "the JPEG XL file is animated or has a preview, which isn't read; convert it to PNG or JPEG"
            )
        return turn

    def _depths(self) -> None:
        """Bits per sample, of the extra channels too."""
        self.bits = self._depth()
        self._read(1)  # whether 16 bits suffice for computing
        extra = self._choice((0, 0), (1, 0), (2, 4), (1, 12))
        if extra > MAX_EXTRA:
            raise UnsupportedFormat(f"the JPEG XL file has {extra} extra channels; up to {MAX_EXTRA} are read")
        for _ in range(extra):
            self._extra_channel()

    def _colours(self) -> None:
        """Refuse HDR. All other colours libjxl describes by a profile."""
        enum = ((0, 0), (1, 0), (2, 4), (18, 6))
        chromaticity = ((0, 19), (524_288, 19), (1_048_576, 20), (2_097_152, 21))
        has_profile, space = self._read(1), self._choice(*enum)
        if has_profile or space == 2:
            return
        for custom in (2, 6) if space == 0 else (2,):  # the numbers of a white point, and of primaries
            if self._choice(*enum) == 2:
                for _ in range(custom):
                    self._choice(*chromaticity)
        if not self._read(1):  # otherwise a gamma follows
            colour.by_code_points(1, self._choice(*enum), what="the JPEG XL file")

    def _depth(self) -> int:
        if self._read(1):
            raise UnsupportedFormat(
                "the JPEG XL file has floating-point samples, which aren't read; convert it to 8 or 16 bits"
            )
        return self._choice((8, 0), (10, 0), (12, 0), (1, 6))

    def _extra_channel(self) -> None:
        if self._read(1):  # plain alpha
            return
        kind = self._choice((0, 0), (1, 0), (2, 4), (18, 6))
        self._depth()
        self._choice((0, 0), (3, 0), (4, 0), (1, 3))  # a smaller size
        self._read(8 * self._choice((0, 0), (0, 4), (16, 5), (48, 10)))  # its name
        if kind == 0 and self._read(1):
            raise UnsupportedFormat("the JPEG XL file has colours multiplied by their alpha, which isn't read")
        if kind in (2, 5):
            raise UnsupportedFormat("the JPEG XL file has spot colours or raw camera data, which isn't read")
