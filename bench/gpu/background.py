"""How fast rembg's models run on a GPU through onnxruntime, and how well the line feeds them, by number of cores.

    python -m bench.gpu.background [--minutes 8]             on a machine with a GPU; exit status 1 if a goal is missed
    python -m bench.gpu.background --cpu --small             with a small model on the CPU, to test this program

The model is U^2-Net as published, 44.0 M parameters, with random weights. First the session alone is measured, by
provider and batch size; then the whole line, from a 12-megapixel JPEG to a PNG of 1600 pixels, with a fake network and
store, by number of cores. TensorRT is included if onnxruntime has it. Measurements that would exceed the time limit are
reported as skipped.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Literal, get_args

import numpy as np
import onnxruntime

from bench.figures import Figure, figure
from bench.gpu.command import parse_arguments, print_figures, print_line
from bench.gpu.line import through_the_line
from bench.servers import photos
from imagemill.shared.messages import Job, Output
from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.memory import memory_of
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.operations.remove_background.model_families import FAMILIES
from imagemill.worker.operations.remove_background.onnx_model import NAMES, OnnxModel
from imagemill.worker.operations.remove_background.rembg import Rembg
from tests.models import FULL_WIDTH, u2net_onnx

GOAL, GOAL_CORES = 100.0, 16
"""Images per second, and the number of cores that the goal applies to."""
BATCHES, ROUNDS = (1, 2, 4, 8), 10
CORES = (2, 4, 8, 16)
IMAGES = 40
"""Images per core for the whole line."""
TENSORRT_SECONDS = 240.0  # building its engine included

Provider = Literal["cpu", "cuda", "tensorrt"]


def run(device: Device, providers: list[Provider], ends: float, *, small: bool) -> Iterator[Figure]:
    """Yield each figure once it is measured; `ends` is a time of the monotonic clock."""
    files, cores = photos(), sorted(os.sched_getaffinity(0))
    for provider in providers:
        if provider == "tensorrt" and time.monotonic() + TENSORRT_SECONDS > ends:
            print_line(name="tensorrt", skipped="not enough time left")
            continue
        here = replace(device, provider=provider)
        yield from alone(here, 1 if small else ROUNDS)
        operation = Rembg()
        operation.load(here)
        sizes = BatchSizes(memory_of(here, operation.spec.runtime))
        spec = Job(
            operation="remove-background", output=Output(url="s3://bench/out"), options=RembgRemoveBackground(model="u2net")
        )
        through_the_line(operation, spec, files, 4 if small else 40, sizes)  # opens the model and learns batch sizes
        for count in (count for count in CORES if count <= len(cores)):
            os.sched_setaffinity(0, cores[:count])  # applies to threads started from now on
            images = 4 if small else IMAGES * count
            rate = through_the_line(operation, spec, files, images, sizes)
            goal = GOAL if count == GOAL_CORES and provider == "cuda" else None
            yield figure(f"{provider}, whole line, {count} cores", rate, "images/s", goal)
        os.sched_setaffinity(0, cores)


def alone(device: Device, rounds: int) -> Iterator[Figure]:
    """The session with prepared tensors, without preprocessing and postprocessing."""
    family = FAMILIES["u2net"]
    session = OnnxModel(device.weights / "rembg" / "u2net.onnx", "u2net", device, family.size)
    tensor = family.tensor(np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), np.uint8))
    for batch in BATCHES:
        times = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            session.run([tensor] * batch)
            times.append(time.perf_counter() - start)
        yield figure(f"{device.provider}, session alone, batch {batch}", batch / median(times[1:]), "images/s")


def main() -> int:
    arguments = parse_arguments("background", "Measure rembg's models on a GPU.")
    available: list[Provider] = [name for name in get_args(Provider) if NAMES[name] in onnxruntime.get_available_providers()]
    providers: list[Provider] = ["cpu"] if arguments.cpu else [name for name in available if name != "cpu"]
    if not providers:
        message = f"onnxruntime {onnxruntime.__version__} has no GPU provider; to test this program, use --cpu --small"
        print(message, file=sys.stderr)
        return 2
    ends = time.monotonic() + arguments.minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        u2net_onnx(Path(folder) / "rembg" / "u2net.onnx", width=4 if arguments.small else FULL_WIDTH)
        device = Device(gpu=None if arguments.cpu else 0, threads=len(os.sched_getaffinity(0)), weights=Path(folder))
        print_line(device=_name(arguments.cpu), cores=device.threads, date=time.strftime("%Y-%m-%d"))
        return print_figures(run(device, providers, ends, small=arguments.small))


def _name(on_cpu: bool) -> str:
    if on_cpu:
        return "CPU"
    import pynvml

    pynvml.nvmlInit()
    return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))


if __name__ == "__main__":
    sys.exit(main())
