"""What differs between rembg's sessions: how a model's input is made from an image, how it is run, and how its output is read.

`sessions.py` lists them. Everything they share, from batches to the finished cut-out, is in `rembg.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.operations.base import Inputs

Size = tuple[int, int]
"""(width, height) in pixels."""


class Opened(Protocol):
    """An opened model. `batches`: several images may go through it in one pass."""

    batches: bool

    def run(self, data: Sequence[Any], *, together: bool = True) -> list[Any]:
        """One output for each input. Without `together`, each image runs alone. Raises OutOfMemory and OperationFailed."""


class Session(ABC):
    """How one kind of model is used.

    `chooses`: the job says what to cut out, so an image whose subject is already cut out is not returned as it is.
    """

    chooses: ClassVar[bool] = False

    @abstractmethod
    def data(self, picture: Picture, pixels: Pixels, inputs: Inputs[RembgRemoveBackground]) -> Any:
        """The model's input for `pixels`, which are the picture's at the size of the result. Raises an ImageError."""

    @abstractmethod
    def open(self, files: Sequence[Path], name: str, device: Device) -> Opened:
        """Open the model's files. Raises ConfigurationError and OutOfMemory."""

    @abstractmethod
    def matte(self, output: Any, size: Size, part: str | None) -> Grey:
        """The matte of an image of `size`, in any size of the same proportions, from the model's output.

        `part` says which of several results is wanted. Raises OperationFailed.
        """

    @abstractmethod
    def rembgs_mask(self, output: Any, size: Size, part: str | None) -> Grey:
        """The mask [h, w] of an image of `size`, bit for bit as rembg's session returns it. Raises OperationFailed."""


def by_lanczos(matte: Grey, size: Size) -> Grey:
    """`matte` at `size` by Pillow's LANCZOS, as rembg scales masks."""
    return np.asarray(Image.fromarray(matte).resize(size, Image.Resampling.LANCZOS))
