"""From a picture and its matte to what was asked for: cut-out, backdrop, crop, canvas, shadow or mask.

What is as large as the picture is worked on in strips, straight into the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.worker.imaging.picture import Grey, Pixels, flatten, rgb_of
from imagemill.worker.imaging.scale import enlarged_part, fit, resize
from imagemill.worker.operations.remove_background.matte import Map, foreground_colours
from imagemill.worker.operations.remove_background.matting import matted
from imagemill.worker.operations.remove_background.opencv import EMPTY

NO_SHADOW = "no_shadow_found"
ENLARGED = "enlarged"

SEEN = 12  # alpha above which a pixel belongs to the subject when it is cropped to: mattes are rarely quite 0 around it
STRIP = 1 << 20  # pixels done at a time

SHADOW_EDGE = 320  # longest edge at which a shadow is looked for, in pixels
NEAR = 1.0  # how far around the subject the backdrop is learnt and a shadow kept, in its longer sides
GAP = 2  # small pixels around the matte that may be the subject's
FAINT = 0.02  # a shadow is at least this much darker than the backdrop (and three times its noise), as a share
DARKEST = 0.85  # darker is no shadow but a thing
TINT = 0.35  # how differently a shadow may darken red, green and blue, as a share of how much it darkens
ROUGHEST = 0.05  # noise of a backdrop, as a share, beyond which shadows can't be told
LARGEST = 1.5  # area of a shadow, in areas of the subject


@dataclass(frozen=True)
class Frame:
    """Which part of the picture goes where: `box` (left, top, right, bottom) scaled to `size`, laid at `at` in `whole`.

    `size`, `whole` are (width, height), `at` is (x, y); all in pixels.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    at: tuple[int, int]
    whole: tuple[int, int]

    def part(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """`box` of `pixels`, at `size`."""
        left, top, right, bottom = self.box
        return resize(pixels[top:bottom, left:right], self.size)


def compose(
    pixels: Pixels,
    alpha: Grey,
    options: RembgRemoveBackground,
    background: Pixels | None,
    notes: list[str],
    *,
    clean_rim: bool = True,
) -> Pixels:
    """The result: RGBA, RGB where it has a background or is a mask. Neither `pixels` nor `alpha` is changed.

    `pixels` is RGB or RGBA [h, w, 3 or 4] (then its alpha is multiplied in), `alpha` uint8 [h, w] the matte at the same
    size, `background` a picture of any size: scaled to cover, centred, on white where it is transparent.

    A crop is the box of the subject (alpha above `SEEN`) and of its shadow if kept, and `margin` on each side. Where
    that reaches beyond the picture there is more of the background, or nothing. A canvas is a square that the box and
    its margin are scaled to fill, larger or smaller. Where alpha is 0, colours are 0 too: the old background is gone.

    `notes` may get `empty_cutout` (then there is no crop, the picture's size stays), `no_shadow_found`, `enlarged`
    (a canvas asked for more pixels than there are), and what `matting.matted` notes.
    """
    alpha = _visible(pixels, alpha)
    empty = _box(alpha) is None
    if empty:
        notes.append(EMPTY)
    elif options.alpha_matting:
        alpha = _visible(pixels, matted(pixels, alpha, notes))
    shade = _shadow(pixels, alpha) if options.shadow and not empty else None
    if options.shadow and shade is None and not empty:
        notes.append(NO_SHADOW)
    frame = _frame(alpha, shade, options)
    if frame.size[0] > frame.box[2] - frame.box[0]:
        notes.append(ENLARGED)
    if options.mask_only:
        return _mask(alpha, frame)
    front, matte = frame.part(pixels), frame.part(alpha)
    result = np.zeros((*frame.whole[::-1], 4 if options.background is None and background is None else 3), np.uint8)
    (x, y), (width, height) = frame.at, frame.size
    inside = result[y : y + height, x : x + width]
    _cut(front, matte, inside)
    if clean_rim:
        foreground_colours(front, matte, out=inside)
    under = _backdrop(options.background, background, frame.whole)
    if under is not None:
        _lay_on(inside, matte, under[y : y + height, x : x + width], _strips_of(shade, alpha, frame))
        _fill_around(result, under, frame)
    elif shade is not None:
        _lay_on_shadow(inside, _strips_of(shade, alpha, frame))
    return result


def _visible(pixels: Pixels, alpha: Grey) -> Grey:
    """`alpha`, times that of `pixels` if they have one."""
    if pixels.shape[2] == 3:
        return alpha
    return np.asarray(cv2.multiply(alpha, cv2.extractChannel(pixels, 3), scale=1 / 255), np.uint8)


def _rows(size: tuple[int, int]) -> Iterator[slice]:
    step = max(1, STRIP // max(1, size[0]))
    for top in range(0, size[1], step):
        yield slice(top, min(top + step, size[1]))


def _box(alpha: Grey) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of the subject."""
    lines = np.zeros(len(alpha), bool)
    columns = np.zeros(alpha.shape[1], bool)
    for rows in _rows(alpha.shape[::-1]):
        seen = alpha[rows] > SEEN
        lines[rows] = seen.any(axis=1)
        columns |= seen.any(axis=0)
    if not lines.any():
        return None
    down, across = np.flatnonzero(lines), np.flatnonzero(columns)
    return int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1


def _frame(alpha: Grey, shade: Map | None, options: RembgRemoveBackground) -> Frame:
    height, width = alpha.shape
    box = _box(alpha) if options.crop else None
    if box is None:
        return Frame((0, 0, width, height), (width, height), (0, 0), (width, height))
    if shade is not None:
        left, top, right, bottom = _box(np.rint(shade * 255).astype(np.uint8)) or (0, 0, 0, 0)
        across, down = width / shade.shape[1], height / shade.shape[0]
        grown = np.array([left * across, top * down, right * across, bottom * down]).round().astype(int)
        if right:
            least, most = np.minimum(box, grown), np.maximum(box, grown)
            box = int(least[0]), int(least[1]), int(most[2]), int(most[3])
    left, top, right, bottom = box
    longer = max(right - left, bottom - top)
    margin = round(options.margin * longer)
    if options.canvas is None:
        inner = max(0, left - margin), max(0, top - margin), min(width, right + margin), min(height, bottom + margin)
        whole = right - left + 2 * margin, bottom - top + 2 * margin
        at = inner[0] - left + margin, inner[1] - top + margin
        return Frame(inner, (inner[2] - inner[0], inner[3] - inner[1]), at, whole)
    side = longer * (1 + 2 * options.margin)
    scale = options.canvas / side
    x, y = (left + right - side) / 2, (top + bottom - side) / 2  # the square's corner, in the picture
    inner = max(0, int(x)), max(0, int(y)), min(width, int(x + side) + 1), min(height, int(y + side) + 1)
    start = [min(max(round((inner[i] - (x, y)[i]) * scale), 0), options.canvas - 1) for i in (0, 1)]
    end = [min(max(round((inner[i + 2] - (x, y)[i]) * scale), start[i] + 1), options.canvas) for i in (0, 1)]
    return Frame(inner, (end[0] - start[0], end[1] - start[1]), (start[0], start[1]), (options.canvas, options.canvas))


def _mask(alpha: Grey, frame: Frame) -> Pixels:
    result = np.zeros((*frame.whole[::-1], 3), np.uint8)
    (x, y), (width, height) = frame.at, frame.size
    result[y : y + height, x : x + width] = frame.part(alpha)[..., None]
    return result


def _cut(front: Pixels, matte: Grey, inside: Pixels) -> None:
    """Into `inside`, which is 0, the colours (and alpha, if it has it) of what can be seen."""
    for rows in _rows(matte.shape[::-1]):
        some = front[rows][..., :3]
        if inside.shape[2] == 4:
            some = np.asarray(cv2.merge([*cv2.split(some), matte[rows]]), np.uint8)  # numpy's dstack takes five times as long
        cv2.copyTo(some, matte[rows], inside[rows])


def _backdrop(colour: str | None, picture: Pixels | None, size: tuple[int, int]) -> Pixels | None:
    """[h, w, 3]: the colour (#rrggbb), or the picture scaled to cover."""
    if picture is not None:
        return _covering(picture, size)
    if colour is None:
        return None
    return np.broadcast_to(np.array(rgb_of(colour), np.uint8), (size[1], size[0], 3))


def _covering(picture: Pixels, size: tuple[int, int]) -> Pixels:
    height, width = picture.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    across, down = (max(1, min(have, round(want / scale))) for have, want in zip((width, height), size, strict=True))
    left, top = (width - across) // 2, (height - down) // 2
    return resize(flatten(picture[top : top + down, left : left + across], 255), size)


def _fill_around(result: Pixels, under: Pixels, frame: Frame) -> None:
    (x, y), (width, height) = frame.at, frame.size
    middle = slice(y, y + height)
    for rows, columns in (
        (slice(0, y), slice(None)),
        (slice(y + height, None), slice(None)),
        (middle, slice(0, x)),
        (middle, slice(x + width, None)),
    ):
        result[rows, columns] = under[rows, columns]


def _strips_of(shade: Map | None, alpha: Grey, frame: Frame) -> Iterator[tuple[slice, Map | None]]:
    """The rows of the frame's inside, a strip at a time, and the shadow there (0..1), if there is one."""
    left, top, right, bottom = frame.box
    height, width = alpha.shape
    for rows in _rows(frame.size):
        if shade is None:
            yield rows, None
            continue
        across, down = frame.size[0] / (right - left), frame.size[1] / (bottom - top)
        first, shift = round(top * down), round(left * across)
        part = slice(first + rows.start, first + rows.stop), slice(shift, shift + frame.size[0])
        yield rows, enlarged_part(shade, (round(width * across), round(height * down)), part)


def _lay_on(inside: Pixels, matte: Grey, under: Pixels, strips: Iterator[tuple[slice, Map | None]]) -> None:
    for rows, shade in strips:
        below = np.ascontiguousarray(under[rows])
        if shade is not None:
            below = np.rint(below * (1 - shade[..., None])).astype(np.uint8)
        share = matte[rows].astype(np.float32) / np.float32(255)
        inside[rows] = cv2.blendLinear(np.ascontiguousarray(inside[rows]), below, share, 1 - share)


def _lay_on_shadow(inside: Pixels, strips: Iterator[tuple[slice, Map | None]]) -> None:
    """Black, as dense as the shadow, below what is in `inside` (RGBA, straight alpha)."""
    for rows, shade in strips:
        share = inside[rows][..., 3].astype(np.float32) / np.float32(255)
        both = share + (1 - share) * (0 if shade is None else shade)
        colours = inside[rows][..., :3] * (share / np.maximum(both, np.float32(1e-6)))[..., None]
        inside[rows][..., :3] = np.rint(colours)
        inside[rows][..., 3] = np.rint(both * 255)


def _shadow(pixels: Pixels, alpha: Grey) -> Map | None:
    """How dense the subject's shadow is, 0..1, at a small size [h, w]; None where there is none that can be told.

    A backdrop is fitted to what surrounds the subject. A shadow is what is darker than that, about alike in red, green and
    blue, and hangs together with the subject's lower half. Under the subject's edge it goes on as beside it.
    """
    size = fit((alpha.shape[1], alpha.shape[0]), SHADOW_EDGE)
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    rgb = small[..., :3].astype(np.float32) / np.float32(255)
    matte = np.asarray(cv2.resize(alpha, size, interpolation=cv2.INTER_AREA), np.uint8)
    box = _box(matte)
    if box is None or box[3] > len(matte) - GAP:  # cut off by the picture's lower edge: what it stands on can't be seen
        return None
    subject = cv2.dilate((matte > 4).view(np.uint8), np.ones((2 * GAP + 1, 2 * GAP + 1), np.uint8)).view(np.bool_)
    left, top, right, bottom = box
    reach = NEAR * max(right - left, bottom - top)
    around = np.outer(_fading(len(matte), top, bottom, reach), _fading(matte.shape[1], left, right, reach))
    ground = (around > 0) & ~subject
    if small.shape[2] == 4:
        ground &= small[..., 3] > 250
    fitted = _fitted(rgb, ground)
    if fitted is None:
        return None
    backdrop, noise = fitted
    kept = rgb / np.maximum(backdrop, 0.05)
    dark, tint = 1 - kept.mean(axis=2), kept.max(axis=2) - kept.min(axis=2)
    faint = max(FAINT, 3 * noise)
    like = ground & (dark > faint) & (dark < DARKEST) & (tint < faint + TINT * dark)
    own = _standing_on(like, subject, (top + bottom) // 2)
    if own is None:
        return None
    found = np.where(ground & own, np.maximum(dark, 0) * around, 0).astype(np.float32)
    _, nearest = cv2.distanceTransformWithLabels(subject.view(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    values = np.zeros(int(nearest.max()) + 1, np.float32)
    values[nearest[~subject]] = found[~subject]
    return np.asarray(np.clip(cv2.GaussianBlur(values[nearest], (0, 0), 1), 0, DARKEST), np.float32)


def _fading(length: int, first: int, last: int, reach: float) -> Map:
    """1 from `first` to `last` and near it, 0 from `reach` away: nothing ends abruptly but at the picture's edge."""
    at = np.arange(length)
    away = np.maximum(first - at, at - last + 1) / max(reach, 1)
    return np.clip((1 - away) * 4, 0, 1).astype(np.float32)


def _fitted(rgb: Map, ground: NDArray[np.bool_]) -> tuple[Map, float] | None:
    """The backdrop [h, w, 3] as a quadric through the brighter part of `ground`, and its noise as a share."""
    if np.count_nonzero(ground) < 200:
        return None
    height, width = ground.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j] if min(height, width) > 1 else np.zeros((2, height, width))
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=2)
    light = rgb.mean(axis=2)
    used = ground
    for _ in range(8):
        weights = np.linalg.lstsq(terms[used], rgb[used], rcond=None)[0]
        rest = light - (terms @ weights).mean(axis=2)
        spread = max(1.4826 * float(np.median(abs(rest[used]))), 1 / 255)
        used = ground & (rest > -1.5 * spread) & (rest < 3 * spread)  # what is darker may be the shadow
        if np.count_nonzero(used) < 100:
            return None
    backdrop = terms @ weights
    noise = spread / max(float(light[used].mean()), 0.05)
    return (np.asarray(backdrop, np.float32), noise) if noise < ROUGHEST else None


def _standing_on(like: NDArray[np.bool_], subject: NDArray[np.bool_], middle: int) -> NDArray[np.bool_] | None:
    """The parts of `like` that touch the lower half of the subject, a pixel wider; None without any."""
    square = np.ones((3, 3), np.uint8)
    _, labels = cv2.connectedComponents(cv2.morphologyEx(like.view(np.uint8), cv2.MORPH_OPEN, square), connectivity=8)
    touching = cv2.dilate(subject.view(np.uint8), np.ones((5, 5), np.uint8)).view(np.bool_)
    touching[:middle] = False
    wanted = np.setdiff1d(labels[touching], [0])
    own = np.isin(labels, wanted)
    if not len(wanted) or np.count_nonzero(own) > LARGEST * np.count_nonzero(subject):
        return None
    return cv2.dilate(own.view(np.uint8), np.ones((5, 5), np.uint8)).view(np.bool_)
