"""CPU time that a photo takes in each stage of the line, apart from the model, the network and Redis.

    python -m bench.stages [ROUNDS]

remove-background with rembg's u2net and default options: 12-megapixel JPEGs in, PNGs of 1600 pixels out, on one thread.
The model's output is made up. Like that of U^2-Net with random weights, it leaves about 6 % of the result partly
transparent, on which the time of `finish` depends.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import cv2
import numpy as np
from numpy.typing import NDArray

from bench.figures import Figure, figure, print_figures
from bench.nodes import SPEC
from bench.servers import photos
from imagemill.shared.messages import Item
from imagemill.worker.checking.quality import check
from imagemill.worker.hardware.device import Device, pin
from imagemill.worker.imaging import codec, jpeg
from imagemill.worker.imaging.opencv import set_up
from imagemill.worker.operations.base import Inputs
from imagemill.worker.operations.remove_background.matte import foreground_colours
from imagemill.worker.operations.remove_background.rembg import Rembg

JPEG, GOAL = 24.0, 60.0
"""Milliseconds of libjpeg-turbo, and the goal for everything around the model, on the machine the goal was set on."""
STAGES = ("hash", "decode", "prepare", "finish", "check", "encode")
ALONE, RIM = "decode: libjpeg-turbo alone", "finish: the rim alone"


def run(rounds: int = 5) -> list[Figure]:
    with ProcessPoolExecutor(1, get_context("spawn"), _like_a_node) as pool:  # its settings can't be undone
        taken = pool.submit(_measured, rounds).result()
    for times in taken:
        times["sum"] = sum(times[stage] for stage in STAGES)
    return [
        *(figure(f"stages, CPU per photo: {name}", [times[name] for times in taken], "ms") for name in (*STAGES, ALONE, RIM)),
        figure("stages, CPU per photo: sum", [times["sum"] for times in taken], "ms", GOAL, at_most=True),
        figure("stages: sum / libjpeg-turbo", [times["sum"] / times[ALONE] for times in taken], "x", GOAL / JPEG, at_most=True),
    ]


def _like_a_node() -> None:
    device = Device(threads=1)
    pin(device)
    set_up(device)


def _measured(rounds: int) -> list[dict[str, float]]:
    """Per round, the milliseconds of each stage, as the mean over the photos."""
    files = photos()
    outputs = [_output(number) for number in range(len(files))]
    taken = []
    for _ in range(rounds + 1):
        clock = Clock()
        for file, output in zip(files, outputs, strict=True):
            _photo(file, output, clock)
        taken.append({name: 1000 * seconds / len(files) for name, seconds in clock.seconds.items()})
    return taken[1:]  # the first round fills caches


class Clock:
    """Adds up the CPU time of this thread by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.thread_time()
        yield
        self.seconds[name] += time.thread_time() - start


def _photo(file: bytes, output: NDArray[np.float32], clock: Clock) -> None:
    """What worker/line/stages.py does with a photo, and two parts of it once more."""
    operation, inputs = Rembg(), Inputs(Item(index=0, source="https://bench.example/photo.jpg"), SPEC.options)
    with clock("hash"):
        hashlib.sha256(file).hexdigest()
    with clock("decode"):
        header = codec.probe(file, max_pixels=64_000_000)
        picture = codec.decode(file, header, edge=operation.work_edge(SPEC.options))
    with clock("prepare"):
        work = operation.prepare(picture, inputs)
    with clock("finish"):
        made = operation.finish(work, [output])
    with clock("check"):
        best = check(made, picture, work, operation.spec, SPEC).picture
    with clock("encode"):
        encoded = codec.encode(best, format="png", quality=SPEC.output.quality)
    with clock("hash"):  # for the upload and for the cache
        for _ in range(2):
            hashlib.md5(encoded.data, usedforsecurity=False).hexdigest()
    with clock(ALONE):
        jpeg.decode(file, header.stored_size, picture.size)
    alpha, target = np.ascontiguousarray(best.pixels[..., 3]), best.pixels.copy()
    with clock(RIM):
        foreground_colours(picture.pixels, alpha, out=target)


def _output(number: int) -> NDArray[np.float32]:
    """A smooth random subject in the middle of U^2-Net's output: float32 [1, 320, 320], 0 to 1."""
    noise = np.random.default_rng(number).standard_normal((320, 320), np.float32)
    field = cv2.GaussianBlur(noise, (0, 0), 22, borderType=cv2.BORDER_REFLECT)
    down, across = np.mgrid[-1:1:320j, -1:1:320j]
    field = field / field.std() - 2.6 * np.hypot(down, across)
    return (1 / (1 + np.exp(-45 * (field - np.quantile(field, 0.67)))))[None].astype(np.float32)


if __name__ == "__main__":
    print_figures(run)
