"""Stable Diffusion 1.5 with a ControlNet at full size on an NVIDIA GPU: speed, memory, and how well the line feeds it.

    python -m bench.gpu.stylize [--minutes 8]             on a machine with a GPU; exit status 1 where a goal is missed
    python -m bench.gpu.stylize --cpu --small             the same code on a small pipeline: proves that it runs, not more

Published sizes with random weights, 512 x 512, 25 steps with guidance, image-to-image. A batch's time is the median of
runs after one that is not counted. In fp32, and where compiling takes its time, few steps are run and the rest is
extrapolated: an image is a fixed part and its steps. What there is no time left for is named and left out.
"""

from __future__ import annotations

import argparse
import json
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
"""Of an image of 25 steps with guidance, text-to-image: UNet 0.803 and ControlNet 0.283 per forward, VAE decode 2.51."""
BATCHES = (1, 2, 4, 8, 16)
DAY = 86_400
LOOK = {"prompt": "a product on white", "negative_prompt": "blurry", "steps": 25, "strength": 0.5, "cfg": 7.5, "long_edge": 512}


@dataclass
class Bench:
    """What is measured, and how much time is left for it."""

    weights: Path
    device: Device
    ends: float
    side: int
    batches: tuple[int, ...]
    options: DiffusionStylize
    others: int = 0  # bytes that pipelines take which are not being measured
    figures: list[dict[str, Any]] = field(default_factory=list)
    rates: dict[tuple[str, int], float] = field(default_factory=dict)
    peaks: dict[tuple[str, int], int] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.gpu is not None

    def tell(self, name: str, value: float, unit: str = "", goal: float | None = None) -> None:
        """Keep a figure, and print it at once: a run may be cut off. Goals are for GPUs."""
        goal = goal if self.on_gpu else None
        told = {"name": name, "value": float(f"{value:.4g}"), "unit": unit, "goal": goal}
        told["holds"] = None if goal is None else value >= goal
        self.figures.append(told)
        print(json.dumps(told), flush=True)

    def load(self, *, dtype: Literal["auto", "fp32"] = "auto", compiled: bool = False) -> Pipeline:
        """A pipeline of its own; what is in memory before it does not count as its."""
        self.others = torch.cuda.memory_allocated() if self.on_gpu else 0
        how = DiffusionSettings(warm_up=())
        return Pipeline("sd15-canny", replace(self.device, dtype=dtype, compile=compiled, diffusion=how))

    @contextmanager
    def within(self, what: str, seconds: float) -> Iterator[bool]:
        """Whether there are `seconds` left; says so where there aren't."""
        there = time.monotonic() + seconds < self.ends
        if not there:
            print(json.dumps({"name": what, "left_out": f"less than {seconds:.0f} s were left"}), flush=True)
        yield there

    def canvases(self, count: int) -> list[Canvas]:
        pixels = scene(self.side, self.side)
        return [Canvas(pixels, edges_of(pixels, 100, 200), 42)] * count

    def seconds(self, pipeline: Pipeline, batch: int, options: DiffusionStylize, runs: int = 2) -> float:
        """Of a batch, as `Diffusion.run` runs it; the peak of memory is left in torch's counts."""
        canvases, spent = self.canvases(batch), []
        pipeline.run(canvases, options.model_copy(update={"steps": 1}))
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(runs):
            start = time.perf_counter()
            made = pipeline.run(canvases, options)  # pixels come back to the host, so that it has ended
            spent.append(time.perf_counter() - start)
            assert len(made) == batch
        return median(spent)

    def measure(self, mode: str, pipeline: Pipeline, batch: int, *, few: bool) -> None:
        """Images per second and peak memory of a batch, kept under `mode`."""
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
        self.tell(f"{mode}, batch {batch}", batch / seconds, "images/s")
        self.tell(f"{mode}, batch {batch}: peak memory", self.peaks[mode, batch] / 2**30, "GiB")


# --- what is measured -------------------------------------------------------------------------------------------------


def eager(bench: Bench) -> Pipeline:
    """fp16 in all batches, then 4 steps without guidance."""
    pipeline = bench.load()
    for batch in bench.batches:
        bench.measure("fp16 eager", pipeline, batch, few=False)
    largest = bench.batches[-1]
    quick = bench.options.model_copy(update={"steps": 4, "cfg": 1.0, "scheduler": "lcm"})
    rate = largest / bench.seconds(pipeline, largest, quick)
    bench.tell("4 steps without guidance, times 25 with", rate / bench.rates["fp16 eager", largest], "x", 5.0)
    return pipeline


def differences(bench: Bench, pipeline: Pipeline) -> None:
    """How far an image is from itself alone, in a batch and again; with deterministic algorithms it is the same."""
    alone, again = (pipeline.run(bench.canvases(1), bench.options)[0] for _ in range(2))
    together = pipeline.run(bench.canvases(bench.batches[-1]), bench.options)
    fixed = [pipeline.run(bench.canvases(1), bench.options.model_copy(update={"deterministic": True}))[0] for _ in range(2)]
    if any(isinstance(made, Exception) for made in (alone, again, *together, *fixed)):
        print(json.dumps({"name": "differences", "left_out": "random weights gave no finite image"}), flush=True)
        return

    def off(one: Any, other: Any) -> float:
        return float(np.abs(one.pixels.astype(int) - other.pixels).mean())

    bench.tell("alone and alone again: mean difference", off(alone, again), "of 255")
    bench.tell(f"alone and in {bench.batches[-1]}: mean difference", max(off(alone, made) for made in together), "of 255")
    bench.tell("deterministic, twice: the same pixels", float(off(*fixed) == 0), "", 1.0)


def compiled(bench: Bench) -> None:
    """Largest batch first: that is what the goal is about, and each shape takes its time to compile."""
    with pytest.MonkeyPatch.context() as patch:
        if not bench.on_gpu:  # traced and not built: a C++ compiler takes minutes, and shows nothing of a GPU
            build = torch.nn.Module.compile
            patch.setattr(torch.nn.Module, "compile", lambda module, **how: build(module, backend="eager", **how))
        pipeline = bench.load(compiled=True)
    for batch in sorted(bench.batches, reverse=True):
        with bench.within(f"fp16 compiled, batch {batch}", 110 if bench.on_gpu else 0) as there:
            if there:
                bench.measure("fp16 compiled", pipeline, batch, few=False)


def full_precision(bench: Bench) -> None:
    """fp32 by the setting, and nothing else changed."""
    pipeline = bench.load(dtype="fp32")
    for batch in bench.batches:
        with bench.within(f"fp32 eager, batch {batch}", 5 * batch if bench.on_gpu else 0) as there:
            if there:
                bench.measure("fp32 eager", pipeline, batch, few=True)
    for batch in bench.batches:
        if ("fp32 eager", batch) in bench.peaks and bench.on_gpu:
            saved = 1 - bench.peaks["fp16 eager", batch] / bench.peaks["fp32 eager", batch]
            bench.tell(f"memory that fp16 saves, batch {batch}", saved, "", 0.4 if batch == bench.batches[-1] else None)


def ratios(bench: Bench) -> None:
    """What the goals are about, of what was measured."""
    mode = "fp16 compiled" if ("fp16 compiled", bench.batches[-1]) in bench.rates else "fp16 eager"
    best = bench.rates[mode, bench.batches[-1]]
    if mode == "fp16 compiled":
        bench.tell(f"batch {bench.batches[-1]} compiled, times batch 1 eager", best / bench.rates["fp16 eager", 1], "x", 5.0)
    bench.tell(f"{mode}, batch {bench.batches[-1]}: images a day", best * DAY)
    if bench.on_gpu:
        peak = matmul_rate()
        bench.tell("fp16 matrix product of 8192 x 8192", peak, "TFLOP/s")
        bench.tell(f"{mode}: utilisation of that", best * TERAFLOP / peak, "", 0.4)


def matmul_rate() -> float:
    """What this GPU really reaches, in TFLOP/s; data sheets promise more."""
    one, other = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    for _ in range(5):
        one @ other
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(30):
        one @ other
    torch.cuda.synchronize()
    return 30 * 2 * 8192**3 / (time.perf_counter() - start) / 1e12


def end_to_end(bench: Bench, pipeline: Pipeline) -> None:
    """The flow with stand-ins for network, store and ledger, and real decoding, preparing and encoding, beside a bare loop."""
    largest = bench.batches[-1]
    images = largest * (4 if bench.on_gpu else 2)
    operation = Diffusion()
    operation.load(bench.device)
    operation._pipeline.get(lambda: "sd15-canny", lambda _: pipeline)
    done, file = cv2.imencode(".jpg", scene(1500, 1500), [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert done
    spec, ratios = Job(operation="stylize", output=Output(url="s3://bench/out"), options=bench.options), []
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(images // largest):
            pipeline.run(bench.canvases(largest), bench.options)
        bare = images / (time.perf_counter() - start)
        ratios.append(through_the_line(operation, spec, [file.tobytes()], images) / bare)
        bench.tell("bare loop", bare, "images/s")
    bench.tell("end to end, times a bare loop", median(ratios), "x", 0.95)


def tune(bench: Bench, pipeline: Pipeline) -> None:
    """The batch that `imagemill tune` finds, beside the largest that really fits, in a share of the GPU that 8 or so fill."""
    if not bench.on_gpu:
        print(json.dumps({"name": "tune", "left_out": "it is about a GPU's memory"}), flush=True)
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
        found = max((one.batch for one in tuning.run(16, 1.0) if one.fits), default=0)
        fits = max((batch for batch in range(1, 17) if _fits(pipeline, bench.canvases(batch), options)), default=0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    bench.tell("largest batch that fits", fits, "images")
    bench.tell("the batch that tune finds is that one", float(found == fits), "", 1.0)


def _fits(pipeline: Pipeline, canvases: list[Canvas], options: DiffusionStylize) -> bool:
    from imagemill.shared.errors import OutOfMemory

    try:
        pipeline._run(canvases, options)  # as one batch, whatever its size
    except (OutOfMemory, torch.OutOfMemoryError):
        fits = False
    else:
        fits = True
    torch.cuda.empty_cache()
    return fits


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.stylize", description="Stable Diffusion 1.5 on a GPU.")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it; what there is no time for is left out")
    parser.add_argument("--cpu", action="store_true", help="prove that this script runs, with --small")
    parser.add_argument("--small", action="store_true", help="a small pipeline in place of the full one")
    given = parser.parse_args()
    if given.cpu != given.small:
        parser.error("--cpu and --small go together: the full pipeline takes hours on a CPU")
    if not given.cpu and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no GPU; --cpu --small proves that this script runs", file=sys.stderr)
        return 2
    ends = time.monotonic() + given.minutes * 60 - 20
    with tempfile.TemporaryDirectory() as folder:
        where, scale = ("cpu", SMALL) if given.cpu else ("cuda", FULL)
        weights = pipeline_folder(Path(folder), scale=scale, device=where, half=not given.cpu)
        device = Device(gpu=None if given.cpu else 0, threads=1, weights=weights)
        options = DiffusionStylize.model_validate(LOOK if not given.cpu else {**LOOK, "steps": 3, "size": 64})
        side, batches = (64, (1, 2)) if given.cpu else (512, BATCHES)
        bench = Bench(weights, device, ends, side, batches, options)
        device_name = "CPU" if given.cpu else torch.cuda.get_device_name()
        print(json.dumps({"device": device_name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}), flush=True)
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
            with bench.within(name, seconds if bench.on_gpu else 0) as there:
                if there:
                    section()
    return 1 if any(one["holds"] is False for one in bench.figures) else 0


if __name__ == "__main__":
    sys.exit(main())
