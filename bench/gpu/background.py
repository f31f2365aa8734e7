"""U^2-Net: in torch, and in the engine's own onnxruntime if that has a GPU build here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnxruntime

from bench.figures import Figure
from bench.gpu.absent import VERSION
from bench.gpu.card import Card
from bench.gpu.line import Course, end_to_end, learn
from bench.gpu.pictures import photos, scene
from bench.gpu.sections import NotHere
from bench.gpu.u2net import FULL_WIDTH, TorchRembg, TorchU2Net
from imagemill.shared.messages import Item, Job, Output
from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.memory import memory_of
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.operations.base import Inputs
from imagemill.worker.operations.remove_background.model_families import FAMILIES
from imagemill.worker.operations.remove_background.onnx_model import NAMES
from imagemill.worker.operations.remove_background.rembg import Rembg

TERAFLOP = 0.117
"""Per image."""
OPTIONS = RembgRemoveBackground(model="u2net")


class Background:
    """The sections about U^2-Net."""

    def __init__(self, card: Card, folder: Path) -> None:
        self.card, self.folder, self.width = card, folder, 4 if card.small else FULL_WIDTH
        self.batches = (1, 2) if card.small else (1, 2, 4, 8, 16, 32, 64)

    def eager(self) -> Iterator[Figure]:
        """By batch size, in half precision."""
        yield from self._by_batch(TorchU2Net(self.card.device, self.width), self.batches)

    def compiled(self) -> Iterator[Figure]:
        """The largest batch of the engine and one image."""
        with self.card.compiling():
            model = TorchU2Net(replace(self.card.device, compile=True), self.width)
            yield from self._by_batch(model, self.batches[:1] if self.card.small else (8, 1))

    def small_photos(self) -> Iterator[Figure]:
        """The whole line on photos of 2 megapixels."""
        yield from self._through(self._engine(), self.card.device, (320, 240) if self.card.small else (1600, 1200))

    def large_photos(self) -> Iterator[Figure]:
        """The whole line on photos of 12 megapixels."""
        yield from self._through(self._engine(), self.card.device, (640, 480) if self.card.small else (4000, 3000))

    def onnx(self) -> Iterator[Figure]:
        """The same network in onnxruntime. It needs a GPU build of that, and `onnx` to write the file."""
        device = replace(self.card.device, weights=self.folder, provider="cuda" if self.card.on_gpu else "cpu")
        providers = onnxruntime.get_available_providers() if onnxruntime.__version__ != VERSION else []
        if NAMES[device.provider] not in providers or find_spec("onnx") is None:
            raise NotHere(f"it needs onnx, and an onnxruntime with {NAMES[device.provider]}")
        from tests.models import u2net_onnx

        u2net_onnx(self.folder / "rembg" / "u2net.onnx", width=self.width)
        operation = Rembg()
        operation.load(device)
        yield from self._by_batch(operation._open(OPTIONS), self.batches[:2] if self.card.small else (1, 8))
        yield from self._through(operation, device, (320, 240) if self.card.small else (1600, 1200))

    def _by_batch(self, model: Any, batches: tuple[int, ...]) -> Iterator[Figure]:
        tensor, best = FAMILIES["u2net"].tensor(scene(1600, 1200)), 0.0
        for batch in batches:
            speed = self.card.speed(lambda count=batch: model.run([tensor] * count), batch, rounds=5)
            best = max(best, speed.rate if speed else 0.0)
            yield from self.card.figures(f"batch {batch}", speed)
        yield from self.card.share_used("fastest of these", best, TERAFLOP)

    def _engine(self) -> Rembg:
        operation = TorchRembg(TorchU2Net(self.card.device, self.width))
        operation.load(self.card.device)
        return operation

    def _through(self, operation: Rembg, device: Device, size: tuple[int, int]) -> Iterator[Figure]:
        inputs = Inputs(Item(index=0, source="https://bench.example/0.jpg"), OPTIONS)
        work = operation.prepare(Picture(scene(*size), full_size=size), inputs)
        samples = list(work.samples) * (2 if self.card.small else operation.spec.max_batch)
        sizes = BatchSizes(memory_of(device, operation.spec.runtime))
        learn(operation, samples, sizes)
        spec = Job(operation="remove-background", output=Output(url="s3://bench/out"), options=OPTIONS)
        yield from end_to_end(self.card, Course(operation, spec, photos(*size), sizes, seconds=10.0), samples)
