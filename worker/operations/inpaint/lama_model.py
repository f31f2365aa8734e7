"""LaMa's generator on torch: opened once, on the device that was asked for and on no other."""

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
from imagemill.worker.hardware.torch_device import torch_device, torch_dtype
from imagemill.worker.imaging.picture import Grey, Pixels
from imagemill.worker.models.conversion import read
from imagemill.worker.operations.inpaint.lama_generator import Generator

LARGEST_BATCH = 8
"""Pictures that go to a GPU at a time."""
BAND = 512 * 512
"""Pixels that the generator's ends take at a time on a CPU: 1024 x 1024 take some 350 MB instead of 770."""


class LamaModel:
    """LaMa's generator, opened on a device.

    Raises ConfigurationError where the file is damaged or of something else, and where the device isn't there.
    """

    def __init__(self, path: Path, device: Device) -> None:
        self.device = torch_device(device, "lama")
        self.dtype = dtype_of(device)
        on_cpu = device.gpu is None
        if on_cpu:
            torch.set_num_threads(device.threads)
        with _translated("opening"):
            try:
                made = Generator(read(path), BAND if on_cpu else None).fold()
            except (ConfigurationError, ValueError) as error:
                again = "`imagemill models verify` checks it, `imagemill models pull lama` fetches it"
                raise ConfigurationError(f"the model lama can't be opened from {path} ({sentence(error)}): {again}") from error
            # As oneDNN and cuDNN have it, so that they need not turn their inputs and outputs around.
            made = made.to(self.device, self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._paint: Callable[[Tensor], Tensor] = _compiled(made) if device.compile else made
        self.batches = not on_cpu
        give_back()  # what reading it took

    def run(self, pictures: Sequence[Pixels], holes: Sequence[Grey]) -> list[Pixels]:
        """What the generator paints, uint8 [h, w, 3] each, for RGB uint8 [h, w, 3] and holes uint8 [h, w] (above 127: fill).

        All are of one size: multiples of 8, at least 16. What it paints outside of the holes is no copy of the picture.
        Raises OutOfMemory and OperationFailed.
        """
        if not pictures:
            return []
        # On a CPU one at a time: a single picture keeps all cores busy, and of 512 x 512 it takes some 200 MB, two some 400.
        size = len(pictures) if self.batches else 1
        made: list[Pixels] = []
        with _translated("running"), torch.inference_mode():
            for start in range(0, len(pictures), size):
                batch = slice(start, start + size)
                made.extend(self._run(np.stack(pictures[batch]), np.stack(holes[batch])))
        return made

    def _run(self, pictures: Pixels, holes: Grey) -> Pixels:
        painted = self._paint(self._input(pictures, holes))
        if not bool(painted.isfinite().all()):
            raise OperationFailed(f"the model lama painted what are no colours; it calculated in {self.dtype}")
        # To the device's bytes first: a quarter of what would have to be copied.
        made = painted.float().mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return np.asarray(made.cpu().numpy(), np.uint8)

    def _input(self, pictures: Pixels, holes: Grey) -> Tensor:
        """[b, 4, h, w]: the pictures in 0..1, black in the holes, and the holes as 1."""
        height, width = holes.shape[1:]
        made = torch.empty(
            (len(holes), 4, height, width), dtype=self.dtype, device=self.device, memory_format=torch.channels_last
        )
        hole = torch.from_numpy(holes).to(self.device) > 127
        made[:, 3] = hole
        made[:, :3] = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2)
        made[:, :3].div_(255).masked_fill_(hole[:, None], 0)
        return made


def _compiled(generator: Generator) -> Callable[[Tensor], Tensor]:
    """The same, compiled when it first meets a size, once for one picture and once for any number of them.

    After torch's `recompile_limit`, 8, it goes on without being compiled.
    """
    compiled = torch.compile(generator)

    def paint(x: Tensor) -> Tensor:
        for axis in (1, 2, 3):
            torch._dynamo.mark_static(x, axis)
        if len(x) > 1:
            torch._dynamo.mark_dynamic(x, 0)
        made: Tensor = compiled(x)
        return made

    return paint


def dtype_of(device: Device) -> torch.dtype:
    """What it calculates in, once the process is pinned to its device."""
    has_bf16 = device.gpu is not None and torch.cuda.get_device_capability() >= (8, 0)
    return torch_dtype(device, torch.bfloat16 if has_bf16 else torch.float16)


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one
        traceback.clear_frames(error.__traceback__)  # they hold tensors for as long as somebody holds the error
        if not is_out_of_memory(error):
            raise OperationFailed(f"{doing} the model lama failed: {sentence(error)}") from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        give_back()
        raise OutOfMemory(f"there was not enough memory for {doing} the model lama: {sentence(error)}") from error
