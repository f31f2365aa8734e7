"""JPEG with libjpeg-turbo: parse headers, decode strictly and at reduced size, encode with a profile."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile

from imagemill.shared.errors import NotAnImage, TooCostly, Truncated, UnsupportedFormat, sentence
from imagemill.worker.imaging.facts import INVERTED, JUNK, NO_END, Facts, Samples

MAX_SEGMENTS = 10_000
MAX_SCANS = 100
"""A normal progressive file has about ten scans; each costs a pass over the whole picture, however small the scan."""

_FULL, _SHARE = 242, 0.001  # of ink, and of pixels: printers allow 75 to 90 % of ink in all four colours together

_SOS, _EOI, _APP0, _APP1, _APP2, _APP14, _APP15, _COM = 0xDA, 0xD9, 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15; the three excluded markers are tables
_PROGRESSIVE = frozenset({0xC2, 0xCA})
_READ = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})  # baseline, extended and progressive, with Huffman or arithmetic coding
_ARITHMETIC = frozenset({0xC9, 0xCA})
_HUFFMAN = frozenset({0xC0, 0xC1, 0xC2})
_MARKER = re.compile(rb"\xff[^\xff\x00\x01\xd0-\xd8]", re.DOTALL)  # those with a payload
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_PROFILE = b"ICC_PROFILE\0"
_PROFILE_PART = 65_533 - len(_PROFILE) - 2


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of each segment's payload, up to and including the first start of scan."""
    position = 2
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, position)
        if found is None or found.end() + 2 > len(data):
            raise Truncated("the JPEG file ends inside its header")
        marker, start = data[found.end() - 1], found.end() + 2
        end = start - 2 + int.from_bytes(data[start - 2 : start], "big")
        if marker == _EOI or end > len(data) or end < start:
            raise Truncated("the JPEG file ends before its image data")
        yield marker, start, end
        if marker == _SOS:
            return
        position = end
    raise NotAnImage(f"the JPEG file's header has more than {MAX_SEGMENTS:,} segments")


def read_header(data: bytes) -> Facts:
    """What the file states, without decoding. Raises UnsupportedFormat, NotAnImage or Truncated."""
    size, exif, xmp, parts = None, None, None, {}
    total = 0
    for marker, start, end in _segments(data):
        if marker in _FRAMES and size is None and end - start >= 6:
            bits, height, width = struct.unpack_from(">BHH", data, start)
            size = (width, height)
            if marker not in _READ or bits != 8:
                kind = f"with {bits} bits" if marker in _READ else "of a lossless or hierarchical kind"
                raise UnsupportedFormat(f"JPEG files {kind} are not supported")
        elif marker == _APP1 and exif is None and data[start : start + 6] == b"Exif\0\0":
            exif = data[start + 6 : end]
        elif marker == _APP1 and xmp is None and data.startswith(_XMP, start):
            xmp = data[start + len(_XMP) : end]
        elif marker == _APP2 and data.startswith(_PROFILE, start) and end - start > len(_PROFILE) + 2:
            head = start + len(_PROFILE)
            total = data[head + 1]
            parts[data[head]] = data[head + 2 : end]
    if size is None:
        raise Truncated("the JPEG file has no frame")
    complete = bool(total) and set(parts) == set(range(1, total + 1))
    return Facts(size, exif, xmp, b"".join(parts[number] for number in sorted(parts)) if complete else None)


def _plain(data: bytes) -> bytes:
    """The file without junk, comments and application segments, except Adobe's, which specifies the colour space."""
    kept = [b"\xff\xd8"]
    for marker, start, end in _segments(data):
        if marker == _APP14 or not (_APP0 <= marker <= _APP15 or marker == _COM):
            kept.append(data[start - 4 : len(data) if marker == _SOS else end])
    return b"".join(kept)


def is_plain(data: bytes, most: int) -> bool:
    """Whether it is grey or RGB, coded by Huffman's method, with at most `most` scans. Raises as `scans`."""
    frame, start = next(((marker, start) for marker, start, _ in _segments(data) if marker in _FRAMES), (None, 0))
    return frame in _HUFFMAN and data[start + 5] <= 3 and scans(data) <= most


def scans(data: bytes) -> int:
    """Number of scans, each of which costs a pass over the whole picture. Raises Truncated, or TooCostly for very many."""
    *tables, (_, scan, position) = _segments(data)
    frame, start = next(((marker, start) for marker, start, _ in tables if marker in _FRAMES), (None, 0))
    # If the first scan of a sequential file has all components, libjpeg treats a second scan as an error. Most files
    # are like that, so they need no search, which would take a tenth of their decoding time.
    if frame is not None and frame not in _PROGRESSIVE and data[scan] == data[start + 5]:
        return 1
    found = 1
    for _ in range(MAX_SEGMENTS):  # between scans, too, there may be tables, and comments with anything in them
        following = _MARKER.search(data, position)
        if following is None or data[following.end() - 1] == _EOI:
            return found
        found += data[following.end() - 1] == _SOS
        if found > MAX_SCANS:
            break
        position = following.end() + max(2, int.from_bytes(data[following.end() : following.end() + 2], "big"))
    raise TooCostly(f"the JPEG file has too many scans or segments; the limit is {MAX_SCANS} scans")


def _whole(data: bytes) -> bool:
    """Whether a file without an end marker has all of its scans, as far as their headers show.

    Each coefficient of each component must have come with all of its bits. A file may also have been filled up with zeros in
    place of its last rows, which would be decoded like pixels. With arithmetic coding, libjpeg can't tell where the pixels
    end.
    """
    if not data[-8:].strip(b"\0"):
        return False
    *tables, (_, scan, _) = _segments(data)
    frame = next((marker, start) for marker, start, _ in tables if marker in _FRAMES)
    if frame[0] in _ARITHMETIC:
        return False
    missing = {(data[frame[1] + 6 + 3 * at], number) for at in range(data[frame[1] + 5]) for number in range(64)}
    while scan >= 0:
        count = data[scan]
        components = data[scan + 1 : scan + 1 + 2 * count : 2]
        first, last, bits = data[scan + 1 + 2 * count : scan + 4 + 2 * count]
        if frame[0] not in _PROGRESSIVE:
            first, last, bits = 0, 63, 0
        if bits & 15 == 0:
            missing -= {(component, number) for component in components for number in range(first, last + 1)}
        scan = data.find(b"\xff\xda", scan)
        scan = scan + 4 if scan >= 0 else -1
    return not missing


def shrink_factor(size: tuple[int, int], target: tuple[int, int]) -> int:
    """The largest of 8, 4, 2 and 1 by which `size` can be divided while still covering `target`.

    libjpeg also offers fractions in between (3/8, 5/8, ...), but without SIMD code they cost more time than they save.
    """
    return next(f for f in (8, 4, 2, 1) if all(-(-have // f) >= want for have, want in zip(size, target, strict=True)))


def _decode(data: bytes, size: tuple[int, int], target: tuple[int, int], *, strict: bool) -> tuple[NDArray[np.uint8], str]:
    height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=strict)
    if (width, height) != size:
        raise Truncated(f"the JPEG file has conflicting sizes: {size[0]} x {size[1]} and {width} x {height} pixels")
    mode = {"Gray": "L", "CMYK": "CMYK", "YCCK": "CMYK"}.get(space, "RGB")
    factor = shrink_factor(size, target)
    pixels = simplejpeg.decode_jpeg(
        data,
        colorspace="GRAY" if mode == "L" else mode,
        min_width=-(-width // factor),
        min_height=-(-height // factor),
        strict=strict,
    )
    return pixels[:, :, 0] if mode == "L" else pixels, mode


def decode(data: bytes, size: tuple[int, int], target: tuple[int, int]) -> Samples:
    """Decode pixels of at least `target` (width, height): L, RGB or CMYK.

    The picture is decoded at 1/2, 1/4 or 1/8 of `size` if that still covers `target`. Strict decoding rejects every
    irregularity; those that don't affect the picture are then tolerated, and noted. Raises Truncated, NotAnImage, or
    TooCostly for too many scans, and on damage also Pillow's exceptions, which `headers.translated` converts.
    """
    scans(data)
    pixels, mode, notes = _tolerant(data, size, target)
    if mode != "CMYK":
        return Samples(pixels, mode, notes)
    adobe = any(marker == _APP14 and data.startswith(b"Adobe", start) for marker, start, _ in _segments(data))
    if adobe or _impossible(pixels):
        np.subtract(255, pixels, out=pixels)  # Adobe stores ink inverted
        notes += () if adobe else (INVERTED,)
    return Samples(pixels, mode, notes)


def _tolerant(
    data: bytes, size: tuple[int, int], target: tuple[int, int], notes: tuple[str, ...] = ()
) -> tuple[NDArray[np.uint8], str, tuple[str, ...]]:
    """Pixels and mode as stored, and notes on what was tolerated."""
    reason = ""
    for metadata in (True, False):  # libjpeg may reject the metadata alone
        source = data if metadata else _plain(data)
        try:
            return *_decode(source, size, target, strict=True), notes
        except (ValueError, KeyError) as error:  # KeyError: simplejpeg knows fewer subsamplings than TurboJPEG
            reason = sentence(error)
            if "extraneous bytes before marker 0xd9" in reason and NO_END not in notes:
                # libjpeg reports only its first warning; it came at the end marker, so the picture is complete. Without that
                # marker, it may be other data in place of the last rows.
                return *_decode(source, size, target, strict=False), notes
            if metadata and "extraneous bytes before marker" in reason:
                notes += (JUNK,)  # between segments, if the file can be read without it
            elif "Premature end" in reason and NO_END not in notes and _whole(source):
                return _tolerant(source + b"\xff\xd9", size, target, (*notes, NO_END))
            elif "Corrupt JPEG data" in reason or "Premature end" in reason:
                raise Truncated(f"the JPEG file ends early or is damaged ({reason})") from error
    return *_by_pillow(_plain(data), size, reason), notes


def _by_pillow(data: bytes, size: tuple[int, int], reason: str) -> tuple[NDArray[np.uint8], str]:
    """Decode unusual subsampling, which libjpeg supports and TurboJPEG rejects."""
    image = JpegImageFile(io.BytesIO(data))
    if image.size != size or image.mode not in ("L", "RGB", "CMYK"):
        raise UnsupportedFormat(f"this variant of JPEG is not supported ({reason})")
    pixels = np.array(image)
    if image.mode == "CMYK":
        return np.subtract(255, pixels), image.mode  # Pillow inverts it, with and without Adobe's marker
    # Pillow doesn't report data missing before the end marker; libjpeg fills the gap with mid grey.
    if b"\xff\xd9" not in data or (pixels[-1] == 128).all():
        raise Truncated("the JPEG file ends early: its end marker or its last row is missing")
    return pixels, image.mode


def _impossible(ink: NDArray[np.uint8]) -> bool:
    """Whether CMYK pixels can't be right as they are: full ink in all four colours, which no press prints, or a black page.
    Some writers leave out Adobe's marker but invert all the same; white then reads as full ink.
    """
    least = ink.min(axis=2)
    return bool((least > _FULL).mean() > _SHARE or (ink[:, :, 3] > _FULL).all())


def encode(pixels: NDArray[np.uint8], quality: int, icc: bytes | None) -> bytes:
    """Encode RGB [h, w, 3] or grey [h, w, 1] uint8 `pixels` as baseline JPEG, with the profile if given.

    Chroma is subsampled (4:2:0) below quality 90 and kept at full resolution (4:4:4) from 90 up. Raises ValueError.
    """
    space, sampling = ("GRAY", "Gray") if pixels.shape[2] == 1 else ("RGB", "444" if quality >= 90 else "420")
    data: bytes = simplejpeg.encode_jpeg(pixels, quality=quality, colorspace=space, colorsubsampling=sampling)
    if icc is None:
        return data
    parts = [icc[at : at + _PROFILE_PART] for at in range(0, len(icc), _PROFILE_PART)]
    if len(parts) > 255:
        raise ValueError(f"a profile of {len(icc):,} bytes does not fit into a JPEG file")
    segments = [
        b"\xff\xe2" + struct.pack(">H", len(part) + len(_PROFILE) + 4) + _PROFILE + bytes([number, len(parts)]) + part
        for number, part in enumerate(parts, 1)
    ]
    head = 4 + int.from_bytes(data[4:6], "big") if data[2:4] == b"\xff\xe0" else 2  # JFIF, if present, must come first
    return data[:head] + b"".join(segments) + data[head:]
