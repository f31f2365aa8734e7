"""Which GPU or how many cores a child may use."""

from __future__ import annotations

import ctypes
import os
import signal
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Literal, NoReturn

from imagemill.shared.settings import DiffusionSettings, Settings

ARENA_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD = -8, -3, -1  # of malloc.h
KEPT = 1 << 25
"""Bytes up to which a block that was freed is kept for the next one, until `give_back`; 32 MiB is the most that glibc takes."""
_mallopt, _malloc_trim = (getattr(ctypes.CDLL(None), name, None) for name in ("mallopt", "malloc_trim"))  # glibc has them


@dataclass(frozen=True)
class Device:
    """What one child works on. `threads` is its share of the cores, at least 1.

    `gpu` is the physical index that the operator gave; inside the process the pinned GPU is
    always `cuda:0`. `weights` is the folder of the models' files; `provider` (cpu, cuda or tensorrt)
    is what onnxruntime shall run on, and `memory_limit` the bytes that it may take on a GPU; `int8` asks
    for models in 8 bits where they are (models.files). `dtype` and `compile` are for models on torch.
    `diffusion` is how Stable Diffusion runs.
    """

    gpu: int | None = None
    threads: int = 1
    weights: Path = Path()
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    memory_limit: int | None = None
    int8: bool = False
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)

    @classmethod
    def of(cls, settings: Settings, children: int) -> Device:
        """The device of each of a node's `children`."""
        gpu, wanted = settings.worker.gpu, settings.onnx.provider
        return cls(
            gpu=gpu,
            threads=share_of_cores(children),
            weights=settings.weights.folder.expanduser(),
            provider=("cpu" if gpu is None else "cuda") if wanted == "auto" else wanted,
            memory_limit=settings.onnx.gpu_mem_limit,
            int8=settings.onnx.int8,
            dtype=settings.torch.dtype,
            compile=settings.torch.compile,
            diffusion=settings.diffusion,
        )

    @property
    def name(self) -> str:
        """`gpu3` or `cpu`, as it stands in a node's name."""
        return "cpu" if self.gpu is None else f"gpu{self.gpu}"


def visible_gpus(mask: str) -> list[str]:
    """The devices that a value of CUDA_VISIBLE_DEVICES leaves: as for CUDA, -1 ends the list."""
    parts = (part.strip() for part in mask.split(",") if part.strip())
    return list(takewhile(lambda part: not part.startswith("-"), parts))


def visible_gpu(gpu: int, mask: str | None) -> str:
    """The value of CUDA_VISIBLE_DEVICES that pins a process to the `gpu`-th device of `mask`.

    `mask` is the value that is already set (indices or UUIDs, joined by commas), None if none is.
    Raises ValueError where the mask has no such device.
    """
    if mask is None:
        return str(gpu)
    devices = visible_gpus(mask)
    if gpu >= len(devices):
        raise ValueError(f"there is no GPU {gpu}: CUDA_VISIBLE_DEVICES={mask} leaves {len(devices)}")
    return devices[gpu]


def share_of_cores(children: int) -> int:
    """Cores for each of `children` processes, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // children)


def pin(device: Device) -> None:
    """Restrict this process to its device; before anything is imported that could touch CUDA or start threads."""
    if device.gpu is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as nvidia-smi counts; CUDA itself counts the fastest first
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpu(device.gpu, os.environ.get("CUDA_VISIBLE_DEVICES"))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(device.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"  # workers load from disk and never download
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises to install torchvision, which must not be there
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it there is no deterministic matrix product
    # numpy's and OpenCV's: its threads spin for milliseconds after each product, which doubled the CPU time of an image.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    # glibc keeps an arena per thread, and of all but the first the end is never given back: with two, 3,000 images took a
    # child from 130 to 156 MB, with one from 121 to 122. It has read its variable already, so it is told as well.
    arenas = os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    if _mallopt is not None:
        if arenas.isdecimal():
            _mallopt(ARENA_MAX, int(arenas))
        # Else a network's tensors are given back and zeroed anew at each step, 30 of 530 ms of CPU per image for U^2-Net.
        _mallopt(MMAP_THRESHOLD, KEPT)
        _mallopt(TRIM_THRESHOLD, 2**31 - 1)


def give_back() -> None:
    """Hand memory that was freed to the system: glibc keeps what lies between small pieces that are still in use.

    Takes 0.2 to 20 ms.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


def end_process() -> NoReturn:
    """End at once, as by the system's own hand, without the clean-up that would ask a device which does not answer."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process outlived SIGKILL")
