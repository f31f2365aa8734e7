"""How fast pictures are read, scaled and written, beside Pillow doing the same on the same pixels.

    python -m bench.codec [ROUNDS]

Each round runs both sides of every comparison, one after the other, on one core; a value is the ratio of their
medians. The photo is one of scikit-image's, mirrored up to size: enlarging it would leave it with less detail per
pixel than photos have, and such smooth pictures are easier on JPEG and, against our PNGs, up to 20 % kinder to Pillow's.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import cv2
import numpy as np
from PIL import Image
from skimage import data

from imagemill.worker.imaging import codec
from imagemill.worker.imaging.picture import Picture, Pixels

EDGE = 1600  # remove-background's default
LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class Comparison:
    """Two ways to the same end, and how many times faster ours should be."""

    name: str
    goal: float
    ours: Callable[[], Any]
    theirs: Callable[[], Any]


def run(rounds: int = 5) -> list[dict[str, Any]]:
    """Measure `rounds` times; per figure its name, the value, goal, unit, whether the goal holds, and how many rounds."""
    photo = Picture(_photo(4000, 3000))
    file = codec.encode(photo, format="jpeg", quality=90).data
    cut_out = Picture(_cut_out(EDGE))
    comparisons = [
        Comparison("PNG of a 1600 x 1600 cut-out: times faster", 20, lambda: _png(cut_out), lambda: _pillow_png(cut_out)),
        Comparison("JPEG 4000 x 3000 to 1600: times faster", 1.5, lambda: _small(file), lambda: _pillow_small(file)),
        Comparison("4000 x 3000 scaled to 1600: times faster", 2.5, lambda: _scaled(photo), lambda: _pillow_scaled(photo)),
    ]
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        figures = _measure(comparisons, rounds)
    finally:
        cv2.setNumThreads(threads)
    name = "PNG of a 1600 x 1600 cut-out: bytes, times Pillow's"
    value = float(f"{len(_png(cut_out)) / len(_pillow_png(cut_out)):.4g}")
    figures.insert(1, {"name": name, "value": value, "goal": 1.15, "unit": "x", "holds": value <= 1.15, "rounds": 1})
    return figures


def _measure(comparisons: list[Comparison], rounds: int) -> list[dict[str, Any]]:
    seconds: list[tuple[list[float], list[float]]] = [([], []) for _ in comparisons]
    for one in comparisons:  # tables, caches and memory are there before the first measured round
        one.ours()
        one.theirs()
    for number in range(rounds):
        for one, (ours, theirs) in zip(comparisons, seconds, strict=True):
            sides = [(one.ours, ours), (one.theirs, theirs)]
            for work, times in reversed(sides) if number % 2 else sides:
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
    figures = []
    for one, (ours, theirs) in zip(comparisons, seconds, strict=True):
        value = float(f"{median(theirs) / median(ours):.4g}")
        figures.append(
            {"name": one.name, "value": value, "goal": one.goal, "unit": "x", "holds": value >= one.goal, "rounds": rounds}
        )
    return figures


def _photo(width: int, height: int) -> Pixels:
    photo = data.astronaut()
    more = ((0, max(0, height - photo.shape[0])), (0, max(0, width - photo.shape[1])), (0, 0))
    return np.ascontiguousarray(np.pad(photo, more, mode="symmetric")[:height, :width])


def _cut_out(side: int) -> Pixels:
    """The photo in an ellipse with soft edges over half the area; hidden colour cleared, so both sides write the same."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side * 2 - 1
    alpha = np.clip((1 - np.hypot(x / 0.7, y / 0.9)) * side / 16, 0, 1) * 255
    pixels = np.dstack([_photo(side, side), alpha.astype(np.uint8)])
    pixels[pixels[:, :, 3] == 0] = 0
    return pixels


def _png(picture: Picture) -> bytes:
    return codec.encode(picture, format="png", quality=90).data


def _pillow_png(picture: Picture) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture.pixels).save(out, "PNG")
    return out.getvalue()


def _small(file: bytes) -> Pixels:
    return codec.decode(file, codec.probe(file, max_pixels=64_000_000), edge=EDGE).pixels


def _pillow_small(file: bytes) -> Pixels:
    with Image.open(io.BytesIO(file)) as image:
        return np.array(image.resize(codec.fit(image.size, EDGE), LANCZOS))


def _scaled(picture: Picture) -> Pixels:
    return codec.resize(picture.pixels, codec.fit(picture.size, EDGE))


def _pillow_scaled(picture: Picture) -> Pixels:
    return np.array(Image.fromarray(picture.pixels).resize(codec.fit(picture.size, EDGE), LANCZOS))


if __name__ == "__main__":
    for figure in run(*(int(argument) for argument in sys.argv[1:2])):
        print(json.dumps(figure))
