"""Stable Diffusion 1.5 with a ControlNet at full size on an NVIDIA GPU: speed, memory, and how well the line feeds it.

    python -m bench.gpu.stylize [--minutes 8]             on a machine with a GPU; exit status 1 if a goal is missed
    python -m bench.gpu.stylize --cpu --small             with a small pipeline on the CPU, to test this program

The models have the published sizes and random weights, and run at 512 x 512 with 25 steps and guidance, image-to-image.
A batch's time is the median of several runs after a warm-up. In fp32 only a few steps are run and the rest is
extrapolated, as the time of an image is a fixed part plus its steps. Measurements that would exceed the time limit are
reported as skipped.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import cv2
import numpy as np
import pytest
import torch

from bench.figures import Figure, figure
from bench.gpu.command import check_torch, parse_arguments, print_line
from bench.gpu.line import through_the_line
from imagemill.shared.messages import Job, Output
from imagemill.shared.options.stylize import DiffusionStylize
from imagemill.shared.settings import DiffusionSettings
from imagemill.worker.hardware.device import Device
from imagemill.worker.operations.stylize.diffusion import Diffusion, edges_of
from imagemill.worker.operations.stylize.pipeline import Canvas, Pipeline
from tests.pipelines import FULL, SMALL, pipeline_folder
from tests.unit.worker.operations.conformance import scene

TERAFLOP = 56.8
"""Per text-to-image of 25 steps with guidance: UNet 0.803 and ControlNet 0.283 per forward pass, VAE decoding 2.51."""
BATCHES = (1, 2, 4, 8, 16)
DAY = 86_400
LOOK = {"prompt": "a product on white", "negative_prompt": "blurry", "steps": 25, "strength": 0.5, "cfg": 7.5, "long_edge": 512}


@dataclass
class Bench:
    """The settings, the time limit and the results so far."""

    weights: Path
    device: Device
    ends: float
    side: int
    batches: tuple[int, ...]
    options: DiffusionStylize
    others: int = 0  # bytes that other pipelines use
    figures: list[Figure] = field(default_factory=list)
    rates: dict[tuple[str, int], float] = field(default_factory=dict)
    peaks: dict[tuple[str, int], int] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.gpu is not None

    def report(self, name: str, value: float, unit: str = "", goal: float | None = None) -> None:
        """Keep a figure and print it. Goals apply only to GPUs."""
        self.figures.append(figure(name, value, unit, goal if self.on_gpu else None))
        print_line(**self.figures[-1])

    def load(self, *, dtype: Literal["auto", "fp32"] = "auto", compiled: bool = False) -> Pipeline:
        """A new pipeline; memory used before is not counted as its own."""
        self.others = torch.cuda.memory_allocated() if self.on_gpu else 0
        settings = DiffusionSettings(warm_up=())
        return Pipeline("sd15-canny", replace(self.device, dtype=dtype, compile=compiled, diffusion=settings))

    @contextmanager
    def within(self, name: str, seconds: float) -> Iterator[bool]:
        """Whether `seconds` are left; prints `name` as skipped if not."""
        enough = time.monotonic() + seconds < self.ends
        if not enough:
            print_line(name=name, skipped=f"less than {seconds:.0f} s left")
        yield enough

    def canvases(self, count: int) -> list[Canvas]:
        pixels = scene(self.side, self.side)
        return [Canvas(pixels, edges_of(pixels, 100, 200), 42)] * count

    def seconds(self, pipeline: Pipeline, batch: int, options: DiffusionStylize, runs: int = 2) -> float:
        """Seconds for a batch, run as `Diffusion.run` does; afterwards torch knows the peak of memory."""
        canvases, times = self.canvases(batch), []
        pipeline.run(canvases, options.model_copy(update={"steps": 1}))
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(runs):
            start = time.perf_counter()
            results = pipeline.run(canvases, options)  # copies pixels to the host, so the GPU has finished
            times.append(time.perf_counter() - start)
            assert len(results) == batch
        return median(times)

    def measure(self, mode: str, pipeline: Pipeline, batch: int, *, few: bool) -> None:
        """Report images per second and peak memory of a batch; extrapolate from a `few` steps if asked."""
        if few:
            low, high = 2, 6
            times = [
                self.seconds(pipeline, batch, self.options.model_copy(update={"steps": steps}), 1) for steps in (low, high)
            ]
            step = (times[1] - times[0]) / (high - low)
            seconds = max(times[1], times[0] + step * (self.options.steps - low))
        else:
            seconds = self.seconds(pipeline, batch, self.options)
        self.rates[mode, batch] = batch / seconds
        self.peaks[mode, batch] = torch.cuda.max_memory_allocated() - self.others if self.on_gpu else 0
        self.report(f"{mode}, batch {batch}", batch / seconds, "images/s")
        self.report(f"{mode}, batch {batch}: peak memory", self.peaks[mode, batch] / 2**30, "GiB")


# --- what is measured -------------------------------------------------------------------------------------------------


def eager(bench: Bench) -> Pipeline:
    """fp16 with all batch sizes, then 4 steps without guidance."""
    pipeline = bench.load()
    for batch in bench.batches:
        bench.measure("fp16 eager", pipeline, batch, few=False)
    largest = bench.batches[-1]
    quick = bench.options.model_copy(update={"steps": 4, "cfg": 1.0, "scheduler": "lcm"})
    rate = largest / bench.seconds(pipeline, largest, quick)
    bench.report("4 steps without guidance / 25 steps with guidance", rate / bench.rates["fp16 eager", largest], "x", 5.0)
    return pipeline


def differences(bench: Bench, pipeline: Pipeline) -> None:
    """How much an image differs when repeated and in a batch; deterministic algorithms must reproduce it exactly."""
    alone, again = (pipeline.run(bench.canvases(1), bench.options)[0] for _ in range(2))
    together = pipeline.run(bench.canvases(bench.batches[-1]), bench.options)
    fixed = [pipeline.run(bench.canvases(1), bench.options.model_copy(update={"deterministic": True}))[0] for _ in range(2)]
    if any(isinstance(result, Exception) for result in (alone, again, *together, *fixed)):
        print_line(name="differences", skipped="random weights gave no finite image")
        return

    def difference(first: Any, second: Any) -> float:
        return float(np.abs(first.pixels.astype(int) - second.pixels).mean())

    bench.report("alone, twice: mean difference", difference(alone, again), "of 255")
    most = max(difference(alone, result) for result in together)
    bench.report(f"alone and in a batch of {bench.batches[-1]}: mean difference", most, "of 255")
    bench.report("deterministic, twice: the same pixels", float(difference(*fixed) == 0), "", 1.0)


def compiled(bench: Bench) -> None:
    """Compiled models, largest batch first: the goal needs it, and every shape takes long to compile."""
    with pytest.MonkeyPatch.context() as patch:
        if not bench.on_gpu:  # only trace: compiling C++ takes minutes and says nothing about a GPU
            build = torch.nn.Module.compile
            patch.setattr(torch.nn.Module, "compile", lambda module, **options: build(module, backend="eager", **options))
        pipeline = bench.load(compiled=True)
    for batch in sorted(bench.batches, reverse=True):
        with bench.within(f"fp16 compiled, batch {batch}", 110 if bench.on_gpu else 0) as enough:
            if enough:
                bench.measure("fp16 compiled", pipeline, batch, few=False)


def full_precision(bench: Bench) -> None:
    """The same in fp32."""
    pipeline = bench.load(dtype="fp32")
    for batch in bench.batches:
        with bench.within(f"fp32 eager, batch {batch}", 5 * batch if bench.on_gpu else 0) as enough:
            if enough:
                bench.measure("fp32 eager", pipeline, batch, few=True)
    for batch in bench.batches:
        if ("fp32 eager", batch) in bench.peaks and bench.on_gpu:
            saved = 1 - bench.peaks["fp16 eager", batch] / bench.peaks["fp32 eager", batch]
            bench.report(f"memory that fp16 saves, batch {batch}", saved, "", 0.4 if batch == bench.batches[-1] else None)


def ratios(bench: Bench) -> None:
    """The ratios that have goals."""
    mode = "fp16 compiled" if ("fp16 compiled", bench.batches[-1]) in bench.rates else "fp16 eager"
    best = bench.rates[mode, bench.batches[-1]]
    if mode == "fp16 compiled":
        bench.report(f"batch {bench.batches[-1]} compiled / batch 1 eager", best / bench.rates["fp16 eager", 1], "x", 5.0)
    bench.report(f"{mode}, batch {bench.batches[-1]}: images per day", best * DAY)
    if bench.on_gpu:
        peak = matmul_rate()
        bench.report("fp16 matrix product, 8192 x 8192", peak, "TFLOP/s")
        bench.report(f"{mode}: share of that used", best * TERAFLOP / peak, "", 0.4)


def matmul_rate() -> float:
    """TFLOP/s that this GPU reaches in practice; data sheets promise more."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    for _ in range(5):
        left @ right
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(30):
        left @ right
    torch.cuda.synchronize()
    return 30 * 2 * 8192**3 / (time.perf_counter() - start) / 1e12


def end_to_end(bench: Bench, pipeline: Pipeline) -> None:
    """The flow, with a fake network, store and ledger, compared with a bare loop."""
    largest = bench.batches[-1]
    images = largest * (4 if bench.on_gpu else 2)
    operation = Diffusion()
    operation.load(bench.device)
    operation._pipeline.get(lambda: "sd15-canny", lambda _: pipeline)
    encoded, file = cv2.imencode(".jpg", scene(1500, 1500), [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert encoded
    spec, ratios = Job(operation="stylize", output=Output(url="s3://bench/out"), options=bench.options), []
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(images // largest):
            pipeline.run(bench.canvases(largest), bench.options)
        bare = images / (time.perf_counter() - start)
        ratios.append(through_the_line(operation, spec, [file.tobytes()], images) / bare)
        bench.report("bare loop", bare, "images/s")
    bench.report("end to end / bare loop", median(ratios), "x", 0.95)


def tune(bench: Bench, pipeline: Pipeline) -> None:
    """Compare the batch size that `imagemill tune` finds with the largest that fits, in memory for 8 to 16 images."""
    if not bench.on_gpu:
        print_line(name="tune", skipped="needs a GPU")
        return
    from imagemill.worker.hardware.memory import memory_of
    from imagemill.worker.line.batch_sizes import BatchSizes
    from imagemill.worker.tuning.trials import BatchTrials

    half = (bench.peaks["fp16 eager", 8] + bench.peaks["fp16 eager", 16]) / 2
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(half / torch.cuda.get_device_properties(0).total_memory)
    options = bench.options.model_copy(update={"steps": 2})
    operation = Diffusion()
    operation.load(bench.device)
    operation._pipeline.get(lambda: "sd15-canny", lambda _: pipeline)
    try:
        tuning = BatchTrials(
            operation, options, BatchSizes(memory_of(bench.device, operation.spec.runtime), measures=True), (bench.side,) * 2
        )
        tuned = max((trial.batch for trial in tuning.run(16, 1.0) if trial.fits), default=0)
        fits = max((batch for batch in range(1, 17) if _fits(pipeline, bench.canvases(batch), options)), default=0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    bench.report("largest batch that fits into memory", fits, "images")
    bench.report("tune finds the largest batch that fits", float(tuned == fits), "", 1.0)


def _fits(pipeline: Pipeline, canvases: list[Canvas], options: DiffusionStylize) -> bool:
    from imagemill.shared.errors import OutOfMemory

    try:
        pipeline._run(canvases, options)  # as a single batch of any size
    except (OutOfMemory, torch.OutOfMemoryError):
        fits = False
    else:
        fits = True
    torch.cuda.empty_cache()
    return fits


def main() -> int:
    arguments = parse_arguments("stylize", "Measure Stable Diffusion 1.5 on a GPU.")
    if not check_torch(arguments.cpu):
        return 2
    ends = time.monotonic() + arguments.minutes * 60 - 20
    with tempfile.TemporaryDirectory() as folder:
        where, scale = ("cpu", SMALL) if arguments.cpu else ("cuda", FULL)
        weights = pipeline_folder(Path(folder), scale=scale, device=where, half=not arguments.cpu)
        device = Device(gpu=None if arguments.cpu else 0, threads=1, weights=weights)
        options = DiffusionStylize.model_validate(LOOK if not arguments.cpu else {**LOOK, "steps": 3, "size": 64})
        side, batches = (64, (1, 2)) if arguments.cpu else (512, BATCHES)
        bench = Bench(weights, device, ends, side, batches, options)
        pipeline = eager(bench)
        sections: tuple[tuple[str, float, Callable[[], None]], ...] = (
            ("end to end", 60, lambda: end_to_end(bench, pipeline)),
            ("differences", 30, lambda: differences(bench, pipeline)),
            ("tune", 30, lambda: tune(bench, pipeline)),
            ("fp16 compiled", 110, lambda: compiled(bench)),
            ("ratios", 0, lambda: ratios(bench)),
            ("fp32", 30, lambda: full_precision(bench)),
        )
        for name, seconds, section in sections:
            with bench.within(name, seconds if bench.on_gpu else 0) as enough:
                if enough:
                    section()
    return int(any(result["holds"] is False for result in bench.figures))


if __name__ == "__main__":
    sys.exit(main())
