"""How fast the codec decodes, scales and encodes, compared with Pillow on the same pixels.

    python -m bench.codec [ROUNDS]

Each round runs both sides of every comparison in turn, on one core; the value is the ratio of their medians. The photo
is one of scikit-image's, tiled by mirroring. Enlarging it instead would leave less detail per pixel than photos have,
and such smooth images suit JPEG and improve Pillow's PNGs by up to 20 % relative to ours.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import cv2
import numpy as np
from PIL import Image
from skimage import data

from bench.figures import Figure, figure, print_figures
from imagemill.worker.imaging import codec
from imagemill.worker.imaging.picture import Picture, Pixels

EDGE = 1600  # remove-background's default
LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class Comparison:
    """Two implementations of one task, and how many times faster ours should be."""

    name: str
    goal: float
    ours: Callable[[], Any]
    theirs: Callable[[], Any]


def run(rounds: int = 5) -> list[Figure]:
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
    size = len(_png(cut_out)) / len(_pillow_png(cut_out))
    figures.insert(1, figure("PNG of a 1600 x 1600 cut-out: bytes, times Pillow's", size, "x", 1.15, at_most=True))
    return figures


def _measure(comparisons: list[Comparison], rounds: int) -> list[Figure]:
    seconds: list[tuple[list[float], list[float]]] = [([], []) for _ in comparisons]
    for comparison in comparisons:  # warm up tables, caches and memory
        comparison.ours()
        comparison.theirs()
    for number in range(rounds):
        for comparison, (ours, theirs) in zip(comparisons, seconds, strict=True):
            sides = [(comparison.ours, ours), (comparison.theirs, theirs)]
            for work, times in reversed(sides) if number % 2 else sides:
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
    return [
        figure(comparison.name, median(theirs) / median(ours), "x", comparison.goal, rounds=rounds)
        for comparison, (ours, theirs) in zip(comparisons, seconds, strict=True)
    ]


def _photo(width: int, height: int) -> Pixels:
    photo = data.astronaut()
    more = ((0, max(0, height - photo.shape[0])), (0, max(0, width - photo.shape[1])), (0, 0))
    return np.ascontiguousarray(np.pad(photo, more, mode="symmetric")[:height, :width])


def _cut_out(side: int) -> Pixels:
    """The photo in an ellipse with soft edges that covers half the area; transparent pixels are black, as both sides write."""
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
    print_figures(run)
