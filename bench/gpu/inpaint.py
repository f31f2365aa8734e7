"""How fast LaMa's generator is on a GPU, what it takes of its memory, and how far half precision is off.

    python -m bench.gpu.inpaint [--cpu --small]

The published size with random weights, through the engine's own Session: uint8 pictures in, uint8 pictures out. Needs
`imagemill[lama]` with a torch for the GPU, and takes less than eight minutes: what is left of the time is not measured.
`--cpu --small` runs all of it with a tiny generator on the CPU, to prove the program; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
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

from imagemill.shared.errors import OutOfMemory
from imagemill.worker.hardware.device import Device
from imagemill.worker.operations.inpaint.lama_model import Session
from tests.generators import FULL, lama_file

GOAL = 100.0
"""Megapixels per second."""
GOAL_OFF = 2.0
"""Of 255, in the mean: what half precision may differ from fp32."""
SECONDS = 420.0
"""For all of it; the largest compilations are left out when less than `COMPILING` are left."""
COMPILING = 120.0
TILES, BATCHES, ROUNDS = (512, 1024), (1, 4, 8), 5

Figure = dict[str, Any]


def figure(
    name: str, value: float, unit: str, *, goal: float | None = None, holds: bool | None = None, rounds: int = 1
) -> Figure:
    return dict(name=name, value=float(f"{value:.4g}"), goal=goal, unit=unit, holds=holds, rounds=rounds)


def run(device: Device, *, small: bool = False, compiling: bool = True) -> Iterator[Figure]:
    """The figures one by one, as they are measured."""
    ends, best = time.perf_counter() + SECONDS, 0.0
    tiles, rounds = ((64, 128), 2) if small else (TILES, ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        path = lama_file(Path(folder) / "lama.safetensors", **({} if small else FULL))
        exact = exactly(path, device, tiles[0])
        for compiled in (False, True) if compiling else (False,):
            for dtype in ("fp32", "fp16", "bf16"):
                if compiled and time.perf_counter() > ends - COMPILING:
                    print(f"left out for want of time: {dtype}, compiled", file=sys.stderr)
                    continue
                session = Session(path, replace(device, dtype=dtype, compile=compiled))
                if not compiled:
                    off = float(np.abs(painted(session, tiles[0]) - exact).mean())
                    yield figure(f"{dtype}: mean difference to fp32, of 255", off, "", goal=GOAL_OFF, holds=off <= GOAL_OFF)
                for tile in tiles[:1] if compiled else tiles:
                    for batch in BATCHES[-1:] if compiled else BATCHES:
                        name = f"{dtype}{', compiled' if compiled else ''}, {batch} x {tile} x {tile}"
                        for one in speed(session, name, tile, batch, rounds):
                            best = max(best, one["value"] if one["unit"] == "MP/s" else 0.0)
                            yield one
                del session
    yield figure("the fastest of these", best, "MP/s", goal=GOAL, holds=best >= GOAL)


def speed(session: Session, name: str, tile: int, batch: int, rounds: int) -> list[Figure]:
    """Megapixels per second, and the memory that a tile takes beside the weights."""
    on_gpu, pictures = session.device.type == "cuda", scene(tile, batch)
    try:
        session.run(*pictures)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            session.run(*pictures)  # its results are on the host when it returns
            seconds.append(time.perf_counter() - start)
    except OutOfMemory:
        return [figure(f"{name}: does not fit into memory", 0.0, "")]
    made = [figure(name, batch * tile * tile / 1e6 / statistics.median(seconds), "MP/s", rounds=rounds)]
    if on_gpu:
        taken = (torch.cuda.max_memory_allocated() - before) / batch / 1e6
        made.append(figure(f"{name}: memory per tile", taken, "MB"))
    return made


def exactly(path: Path, device: Device, tile: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    """In fp32 without TF32, which torch's convolutions otherwise use for fp32."""
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        return painted(Session(path, replace(device, dtype="fp32")), tile)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def painted(session: Session, tile: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    return session.run(*scene(tile, 1))[0].astype(np.int16)


def scene(tile: int, batch: int) -> tuple[list[Any], list[Any]]:
    """A gradient with noise, a quarter of it a hole."""
    y, x = np.mgrid[:tile, :tile].astype(np.float32) / tile
    noise = np.random.default_rng(0).normal(0, 12, (tile, tile, 3))
    picture = np.clip(np.stack([60 + 120 * x, 90 + 100 * y, 200 - 80 * x], axis=2) + noise, 0, 255).astype(np.uint8)
    hole = np.zeros((tile, tile), np.uint8)
    hole[tile // 4 : tile * 3 // 4, tile // 4 : tile * 3 // 4] = 255
    return [picture] * batch, [hole] * batch


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.inpaint", description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="on the CPU, with --small: proves the program, measures nothing")
    parser.add_argument("--small", action="store_true", help="a tiny generator and tiny tiles")
    given = parser.parse_args()
    if given.cpu != given.small:
        parser.error("--cpu and --small go together")
    if not given.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --cpu --small tries the program without one")
    device = Device(threads=torch.get_num_threads()) if given.cpu else Device(gpu=0)
    print(
        f"on {'the CPU, for a trial' if given.cpu else torch.cuda.get_device_name()}, torch {torch.__version__}",
        file=sys.stderr,
    )
    figures = []
    for one in run(device, small=given.small, compiling=not given.cpu):
        figures.append(one)
        print(json.dumps(one), flush=True)
    return 0 if given.cpu else int(any(one["holds"] is False for one in figures))


if __name__ == "__main__":
    sys.exit(main())
