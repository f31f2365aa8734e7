"""What the tests of the engine `rembg` share: pictures, and one image at a time through the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imagemill.shared.engines import parse_options
from imagemill.shared.messages import Item
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.operations.base import Inputs, Work
from imagemill.worker.operations.remove_background.rembg import Rembg
from tests.unit.worker.operations.conformance import scene

PICTURES: dict[str, Pixels] = {
    "landscape": scene(240, 400),
    "portrait": scene(500, 300, seed=1),
    "small": scene(30, 40, seed=2),
    "with alpha": scene(200, 260, channels=4, seed=3),
}


def loaded(weights: Path) -> Rembg:
    operation = Rembg()
    operation.load(Device(threads=1, weights=weights))
    return operation


def prepared(operation: Rembg, pixels: Pixels, read: Any = None, **chosen: Any) -> Work:
    options = parse_options("remove-background", "rembg", chosen)
    return operation.prepare(
        Picture(pixels), Inputs(Item(index=0, source="https://images.example/one.png"), options, read=read)
    )


def cut(operation: Rembg, pixels: Pixels, **chosen: Any) -> Pixels:
    work = prepared(operation, pixels, **chosen)
    return operation.finish(work, operation.run(work.samples)).pixels
