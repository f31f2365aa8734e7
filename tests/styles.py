"""Helpers for tests of `stylize` on `diffusion`: quick options, a photo, and one image through the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imagemill.shared.engines import parse_options
from imagemill.shared.messages import Item
from imagemill.shared.settings import DiffusionSettings
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.operations.base import Inputs, Work
from imagemill.worker.operations.stylize.diffusion import Diffusion
from tests.batches import run_batch
from tests.unit.worker.operations.conformance import REFERENCE, scene

QUICK = {"prompt": "a red shoe", "negative_prompt": "blurry", "size": 64, "steps": 2}
PHOTO = scene(90, 120)


def loaded(weights: Path, *, threads: int = 1, compiled: bool = False, **settings: Any) -> Diffusion:
    operation = Diffusion()
    operation.load(Device(threads=threads, weights=weights, compile=compiled, diffusion=DiffusionSettings(**settings)))
    return operation


def prepared(
    operation: Diffusion,
    pixels: Pixels = PHOTO,
    *,
    index: int = 0,
    source: str = "",
    own: Pixels | None = None,
    **chosen: Any,
) -> Work:
    """The work for an image; `own` is its own control image."""
    item = Item(index=index, source=source or "https://images.example/one.png")
    read = {REFERENCE: Picture(scene(30, 30, seed=3))}.__getitem__
    options = parse_options("stylize", "diffusion", QUICK | chosen)
    return operation.prepare(Picture(pixels), Inputs(item, options, read=read, control=own))


def styled(operation: Diffusion, pixels: Pixels = PHOTO, **chosen: Any) -> Pixels:
    work = prepared(operation, pixels, **chosen)
    (output,) = run_batch(operation, work.samples, BatchSizes())
    if isinstance(output, Exception):
        raise output
    return operation.finish(work, [output]).pixels


def difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(int) - other).mean())
