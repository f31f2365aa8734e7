"""rembg's `u2net_cloth_seg`: which pixels show an upper, a lower or a full garment, with a result for each.

The network divides an image into four classes: levindabhi/cloth-segmentation, trained on iMaterialist (Fashion) 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from imagemill.shared.errors import OperationFailed
from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.operations.base import Inputs
from imagemill.worker.operations.remove_background.matte import Map
from imagemill.worker.operations.remove_background.model_families import Family
from imagemill.worker.operations.remove_background.onnx_model import OnnxModel, Tensor
from imagemill.worker.operations.remove_background.run_once import RunOnce
from imagemill.worker.operations.remove_background.session import Opened, Session, Size, by_lanczos

FAMILY = Family(768, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLASSES = {"upper": (1,), "lower": (2,), "full": (3,), "attire": (1, 2, 3)}
"""The network's classes that make up each part; 0 is everything else."""
COUNT = 4


class Garments(Session):
    """One garment of the image."""

    chooses = True

    def data(self, picture: Picture, pixels: Pixels, inputs: Inputs[RembgRemoveBackground]) -> Tensor:  # noqa: ARG002
        return FAMILY.tensor(pixels, as_rembg=inputs.options.exact)

    def open(self, files: Sequence[Path], name: str, device: Device) -> Opened:
        return RunOnce(OnnxModel(files[0], name, device, FAMILY.size))

    def matte(self, output: Tensor, size: Size, part: str | None) -> Grey:  # noqa: ARG002
        return np.asarray(cv2.LUT(_classes(output), _shown(part)), np.uint8)

    def rembgs_mask(self, output: Tensor, size: Size, part: str | None) -> Grey:
        """rembg scales the classes as if they were shades of grey: between background and `full` lies a rim of `upper`."""
        return np.asarray(cv2.LUT(by_lanczos(_classes(output), size), _palette(part)), np.uint8)


def masks(output: Tensor) -> Map:
    """The mask of each garment, float32 [3, h, w] of 0 and 1, from the network's output [4, h, w]. Raises OperationFailed."""
    found = _classes(output)
    return np.stack([found == garment for garment in range(1, COUNT)]).astype(np.float32)


def _classes(output: Tensor) -> Grey:
    """The likeliest class of each pixel, [h, w], from the network's output [4, h, w]."""
    if output.ndim != 3 or len(output) != COUNT:
        raise OperationFailed(f"a garment model returns {COUNT} maps, not {output.shape}")
    if not np.isfinite(output).all():
        raise OperationFailed("the model's output is not finite")
    return np.asarray(np.argmax(output, axis=0), np.uint8)


def _shown(part: str | None) -> Grey:
    table = np.zeros(256, np.uint8)
    table[list(CLASSES[part or "attire"])] = 255
    return table


@cache
def _palette(part: str | None) -> Grey:
    """What rembg's palette makes of each of 256 classes: scaling may give more than there are."""
    classes = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    classes.putpalette([int(level) for level in _shown(part)[:COUNT] for _ in range(3)])
    return np.asarray(classes.convert("RGB").convert("L")).reshape(-1)
