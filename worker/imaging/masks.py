"""Masks as people make them: a file to a map of what to fill, or BadMask with a sentence that says how to fix it.

A mask has nearly two values, and is soft only at its edges. A mask whose meaning is clear is read, with a note unless it is
white on black; everything else is refused, because a wrong hole would count as a success.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.shared.errors import BadMask, Truncated
from imagemill.shared.options.inpaint import MaskFrom
from imagemill.worker.imaging import opencv, png
from imagemill.worker.imaging.codec import decode
from imagemill.worker.imaging.facts import REDUCED
from imagemill.worker.imaging.headers import Header, probe, translated
from imagemill.worker.imaging.picture import Grey, Pixels, flatten
from imagemill.worker.imaging.scale import fit

ALPHA, INVERTED = "mask_read_as:alpha", "mask_read_as:inverted"
COLOUR, LEVELS = "mask_read_as:colour", "mask_read_as:levels"
NOTES = (ALPHA, COLOUR, INVERTED, LEVELS)
"""The hole is the mask's transparency, its dark part, its coloured part, or the brighter of two greys."""

HALF, ABSURD, AROUND, FRAMED = 0.5, 0.8, 0.75, 0.98
"""A mask that fills more than half of an image, and three quarters of its rim, may be inverted. It plainly is if it fills more
than the second of these shares, and the last of the rim."""

ALIKE = 24  # largest difference, of 255, between pixels of one value: JPEG compresses even areas with less error
DARK, BRIGHT = 40, 215  # ends between which a mask is read as it is
TINTED = 48  # difference between the channels of a colour from which it isn't a grey
OPAQUE = 250  # alpha from which a pixel was not rubbed out
EDGE, SMALL = 0.05, 16  # reach of a soft edge as a share of the longest side, and at least in pixels
STRAY = 0.002  # share of pixels of other values that are ignored
SCALE = 1024  # longest side in pixels at which shapes are looked at
THIN = 8  # half the width in pixels, at that size, of what can be a line
HOLLOW = 4  # areas of the line that an outline encloses at least
MOST_COLOURS = 8  # a drawing has no more; with more, it is a picture
SAMPLE = 250_000  # pixels that show which colours are frequent
STRIP = 1 << 20  # pixels processed at once
LOSSY = {"jpeg", "webp", "avif"}

HOW = "paint the area to fill white on black, or rub it out of the picture and save that as PNG"


class Mask(NamedTuple):
    """What to fill: `levels` uint8 [height, width], 255 in the hole and soft at its edges, and how that was read."""

    levels: Grey
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Tones:
    """The two values of a picture, its `background` being the more frequent one, and where each pixel lies between them.

    `share` is 0 on the background and 255 on the paint; `other` is above 0 where a pixel is neither.
    """

    background: NDArray[np.float32]
    paint: NDArray[np.float32]
    share: Grey
    other: Grey


def read_mask(data: bytes, *, max_pixels: int, mask_from: MaskFrom = "auto") -> Mask:
    """Read a mask from an image file of any format: upright, without colour management.

    `mask_from` is that of InpaintOptions. Raises BadMask for a file that is not a mask or is ambiguous, and the errors of
    `probe` and `decode`.
    """
    header = probe(data, max_pixels=max_pixels)
    pixels, notes = _samples(data, header)
    with opencv.translated("reading the mask"):
        alpha = pixels[:, :, 3] if pixels.shape[2] == 4 else None
        if alpha is not None and int(alpha.max()) - int(alpha.min()) <= ALIKE and alpha.max():
            alpha = None  # it is the same everywhere
        if mask_from == "luma":
            return Mask(_brightness(pixels), notes)
        if mask_from == "alpha" and alpha is None:
            raise BadMask("it has no transparent parts, which mask_from=alpha needs: set mask_from=auto, or save it as PNG")
        picture = alpha is not None and not _of_one_colour(pixels)
        if mask_from == "alpha" and alpha is not None:
            return Mask(255 - alpha if picture else np.ascontiguousarray(alpha))
        if alpha is None:
            mask = _drawing(np.ascontiguousarray(pixels[:, :, :3]), lossy=header.format in LOSSY)
        else:
            mask = _rubbed_out(pixels, alpha) if picture else _painted(alpha)
        if mask_from == "inverted":
            return Mask(255 - mask.levels)
        return _plain(mask._replace(notes=mask.notes or notes), picture=picture)


def _plain(mask: Mask, *, picture: bool) -> Mask:
    """The mask, or its opposite if it would fill nearly everything. BadMask if either may be meant, or if it is an
    outline."""
    filled = mask.levels > 127
    share = np.count_nonzero(filled) / filled.size
    if HALF < share < 1:
        rim = np.concatenate([filled[0], filled[-1], filled[:, 0], filled[:, -1]]).mean()
        if not picture and rim < AROUND:
            return mask
        if picture or share < ABSURD or rim < FRAMED:
            raise BadMask(
                f"it would fill {share:.0%} of the image, so it may be inverted: set mask_from=inverted to fill the rest, or "
                f"mask_from={'alpha' if ALPHA in mask.notes else 'luma'} to fill this"
            )
        mask = Mask(255 - mask.levels, mask.notes if ALPHA in mask.notes else (INVERTED,))
    if _is_outline(mask.levels):
        raise BadMask("it is an outline: fill the shape with white, or set mask_from=luma to fill only the line")
    return mask


def _samples(data: bytes, header: Header) -> tuple[Pixels, tuple[str, ...]]:
    """The file's pixels; of a 16-bit file whose samples are all below 256, and so next to black, the lower bytes.

    Raises BadMask where those can't be had: TIFF is read in another process, which passes 8 bits only.
    """
    pixels = decode(data, header, icc="keep").pixels
    if REDUCED not in header.notes or (pixels[:, :, :3] > 1).any():
        return pixels, ()
    if header.format != "png":
        raise BadMask("it has 16 bits per sample and none that is brighter than 1 % of white: save it with 8 bits")
    low = _low_bytes(data)
    return (low, (LEVELS,)) if low.any() else (pixels, ())


def _low_bytes(data: bytes) -> Pixels:
    """The lower bytes of a PNG file of 16 bits: RGB [h, w, 3] or RGBA [h, w, 4]."""
    with translated("png"):
        found = cv2.imdecode(np.frombuffer(png.checked(data)[0], np.uint8), cv2.IMREAD_UNCHANGED)
        if found is None:
            raise Truncated("the PNG file is damaged")
        if found.ndim == 2:
            found = np.dstack([found] * 3)
        order = cv2.COLOR_BGRA2RGBA if found.shape[2] == 4 else cv2.COLOR_BGR2RGB
        return np.ascontiguousarray(cv2.cvtColor(found, order).astype(np.uint8))


def _brightness(pixels: Pixels) -> Grey:
    """Brightness [h, w], over black where transparent."""
    return np.asarray(cv2.cvtColor(flatten(pixels, 0)[:, :, :3], cv2.COLOR_RGB2GRAY), np.uint8)


# --- masks with transparency ------------------------------------------------------------------------------------------


def _painted(alpha: Grey) -> Mask:
    """The hole is the paint on a transparent layer."""
    tones = _tones(np.dstack([alpha] * 3))
    if tones is None and not alpha.any():
        return Mask(np.ascontiguousarray(alpha))
    if tones is None or _spread_out(tones):
        raise BadMask(f"its transparency has more than two levels: {HOW}, or set mask_from=alpha to use it as it is")
    ends = sorted((tones.background[0], tones.paint[0]))
    if ends[0] <= DARK and ends[1] >= BRIGHT:
        return Mask(np.ascontiguousarray(alpha), (ALPHA,))
    return Mask(tones.share if tones.background[0] < tones.paint[0] else 255 - tones.share, (ALPHA,))


def _rubbed_out(pixels: Pixels, alpha: Grey) -> Mask:
    """The hole is what was rubbed out of a picture, even if only partly."""
    some = _sample(pixels)
    solid = some[some[:, :, 3] >= OPAQUE][:, None, :3]
    tones = _tones(np.ascontiguousarray(solid)) if len(solid) else None
    if tones is not None and np.count_nonzero(tones.other) <= STRAY * tones.other.size:
        raise BadMask(
            "it shows a drawing and has transparent parts: set mask_from=luma to fill what is bright, or mask_from=alpha to "
            "fill what is transparent"
        )
    _painted(alpha)  # refuses what fades out
    return Mask(np.where(alpha < OPAQUE, np.uint8(255), np.uint8(0)), (ALPHA,))


def _of_one_colour(pixels: Pixels) -> bool:
    """Whether everything visible has nearly one colour; pixels that are nearly transparent, and stray ones, don't count."""
    alpha, some = pixels[:, :, 3], _sample(pixels)
    seen = min(OPAQUE, int(alpha.max()))
    samples = some[some[:, :, 3] >= seen][:, :3]
    visible = alpha >= seen
    colour = np.median(samples if len(samples) else pixels[visible][:, :3], axis=0)
    unlike = visible & (_away(np.ascontiguousarray(pixels[:, :, :3]), colour) > ALIKE)
    return bool(np.count_nonzero(unlike) <= STRAY * np.count_nonzero(visible))


# --- masks without transparency ---------------------------------------------------------------------------------------


def _drawing(rgb: Pixels, *, lossy: bool) -> Mask:
    """The hole is the brighter of two values, or the coloured one if the other is grey."""
    tones = _tones(rgb)
    if tones is None:
        return _faint(rgb, lossy=lossy)
    if _spread_out(tones):
        raise BadMask(f"it is {_too_much(rgb)}, and a mask has two values: {HOW}, or set mask_from=luma to use its brightness")
    levels = tones.share
    tinted, ground_tinted = (bool(np.ptp(colour) > TINTED) for colour in (tones.paint, tones.background))
    if (ground_tinted, _luma(tones.background)) > (tinted, _luma(tones.paint)):
        levels = 255 - levels
    ends = sorted((_luma(tones.background), _luma(tones.paint)))
    if tinted or ground_tinted:
        return Mask(levels, (COLOUR,))
    if ends[0] <= DARK and ends[1] >= BRIGHT:
        return Mask(_brightness(rgb))
    return Mask(levels, (LEVELS,))


def _faint(rgb: Pixels, *, lossy: bool) -> Mask:
    """A mask without contrast: all black, all white, or of the numbers 0 and 1."""
    brightness = _brightness(rgb)
    low, high = int(brightness.min()), int(brightness.max())
    if low >= BRIGHT or not rgb.any() or (lossy and high <= ALIKE):
        return Mask(np.full_like(brightness, 255 if low >= BRIGHT else 0))
    marked = rgb.any(axis=2)
    if lossy or marked.all() or len(np.unique(rgb[marked], axis=0)) > 1:
        raise BadMask(f"it has hardly any contrast (levels {low} to {high}): {HOW}")
    return Mask(np.where(marked, np.uint8(255), np.uint8(0)), (LEVELS,))


def _luma(colour: NDArray[np.float32]) -> float:
    return float(colour @ (0.299, 0.587, 0.114))


def _too_much(rgb: Pixels) -> str:
    """What a picture with more than two values is, in words."""
    codes = np.bincount(_codes(_sample(rgb)).ravel(), minlength=4096)
    often = int(np.count_nonzero(codes > STRAY * codes.sum()))
    return (
        f"a drawing in {often} colours"
        if 2 < often <= MOST_COLOURS and codes.max() > HALF * codes.sum()
        else "a picture, or soft beyond its edges"
    )


# --- values and shapes ------------------------------------------------------------------------------------------------


def _sample(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Evenly spaced pixels: enough to know what is frequent."""
    step = math.ceil(math.sqrt(pixels.shape[0] * pixels.shape[1] / SAMPLE))
    return pixels[::step, ::step]


def _codes(rgb: Pixels) -> NDArray[np.uint16]:
    """Each pixel's colour, with four bits per channel."""
    red, green, blue = (rgb[..., channel].astype(np.uint16) >> 4 for channel in range(3))
    return np.asarray(red << 8 | green << 4 | blue, np.uint16)


def _away(rgb: Pixels, colour: NDArray[np.floating]) -> Grey:
    """The largest difference of a channel [h, w] from a colour."""
    red, green, blue = cv2.split(cv2.absdiff(rgb, np.append(np.rint(colour), 0.0)))
    return np.asarray(cv2.max(cv2.max(red, green), blue), np.uint8)


def _tones(rgb: Pixels) -> _Tones | None:
    """The two values of RGB [h, w, 3], and what lies between; None if there is hardly any contrast."""
    some = _sample(rgb)
    codes = _codes(some)
    background = some[codes == np.bincount(codes.ravel()).argmax()].mean(axis=0)
    away = _away(rgb, background)
    if away.max() <= ALIKE:
        return None
    beyond = np.cumsum(np.bincount(away.ravel(), minlength=256)[ALIKE + 1 :])
    far = ALIKE + 1 + int(np.searchsorted(beyond, 0.995 * beyond[-1]))
    paint = np.array(cv2.mean(rgb, (away >= 0.9 * far).view(np.uint8))[:3])
    axis = paint - background
    length = max(float(axis @ axis), 1.0)
    share, other = np.empty(away.shape, np.uint8), np.empty(away.shape, np.uint8)
    along = np.append(axis, -axis @ background) / length  # as matrices that OpenCV applies to (red, green, blue, 1)
    beside = np.hstack([np.eye(3), -background[:, None]]) - np.outer(axis, along)
    rows = max(1, STRIP // rgb.shape[1])
    for top in range(0, len(rgb), rows):
        strip = slice(top, top + rows)
        colours = rgb[strip].astype(np.float32)
        level = cv2.transform(colours, 255 * along[None]).reshape(colours.shape[:2])
        share[strip] = np.clip(np.rint(level), 0, 255)
        red, green, blue = cv2.split(np.abs(cv2.transform(colours, beside)))
        between = (share[strip] > ALIKE) & (share[strip] < 255 - ALIKE)
        brighter = level > 255 + ALIKE * 255 / np.abs(axis).max(initial=1)  # beyond the paint: another value
        other[strip] = between | brighter | (cv2.max(cv2.max(red, green), blue) > ALIKE)
    return _Tones(background.astype(np.float32), paint.astype(np.float32), share, other)


def _spread_out(tones: _Tones) -> bool:
    """Whether other values lie elsewhere than between background and paint, within the reach of a soft edge."""
    if not tones.other.any():
        return False
    height, width = tones.share.shape
    size = fit((width, height), SCALE // 2)
    reach = round(max(EDGE * max(size), SMALL * max(size) / max(width, height))) or 1
    around = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    near = np.ones((size[1], size[0]), np.bool_)
    for end in (tones.share <= ALIKE, tones.share >= 255 - ALIKE):
        near &= cv2.dilate(_small(end & (tones.other == 0), size), around) > 0
    stray = cv2.resize(tones.other * np.float32(1), size, interpolation=cv2.INTER_AREA)[~near].sum() / near.size
    paint = np.count_nonzero(tones.share > 127) / tones.share.size
    return bool(stray > max(STRAY, EDGE * min(paint, 1 - paint)))


def _small(shape: NDArray[np.bool_], size: tuple[int, int]) -> Grey:
    """A shape at a smaller size: above 0 in each pixel that it reaches."""
    return np.asarray(np.ceil(cv2.resize(shape.astype(np.float32), size, interpolation=cv2.INTER_AREA)), np.uint8)


def _is_outline(levels: Grey) -> bool:
    """Whether the mask is only a closed line around an empty area."""
    height, width = levels.shape
    line = _small(levels > 127, fit((width, height), SCALE))
    parts, _ = cv2.connectedComponents(line, connectivity=8)
    outlines, _ = cv2.findContours(line, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    area = cv2.countNonZero(line)
    if not area or parts - 1 != len(outlines):  # something is drawn within
        return False
    filled = cv2.countNonZero(cv2.drawContours(np.zeros_like(line), outlines, -1, 1, cv2.FILLED))
    return filled - area >= HOLLOW * area and cv2.distanceTransform(line, cv2.DIST_L2, 3).max() <= THIN
