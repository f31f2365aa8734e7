"""LaMa's generator on torch, opened once, on the requested device and on no other."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imagemill.shared.errors import ConfigurationError, OperationFailed, OutOfMemory, sentence
from imagemill.worker.hardware.device import Device, give_back
from imagemill.worker.hardware.errors import is_out_of_memory
from imagemill.worker.hardware.torch_device import bytes_of, torch_device, torch_dtype
from imagemill.worker.imaging.picture import Grey, Pixels
from imagemill.worker.models.conversion import read
from imagemill.worker.operations.inpaint.lama_generator import Generator
from imagemill.worker.operations.open_model import getting

LARGEST_BATCH = 8
"""Maximum pictures in one batch on a GPU."""
BAND = 512 * 512
"""Pixels that the generator's first and last layers process at once on a CPU: 1024 x 1024 take about 350 MB instead of 770."""


class LamaModel:
    """LaMa's generator, opened on a device.

    `bytes` is what its weights take. Raises ConfigurationError if the file is damaged or holds another model, and
    DeviceUnusable if the device is not available.
    """

    def __init__(self, path: Path, device: Device) -> None:
        self.device = torch_device(device, "lama")
        self.dtype = dtype_of(device)
        self.batches = device.gpu is not None
        if not self.batches:
            torch.set_num_threads(device.threads)
        with _translated("opening"):
            try:
                generator = Generator(read(path), None if self.batches else BAND).fold()
            except (ConfigurationError, ValueError) as error:
                raise ConfigurationError(
                    f"the model {path.stem} can't be opened from {path} ({sentence(error)}): "
                    f"check it with `imagemill models verify` or get it again with {getting(path.stem)}"
                ) from error
            # The layout that oneDNN and cuDNN use, so that they don't have to reorder inputs and outputs.
            generator = generator.to(self.device, self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.bytes = bytes_of(generator)
        self._paint: Callable[[Tensor], Tensor] = _compiled(generator) if device.compile else generator
        give_back()  # the memory that reading the file took

    def run(self, pictures: Sequence[Pixels], holes: Sequence[Grey]) -> list[Pixels]:
        """The generator's pictures, uint8 [h, w, 3] each, for RGB uint8 [h, w, 3] and holes uint8 [h, w] (above 127: fill).

        All have one size: multiples of 8, at least 16. The result does not reproduce the picture outside the holes.
        Raises OutOfMemory and OperationFailed.
        """
        if not pictures:
            return []
        # One by one on a CPU: one picture keeps all cores busy, and one of 512 x 512 takes about 200 MB, two about 400.
        size = len(pictures) if self.batches else 1
        painted: list[Pixels] = []
        with _translated("running"), torch.inference_mode():
            for start in range(0, len(pictures), size):
                batch = slice(start, start + size)
                painted.extend(self._run(np.stack(pictures[batch]), np.stack(holes[batch])))
        return painted

    def _run(self, pictures: Pixels, holes: Grey) -> Pixels:
        painted = self._paint(self._input(pictures, holes))
        if not bool(painted.isfinite().all()):
            raise OperationFailed(f"the model lama produced NaN or infinity, computing in {self.dtype}")
        # To bytes on the device, so that a quarter of the memory has to be copied.
        pixels = painted.float().mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return np.asarray(pixels.cpu().numpy(), np.uint8)

    def _input(self, pictures: Pixels, holes: Grey) -> Tensor:
        """[b, 4, h, w]: the pictures in 0..1, black in the holes, and the holes as 1."""
        shape = (len(holes), 4, *holes.shape[1:])
        x = torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=torch.channels_last)
        hole = torch.from_numpy(holes).to(self.device) > 127
        x[:, 3] = hole
        x[:, :3] = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2)
        x[:, :3].div_(255).masked_fill_(hole[:, None], 0)
        return x


def _compiled(generator: Generator) -> Callable[[Tensor], Tensor]:
    """The generator, compiled at the first batch of each size: once for a single picture and once for any larger number.

    After torch's `recompile_limit` of 8, further sizes run uncompiled.
    """
    compiled = torch.compile(generator)

    def paint(x: Tensor) -> Tensor:
        for axis in (1, 2, 3):
            torch._dynamo.mark_static(x, axis)
        if len(x) > 1:
            torch._dynamo.mark_dynamic(x, 0)
        painted: Tensor = compiled(x)
        return painted

    return paint


def dtype_of(device: Device) -> torch.dtype:
    """The precision that the model computes in; on a GPU, the process must be pinned to it already."""
    has_bf16 = device.gpu is not None and torch.cuda.get_device_capability() >= (8, 0)
    return torch_dtype(device, torch.bfloat16 if has_bf16 else torch.float16)


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    """Turn torch's errors and MemoryError into OutOfMemory or OperationFailed."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        traceback.clear_frames(error.__traceback__)  # they hold tensors for as long as the error is held
        if not is_out_of_memory(error):
            raise OperationFailed(f"{doing} the model lama failed: {sentence(error)}") from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        give_back()
        raise OutOfMemory(f"not enough memory for {doing} the model lama: {sentence(error)}") from error
