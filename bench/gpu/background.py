"""How fast rembg's models run on a GPU through onnxruntime, and how well the line feeds them, by cores.

    python -m bench.gpu.background [--minutes 8]             on a machine with a GPU; exit status 1 where a goal is missed
    python -m bench.gpu.background --cpu --small             the same code with a small model on the CPU: proves that it runs

U^2-Net as published, 44.0 M parameters, with random weights. First the session alone, by provider and batch; then the whole
line from a 12-megapixel JPEG to a PNG of 1600 pixels, with the network and the store in this process, by cores. TensorRT
is tried where this onnxruntime has it. What there is no time left for is named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime

from bench.gpu.line import through_the_line
from bench.servers import photos
from imagemill.shared.messages import Job, Output
from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.memory import memory_of
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.operations.remove_background.model_families import FAMILIES
from imagemill.worker.operations.remove_background.onnx_model import NAMES, Session
from imagemill.worker.operations.remove_background.rembg import Rembg
from tests.models import FULL_WIDTH, u2net_onnx

GOAL, GOAL_CORES = 100.0, 16
"""Images per second, with so many cores."""
BATCHES, ROUNDS = (1, 2, 4, 8), 10
CORES = (2, 4, 8, 16)
IMAGES = 40
"""On the line, for each core."""
TENSORRT_SECONDS = 240.0  # it builds an engine first

Provider = Literal["cpu", "cuda", "tensorrt"]
Figure = dict[str, Any]


def figure(name: str, value: float, goal: float | None = None) -> Figure:
    value = float(f"{value:.4g}")
    return dict(name=name, value=value, goal=goal, unit="images/s", holds=None if goal is None else value >= goal, rounds=1)


def run(device: Device, providers: list[Provider], ends: float, *, small: bool) -> Iterator[Figure]:
    """The figures one by one, as they are measured; `ends` is by the monotonic clock."""
    files, cores = photos(), sorted(os.sched_getaffinity(0))
    for provider in providers:
        if provider == "tensorrt" and time.monotonic() + TENSORRT_SECONDS > ends:
            print("left out for want of time: tensorrt", file=sys.stderr)
            continue
        here = replace(device, provider=provider)
        yield from alone(here, 1 if small else ROUNDS)
        operation = Rembg()
        operation.load(here)
        sizes = BatchSizes(memory_of(here, operation.spec.runtime))
        spec = Job(
            operation="remove-background", output=Output(url="s3://bench/out"), options=RembgRemoveBackground(model="u2net")
        )
        through_the_line(operation, spec, files, 4 if small else 40, sizes)  # opens the model and learns how large batches are
        for count in (cores_used for cores_used in CORES if cores_used <= len(cores)):
            os.sched_setaffinity(0, cores[:count])  # threads that are made from now on are kept to these
            images = 4 if small else IMAGES * count
            rate = through_the_line(operation, spec, files, images, sizes)
            goal = GOAL if count == GOAL_CORES and provider == "cuda" else None
            yield figure(f"{provider}, whole line, {count} cores", rate, goal)
        os.sched_setaffinity(0, cores)


def alone(device: Device, rounds: int) -> Iterator[Figure]:
    """The session over tensors that are there, without what comes before and after."""
    family = FAMILIES["u2net"]
    session = Session(device.weights / "rembg" / "u2net.onnx", "u2net", device, family.size)
    tensor = family.tensor(np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), np.uint8))
    for batch in BATCHES:
        spent = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            session.run([tensor] * batch)
            spent.append(time.perf_counter() - start)
        yield figure(f"{device.provider}, session alone, batch {batch}", batch / median(spent[1:]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.background", description="rembg's models on a GPU.")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it; what there is no time for is left out")
    parser.add_argument("--cpu", action="store_true", help="prove that this script runs, with --small")
    parser.add_argument("--small", action="store_true", help="a small model in place of the full one")
    given = parser.parse_args()
    if given.cpu != given.small:
        parser.error("--cpu and --small go together: the figures of a CPU are those of `python -m bench`")
    known: list[Provider] = [name for name in get_args(Provider) if NAMES[name] in onnxruntime.get_available_providers()]
    providers: list[Provider] = ["cpu"] if given.cpu else [name for name in known if name != "cpu"]
    if not providers:
        print(
            f"onnxruntime {onnxruntime.__version__} has no provider for a GPU; --cpu --small tries this script", file=sys.stderr
        )
        return 2
    ends, figures = time.monotonic() + given.minutes * 60, []
    with tempfile.TemporaryDirectory() as folder:
        u2net_onnx(Path(folder) / "rembg" / "u2net.onnx", width=4 if given.small else FULL_WIDTH)
        device = Device(gpu=None if given.cpu else 0, threads=len(os.sched_getaffinity(0)), weights=Path(folder))
        print(json.dumps({"device": _name(given.cpu), "cores": device.threads, "date": time.strftime("%Y-%m-%d")}), flush=True)
        for one in run(device, providers, ends, small=given.small):
            figures.append(one)
            print(json.dumps(one), flush=True)
    return 1 if any(one["holds"] is False for one in figures) else 0


def _name(on_cpu: bool) -> str:
    if on_cpu:
        return "CPU"
    import pynvml

    pynvml.nvmlInit()
    return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))


if __name__ == "__main__":
    sys.exit(main())
