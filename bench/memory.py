"""Whether memory stays flat while the rembg engine processes 3,000 images of mixed sizes.

    python -m bench.memory [ROUNDS]

Threads are like those of a worker's child. Memory is read after every 100 images, when none is in progress.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.figures import Figure, figure, print_figures
from tests.models import u2net_onnx

GOAL = 1.05
IMAGES, FIRST, STRETCH = 3000, 300, 100

PROGRAM = """
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from imagemill.worker.hardware.device import Device, give_back, pin, share_of_cores

weights, images, stretch = Path(sys.argv[1]), *map(int, sys.argv[2:])
device = Device(threads=share_of_cores(1), weights=weights)
pin(device)

import numpy as np
from imagemill.shared.messages import Item
from imagemill.shared.engines import parse_options
from imagemill.worker.operations import registry
from imagemill.worker.operations.base import Inputs
from imagemill.worker.imaging.picture import Picture

operation = registry.create("remove-background", "rembg")
operation.load(device)
inputs = Inputs(Item(index=0, source="https://bench.example/one.png"), parse_options("remove-background", "rembg", {}))
# Mostly small, so that it takes minutes and not an hour; some have several megapixels.
edges = np.exp(np.random.default_rng(0).uniform(np.log(64), np.log(800), (images, 2))).astype(int)
edges[::50] *= 4

def prepared(number):
    height, width = edges[number]
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = np.random.default_rng(number).integers(40, 90, (height, width, 1), np.uint8)
    pixels[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] += 120
    return operation.prepare(Picture(pixels), inputs)

def finished(work, outputs):
    return operation.finish(work, outputs).pixels.nbytes

def line(numbers):
    with ThreadPoolExecutor(4) as front, ThreadPoolExecutor(4) as back:
        ahead, behind = deque(), deque()
        for at in range(len(numbers) + 8):
            if at < len(numbers):
                ahead.append(front.submit(prepared, numbers[at]))
            if at >= 8:
                work = ahead.popleft().result()
                behind.append(back.submit(finished, work, operation.run(work.samples)))
            if len(behind) > 8:
                behind.popleft().result()

for start in range(0, images, stretch):
    line(range(start, min(start + stretch, images)))
    give_back()
    print(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6)
"""


def measure(weights: Path, images: int, first: int) -> tuple[float, float]:
    """MB in use during the first and the last `first` images of one process, as medians over stretches of 100."""
    command = [sys.executable, "-c", PROGRAM, str(weights), str(images), str(STRETCH)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    used, stretches = [float(line) for line in done.stdout.split()], first // STRETCH
    return statistics.median(used[:stretches]), statistics.median(used[-stretches:])


def run(rounds: int = 1) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        u2net_onnx(Path(folder) / "rembg" / "u2net.onnx")
        pairs = [measure(Path(folder), IMAGES, FIRST) for _ in range(rounds)]
    name = f"memory of a rembg node after {IMAGES} images"
    return [
        figure(f"{name} / after {FIRST}", [late / early for early, late in pairs], "", GOAL, at_most=True),
        figure(name, [late for _, late in pairs], "MB"),
    ]


if __name__ == "__main__":
    print_figures(run)
