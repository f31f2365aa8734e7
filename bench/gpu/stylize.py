"""Stable Diffusion 1.5 with a ControlNet: 512 x 512, 25 steps with guidance, image-to-image.

The models have the published sizes and random weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch

from bench.figures import Figure, figure
from bench.gpu.card import Card
from bench.gpu.line import Course, end_to_end, learn
from bench.gpu.pictures import photos, scene
from bench.gpu.sections import NotHere
from imagemill.shared.messages import Item, Job, Output
from imagemill.shared.options.stylize import DiffusionStylize
from imagemill.shared.settings import DiffusionSettings
from imagemill.worker.hardware.memory import HostMemory, TorchMemory
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.batch_sizes import BatchSizes, Known, kind_of
from imagemill.worker.operations.base import Inputs, Sample
from imagemill.worker.operations.stylize.controls import edges_of
from imagemill.worker.operations.stylize.diffusion import Diffusion
from imagemill.worker.operations.stylize.pipeline import Canvas, Pipeline
from tests.pipelines import FULL, SMALL, pipeline_folder

STEP, DECODE, ENCODE = 2 * (0.803 + 0.283), 2.51, 1.12
"""TFLOP of a step of UNet and ControlNet with guidance, and of the VAE, at 512 x 512."""
DAY = 86_400
LOOK = {"prompt": "a product on white", "negative_prompt": "blurry", "strength": 0.5, "cfg": 7.5, "long_edge": 512}


class Stylize:
    """The sections about Stable Diffusion. One pipeline is open at a time."""

    def __init__(self, card: Card, folder: Path) -> None:
        self.card, self.side = card, 64 if card.small else 512
        self.batches = (1, 2, 4) if card.small else (1, 2, 4, 8, 16)
        self.options = DiffusionStylize.model_validate({**LOOK, "steps": 2 if card.small else 25, "size": self.side})
        self.teraflop = self.options.steps * STEP + DECODE + ENCODE
        self.device = replace(card.device, weights=folder, diffusion=DiffusionSettings(warm_up=()))
        self.rates: dict[tuple[str, int], float] = {}
        self.peaks: dict[tuple[str, int], int] = {}
        self._open: tuple[object, Pipeline] | None = None

    def close(self) -> None:
        """Free the model, and what torch has compiled for it."""
        if self._open is not None:
            self._open = None
            torch.compiler.reset()
        self.card.free()

    def pipeline(self, *, dtype: Literal["auto", "fp32"] = "auto", compiled: bool = False) -> Pipeline:
        """The pipeline of this kind, which stays open until another is asked for."""
        if self._open is None or self._open[0] != (dtype, compiled):
            self.close()
            kind, scale = ("cpu", SMALL) if self.card.small else ("cuda", FULL)
            pipeline_folder(self.device.weights, scale=scale, device=kind, half=self.card.on_gpu)
            with self.card.compiling():
                pipeline = Pipeline("sd15-canny", replace(self.device, dtype=dtype, compile=compiled))
            self._open = (dtype, compiled), pipeline
        return self._open[1]

    def operation(self, pipeline: Pipeline, most: int = 16) -> Diffusion:
        """The engine with this pipeline open, and batches also on a CPU."""
        operation = Diffusion()
        operation.load(self.device)
        operation.spec = replace(operation.spec, max_batch=most)
        operation._pipeline.get(lambda: operation._version(DiffusionStylize()), lambda _: pipeline)
        return operation

    def samples(
        self, operation: Diffusion, options: DiffusionStylize, count: int
    ) -> Sequence[Sample[DiffusionStylize, Canvas]]:
        """A batch as the engine prepares it."""
        picture = Picture(scene(self.side, self.side), full_size=(self.side, self.side))
        inputs = Inputs(Item(index=0, source="https://bench.example/0.jpg"), options)
        return list(operation.prepare(picture, inputs).samples) * count

    def sizes(self, known: dict[str, Known] | None = None) -> BatchSizes:
        """Batch sizes that know nothing else."""
        return BatchSizes(TorchMemory() if self.card.on_gpu else HostMemory(), known)

    # --- sections --------------------------------------------------------------------------------------------------------

    def eager(self) -> Iterator[Figure]:
        """All batch sizes, in half precision."""
        pipeline = self.pipeline()
        for batch in self.batches:
            yield from self._measure("eager", pipeline, batch)
        self.batches = tuple(batch for batch in self.batches if ("eager", batch) in self.rates)  # those that fit
        largest = self.batches[-1]
        yield from self.card.share_used(f"batch {largest}", self.rates["eager", largest], self.teraflop)

    def compiled(self) -> Iterator[Figure]:
        """The largest batch, as every shape takes long to compile, and the goals for it."""
        pipeline, largest = self.pipeline(compiled=True), self.batches[-1]
        start = perf_counter()
        self._run(pipeline, largest, steps=1)
        yield figure(f"compiling for batch {largest}", perf_counter() - start, "s")
        yield from self._measure("compiled", pipeline, largest)
        rate = self.rates.get(("compiled", largest))
        if rate is None:
            return
        if ("eager", 1) in self.rates:
            yield figure(f"batch {largest} compiled / batch 1 eager", rate / self.rates["eager", 1], "x", 5.0)
        yield from self.card.share_used(f"batch {largest}", rate, self.teraflop, goal=0.4)
        yield figure(f"batch {largest}: images per day", rate * DAY)

    def through_the_line(self) -> Iterator[Figure]:
        """The whole line on the uncompiled model."""
        yield from self._through(self.pipeline(), self.sizes())

    def compiled_through_the_line(self) -> Iterator[Figure]:
        """The same with the compiled model, in full batches: any other size would be compiled first."""
        largest = self.batches[-1]
        if ("compiled", largest) not in self.rates:
            raise NotHere("the compiled model has not been measured")
        pipeline = self.pipeline(compiled=True)
        kind = kind_of(operation := self.operation(pipeline, largest), self.samples(operation, self.options, 1)[0])
        yield from self._through(pipeline, self.sizes({kind: Known(fits=largest)}), batch_wait=5.0)

    def more(self) -> Iterator[Figure]:
        """What a larger batch would bring, few steps without guidance, and how much an image depends on its batch."""
        pipeline, largest = self.pipeline(), self.batches[-1]
        quick = self.options.model_copy(update={"steps": 4, "cfg": 1.0, "scheduler": "lcm"})
        speed = self.card.speed(lambda: pipeline.run(self._canvases(largest), quick), largest)
        if speed and ("eager", largest) in self.rates:
            ratio = speed.rate / self.rates["eager", largest]
            yield figure("4 steps without guidance / 25 steps with guidance", ratio, "x", 5.0)
        yield from self._differences(pipeline)
        yield from self._measure("eager", pipeline, 2 * largest)

    def full_precision(self) -> Iterator[Figure]:
        """fp32, at one batch size."""
        batch = self.batches[-2]
        yield from self._measure("fp32", self.pipeline(dtype="fp32"), batch)
        if self.peaks.get(("eager", batch)) and self.peaks.get(("fp32", batch)):
            saved = 1 - self.peaks["eager", batch] / self.peaks["fp32", batch]
            yield figure(f"memory that half precision saves, batch {batch}", saved, "", 0.4)

    def other_shapes(self) -> Iterator[Figure]:
        """Other batch sizes of the compiled model, each of which is compiled first."""
        pipeline = self.pipeline(compiled=True)
        for batch in self.batches[:1] if self.card.small else (8, 1, 4, 2):
            yield from self._measure("compiled", pipeline, batch)

    # --- how -------------------------------------------------------------------------------------------------------------

    def _canvases(self, count: int) -> list[Canvas]:
        pixels = scene(self.side, self.side)
        return [Canvas(pixels, (edges_of(pixels, 100, 200),), 42)] * count

    def _run(self, pipeline: Pipeline, batch: int, steps: int | None = None) -> None:
        options = self.options.model_copy(update={"steps": steps or self.options.steps})
        assert len(pipeline.run(self._canvases(batch), options)) == batch

    def _measure(self, mode: str, pipeline: Pipeline, batch: int) -> Iterator[Figure]:
        """The speed of the device step: pixels in, pixels out."""
        self._run(pipeline, batch, steps=1) if mode != "eager" else None  # compiles; an eager run warms up by itself
        speed = self.card.speed(lambda: self._run(pipeline, batch), batch, rounds=2)
        if speed:
            self.rates[mode, batch], self.peaks[mode, batch] = speed.rate, speed.peak
        yield from self.card.figures(f"batch {batch}" if mode != "fp32" else f"fp32, batch {batch}", speed)

    def _through(self, pipeline: Pipeline, sizes: BatchSizes, *, batch_wait: float = 0.05) -> Iterator[Figure]:
        largest = self.batches[-1]
        operation = self.operation(pipeline, largest)
        spec = Job(operation="stylize", output=Output(url="s3://bench/out"), options=self.options)
        if not sizes.known(kind_of(operation, self.samples(operation, self.options, 1)[0])).fits:
            learn(operation, self.samples(operation, self.options.model_copy(update={"steps": 1}), largest), sizes)
        edge = 150 if self.card.small else 1500
        course = Course(operation, spec, photos(edge, edge), sizes, batch_wait=batch_wait)
        yield from end_to_end(self.card, course, self.samples(operation, self.options, largest))

    def _differences(self, pipeline: Pipeline) -> Iterator[Figure]:
        """How much an image differs when repeated and in a batch; deterministic algorithms must reproduce it exactly."""
        fixed = self.options.model_copy(update={"deterministic": True})
        alone, again = (pipeline.run(self._canvases(1), self.options)[0] for _ in range(2))
        together = pipeline.run(self._canvases(self.batches[-1]), self.options)
        first, second = (pipeline.run(self._canvases(1), fixed)[0] for _ in range(2))
        if any(isinstance(result, Exception) for result in (alone, again, first, second, *together)):
            return  # random weights gave no finite image
        yield figure("alone, twice: mean difference, of 255", _difference(alone, again))
        most = max(_difference(alone, result) for result in together)
        yield figure(f"alone and in a batch of {self.batches[-1]}: mean difference, of 255", most)
        yield figure("deterministic, twice: the same pixels (1: yes)", float(_difference(first, second) == 0), "", 1.0)


def _difference(first: Any, second: Any) -> float:
    return float(np.abs(first.pixels.astype(int) - second.pixels).mean())
