"""LaMa's generator with the published size and random weights, in the engine's own LamaModel, from pixels to pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bench.figures import Figure, figure
from bench.gpu.card import Card
from bench.gpu.line import Course, end_to_end, learn
from bench.gpu.pictures import hole, photos, scene
from imagemill.shared.messages import Item, Job, Output
from imagemill.shared.options.inpaint import LamaInpaint
from imagemill.worker.hardware.memory import HostMemory, TorchMemory
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.operations.base import Inputs, Untouched
from imagemill.worker.operations.inpaint.lama import Lama
from imagemill.worker.operations.inpaint.lama_model import LamaModel
from tests.generators import FULL, lama_file

GOAL = 100.0
"""Megapixels per second."""
GOAL_ERROR = 2.0
"""Mean difference of half precision to fp32, of 255."""
TERAFLOP = 1.76
"""Per megapixel."""


class Inpaint:
    """The sections about LaMa."""

    def __init__(self, card: Card, folder: Path) -> None:
        self.card, self.folder = card, folder
        self.tiles = (64, 128) if card.small else (512, 1024)
        self.batches = (1, 2) if card.small else (1, 2, 4, 8, 16)

    def eager(self) -> Iterator[Figure]:
        """Half precision by tile and batch, and whether its pixels are those of fp32."""
        best = 0.0
        model = self._model("auto")
        for tile in reversed(self.tiles):
            for batch in self.batches:
                speed = self._speed(model, tile, batch)
                best = max(best, speed.rate if speed else 0.0)
                yield from self.card.figures(f"{batch} x {tile} x {tile}", speed, "MP/s")
        yield figure("fastest of these", best, "MP/s", GOAL)
        yield from self.card.share_used("fastest of these", best, TERAFLOP)
        error = float(np.abs(self._painted(model) - self._exact()).mean())
        yield figure("half precision: mean difference to fp32, of 255", error, "", GOAL_ERROR, at_most=True)

    def compiled(self) -> Iterator[Figure]:
        """The largest tile; the number of tiles is dynamic once there is more than one."""
        with self.card.compiling():
            model = self._model("auto", compiled=True)
            best = 0.0
            for batch in reversed(self.batches):
                speed = self._speed(model, self.tiles[-1], batch)
                best = max(best, speed.rate if speed else 0.0)
                yield from self.card.figures(f"{batch} x {self.tiles[-1]} x {self.tiles[-1]}", speed, "MP/s")
        yield figure("fastest of these", best, "MP/s", GOAL)

    def through_the_line(self) -> Iterator[Figure]:
        """Photos of 2 megapixels with a hole that one tile covers."""
        self._file()
        width, height = (640, 480) if self.card.small else (1600, 1200)
        options = LamaInpaint(
            boxes=((width // 2, height // 2, width // 10, height // 10),), tile=512 if self.card.small else 1024
        )
        operation = Lama()
        operation.load(replace(self.card.device, weights=self.folder))
        inputs = Inputs(Item(index=0, source="https://bench.example/0.jpg"), options)
        work = operation.prepare(Picture(scene(width, height), full_size=(width, height)), inputs)
        assert not isinstance(work, Untouched)
        assert len(work.samples) == 1
        samples = list(work.samples) * operation.spec.max_batch
        sizes = BatchSizes(TorchMemory() if self.card.on_gpu else HostMemory())
        learn(operation, samples, sizes)
        spec = Job(operation="inpaint", output=Output(url="s3://bench/out"), options=options)
        yield from end_to_end(self.card, Course(operation, spec, photos(width, height), sizes), samples)

    def _file(self) -> Path:
        path = self.folder / "lama" / "lama.safetensors"
        return path if path.is_file() else lama_file(path, **({} if self.card.small else FULL))

    def _model(self, dtype: Literal["auto", "fp32"], *, compiled: bool = False) -> LamaModel:
        return LamaModel(self._file(), replace(self.card.device, dtype=dtype, compile=compiled))

    def _speed(self, model: LamaModel, tile: int, batch: int) -> Any:
        pictures, holes = [scene(tile, tile)] * batch, [hole(tile)] * batch
        return self.card.speed(lambda: model.run(pictures, holes), batch * tile * tile / 1e6, rounds=5)

    def _painted(self, model: LamaModel) -> np.ndarray[Any, np.dtype[np.int16]]:
        tile = self.tiles[0]
        return model.run([scene(tile, tile)], [hole(tile)])[0].astype(np.int16)

    def _exact(self) -> np.ndarray[Any, np.dtype[np.int16]]:
        """The result in fp32 without TF32, which torch's convolutions use by default."""
        allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        try:
            return self._painted(self._model("fp32"))
        finally:
            torch.backends.cudnn.allow_tf32 = allowed
