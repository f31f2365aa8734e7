"""Colour that a file states in numbers: code points (ITU-T H.273, in PNG, AVIF and HEIF), chromaticities and a gamma.

Each statement becomes the equivalent ICC profile, so everything downstream has only one form to handle.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from imagemill.shared.errors import UnsupportedFormat

Chromaticities = tuple[float, float, float, float, float, float, float, float]
"""x and y of white, red, green and blue."""

_D65, _C = (0.3127, 0.3290), (0.310, 0.316)
SRGB: Chromaticities = (*_D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
ADOBE_RGB: Chromaticities = (*_D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
_PRIMARIES: dict[int, Chromaticities] = {  # H.273, table 2
    1: SRGB,
    2: SRGB,  # "unknown", which counts only together with something known
    4: (*_C, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*_D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    8: (*_C, 0.681, 0.319, 0.243, 0.692, 0.145, 0.049),
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    10: (1 / 3, 1 / 3, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*_D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    22: (*_D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
# H.273, table 3. The curves of video cameras (1, 6, 11, 12, 14, 15) say how light was recorded, not how it is shown; programs
# disagree about the latter, and most show such pictures as they show all others: like sRGB.
_LIKE_SRGB = frozenset({1, 2, 6, 11, 12, 13, 14, 15})
_GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0, 17: 2.6}
_HDR = {16: "PQ", 18: "HLG"}

_SAME_GAMMA = 0.05  # below this, libpng doesn't tell gammas apart either: 1/2.2 stands for sRGB's curve
_NEAR = 0.001
_ENTRIES = 4 * 255 + 1  # of a curve: each of the 256 levels has one
_D50 = (0.9642, 1.0, 0.8249)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def known(primaries: int, transfer: int) -> bool:
    """Whether these code points say what the colours are."""
    return transfer in _HDR or (
        (primaries, transfer) != (2, 2) and primaries in _PRIMARIES and (transfer in _LIKE_SRGB or transfer in _GAMMAS)
    )


def by_code_points(primaries: int, transfer: int, *, full_range: bool = True, what: str) -> bytes | None:
    """The profile of RGB samples with these code points; None for sRGB and where a code point is unknown.

    Without `full_range`, black is 16 and white 235. `what` names the file in errors. Raises UnsupportedFormat for HDR: there
    is no single way to show it on an ordinary screen, and a bulk job shouldn't choose one.
    """
    if transfer in _HDR:
        raise UnsupportedFormat(f"{what} is an HDR picture ({_HDR[transfer]}); convert it to sRGB or Display P3 first")
    return _profile(_PRIMARIES[primaries], _GAMMAS.get(transfer), full_range) if known(primaries, transfer) else None


def by_gamma(gamma: float, chromaticities: Chromaticities | None = None) -> bytes | None:
    """The profile of samples that are light to the power of `gamma` (1 / 2.2, for instance), by default of sRGB's primaries.

    None for sRGB and for values without meaning.
    """
    if not 0.1 <= gamma <= 10 or (chromaticities is not None and not _sensible(chromaticities)):
        return None
    exponent = None if abs(gamma * 2.2 - 1) < _SAME_GAMMA else 1 / gamma
    return _profile(chromaticities or SRGB, exponent, True)


def adobe_rgb() -> bytes:
    """The profile of Adobe RGB (1998), which cameras state in EXIF alone."""
    profile = _profile(ADOBE_RGB, 563 / 256, True)
    assert profile is not None  # noqa: S101
    return profile


def _sensible(chromaticities: Chromaticities) -> bool:
    white_y = chromaticities[1]
    corners = np.array([(x, y, 1.0) for x, y in zip(chromaticities[2::2], chromaticities[3::2], strict=True)])
    inside = all(0 <= value <= 1.1 for value in chromaticities)
    return inside and white_y > 0.05 and abs(float(np.linalg.det(corners))) > 0.01


@lru_cache(maxsize=16)
def _profile(chromaticities: Chromaticities, exponent: float | None, full_range: bool) -> bytes | None:
    """The profile with one curve for all channels: a power, or sRGB's without `exponent`. None for sRGB itself."""
    near = all(abs(value - wanted) < _NEAR for value, wanted in zip(chromaticities, SRGB, strict=True))
    if near and exponent is None and full_range:
        return None
    to_d50, colorants = _colorants(chromaticities)
    level = np.arange(_ENTRIES) / (_ENTRIES - 1)
    if not full_range:
        level = np.clip((level * 255 - 16) / 219, 0, 1)
    light = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4) if exponent is None else level**exponent
    curve = b"curv\0\0\0\0" + struct.pack(">I", _ENTRIES) + np.round(light * 65535).astype(">u2").tobytes()
    tags = {
        b"desc": _text("RGB as stated by the file"),
        b"cprt": _text("No copyright"),
        b"wtpt": _xyz(np.array(_D50)),
        b"chad": b"sf32\0\0\0\0" + _fixed(to_d50.ravel()),
        **{kind: _xyz(colorants[:, at]) for at, kind in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    return _assembled(tags)


def _colorants(chromaticities: Chromaticities) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The matrices from the file's white to D50 (Bradford), and from linear RGB to XYZ under D50."""
    points = np.array(chromaticities).reshape(4, 2)
    white, *corners = (np.array([x, y, 1 - x - y]) for x, y in points)
    white = white / white[1]
    primaries = np.column_stack(corners)
    to_xyz = primaries * np.linalg.solve(primaries, white)
    scale = (_BRADFORD @ np.array(_D50)) / (_BRADFORD @ white)
    to_d50 = np.linalg.inv(_BRADFORD) @ (scale[:, None] * _BRADFORD)
    return to_d50, to_d50 @ to_xyz


def _fixed(values: NDArray[np.float64]) -> bytes:
    return np.round(values * 65536).astype(">i4").tobytes()


def _xyz(values: NDArray[np.float64]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(values)


def _text(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II4sII", 1, 12, b"enUS", len(encoded), 28) + encoded


def _assembled(tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 4.2, with these tags; equal ones are stored once. ICC.1:2004-10, chapters 7 and 9."""
    table, body, places = [], b"", dict[bytes, int]()
    start = 128 + 4 + 12 * len(tags)
    for kind, payload in tags.items():
        if payload not in places:
            places[payload] = start + len(body)
            body += payload + bytes(-len(payload) % 4)
        table.append(struct.pack(">4sII", kind, places[payload], len(payload)))
    head = struct.pack(">I4xI4s4s4s", start + len(body), 0x04200000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H4s", 2000, 1, 1, 0, 0, 0, b"acsp") + bytes(24) + struct.pack(">I", 1) + _fixed(np.array(_D50))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + b"".join(table) + body
