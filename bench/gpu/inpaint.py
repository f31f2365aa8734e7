"""Speed and memory of LaMa's generator on a GPU, and the error of half precision.

    python -m bench.gpu.inpaint [--minutes 7]             on a machine with a GPU; exit status 1 if a goal is missed
    python -m bench.gpu.inpaint --cpu --small             with a tiny generator on the CPU, to test this program

The generator has the published size and random weights, and runs in the engine's own LamaModel, from uint8 pictures to
uint8 pictures. It needs `imagemill[lama]` with a torch for the GPU.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.figures import Figure, figure
from bench.gpu.command import check_torch, parse_arguments, print_figures, print_line
from imagemill.shared.errors import OutOfMemory
from imagemill.worker.hardware.device import Device
from imagemill.worker.operations.inpaint.lama_model import LamaModel
from tests.generators import FULL, lama_file

GOAL = 100.0
"""Megapixels per second."""
GOAL_ERROR = 2.0
"""Mean difference of half precision to fp32, of 255."""
COMPILING = 120.0
"""Seconds that a compilation may take; it is skipped if less time is left."""
TILES, BATCHES, ROUNDS = (512, 1024), (1, 4, 8), 5


def run(device: Device, ends: float, *, small: bool = False, compiling: bool = True) -> Iterator[Figure]:
    """Yield each figure once it is measured; `ends` is a time of the monotonic clock."""
    best = 0.0
    tiles, rounds = ((64, 128), 2) if small else (TILES, ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        path = lama_file(Path(folder) / "lama.safetensors", **({} if small else FULL))
        exact = without_tf32(path, device, tiles[0])
        for compiled in (False, True) if compiling else (False,):
            for dtype in ("fp32", "fp16", "bf16"):
                if compiled and time.monotonic() > ends - COMPILING:
                    print_line(name=f"{dtype}, compiled", skipped="not enough time left")
                    continue
                session = LamaModel(path, replace(device, dtype=dtype, compile=compiled))
                if not compiled:
                    error = float(np.abs(painted(session, tiles[0]) - exact).mean())
                    yield figure(f"{dtype}: mean difference to fp32, of 255", error, "", GOAL_ERROR, at_most=True)
                for tile in tiles[:1] if compiled else tiles:
                    for batch in BATCHES[-1:] if compiled else BATCHES:
                        name = f"{dtype}{', compiled' if compiled else ''}, {batch} x {tile} x {tile}"
                        for result in speed(session, name, tile, batch, rounds):
                            best = max(best, result["value"] if result["unit"] == "MP/s" else 0.0)
                            yield result
                del session
    yield figure("fastest of these", best, "MP/s", GOAL)


def speed(session: LamaModel, name: str, tile: int, batch: int, rounds: int) -> list[Figure]:
    """Megapixels per second, and memory per tile without the weights."""
    on_gpu, pictures = session.device.type == "cuda", scene(tile, batch)
    try:
        session.run(*pictures)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            session.run(*pictures)  # copies its results to the host, so the GPU has finished
            seconds.append(time.perf_counter() - start)
    except OutOfMemory:
        return [figure(f"{name}: out of memory", 0.0)]
    figures = [figure(name, batch * tile * tile / 1e6 / statistics.median(seconds), "MP/s", rounds=rounds)]
    if on_gpu:
        used = (torch.cuda.max_memory_allocated() - before) / batch / 1e6
        figures.append(figure(f"{name}: memory per tile", used, "MB"))
    return figures


def without_tf32(path: Path, device: Device, tile: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    """A result in fp32 without TF32, which torch's convolutions use by default."""
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        return painted(LamaModel(path, replace(device, dtype="fp32")), tile)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def painted(session: LamaModel, tile: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    return session.run(*scene(tile, 1))[0].astype(np.int16)


def scene(tile: int, batch: int) -> tuple[list[Any], list[Any]]:
    """A batch of equal pictures, a noisy gradient, with a hole in a quarter of each."""
    y, x = np.mgrid[:tile, :tile].astype(np.float32) / tile
    noise = np.random.default_rng(0).normal(0, 12, (tile, tile, 3))
    picture = np.clip(np.stack([60 + 120 * x, 90 + 100 * y, 200 - 80 * x], axis=2) + noise, 0, 255).astype(np.uint8)
    hole = np.zeros((tile, tile), np.uint8)
    hole[tile // 4 : tile * 3 // 4, tile // 4 : tile * 3 // 4] = 255
    return [picture] * batch, [hole] * batch


def main() -> int:
    arguments = parse_arguments("inpaint", "Measure LaMa's generator on a GPU.", minutes=7.0)
    if not check_torch(arguments.cpu):
        return 2
    device = Device(threads=torch.get_num_threads()) if arguments.cpu else Device(gpu=0)
    ends = time.monotonic() + arguments.minutes * 60
    status = print_figures(run(device, ends, small=arguments.small, compiling=not arguments.cpu))
    return 0 if arguments.cpu else status


if __name__ == "__main__":
    sys.exit(main())
