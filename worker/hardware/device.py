"""The device of a child process: one GPU, or a share of the CPU cores."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NoReturn

from imagemill.shared.errors import ConfigurationError
from imagemill.shared.settings import DiffusionSettings, Settings
from imagemill.worker.hardware.board import Board
from imagemill.worker.hardware.model_memory import CPU_SHARE, ModelMemory, main_memory
from imagemill.worker.hardware.turn import Turn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Device:
    """The hardware that one child works on, and the settings of its runtimes.

    - `gpu`: index as given by the operator; inside the pinned process the GPU is always `cuda:0`. None for the CPU.
    - `threads`: the child's share of the cores, at least 1.
    - `siblings`: how many children share the GPU, this one included; each batch runs within `turn`, and what is learned about
      batches is on the `board`.
    - `weights`: folder of the model files.
    - `provider`: execution provider of onnxruntime; `memory_limit`: bytes it may allocate on a GPU.
    - `int8`: prefer 8-bit versions of models where they exist (models.files).
    - `dtype`, `compile`: for torch models; `diffusion`: for Stable Diffusion.
    - `models`: the memory in which the child keeps models open.
    """

    gpu: int | None = None
    threads: int = 1
    siblings: int = 1
    turn: AbstractContextManager[Any] = field(default_factory=nullcontext, repr=False, compare=False)
    board: Board | None = field(default=None, repr=False, compare=False)
    weights: Path = Path()
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    memory_limit: int | None = None
    int8: bool = False
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    models: ModelMemory = field(default_factory=ModelMemory, repr=False, compare=False)

    @classmethod
    def of(cls, settings: Settings, children: int, *, gpus: int = 1) -> Device:
        """The device for each child of a node with this many `children`, on a host whose nodes see this many GPUs."""
        gpu, provider = settings.worker.gpu, settings.onnx.provider
        shared = gpu is not None and children > 1
        nodes = 1 if gpu is None else max(1, gpus, settings.worker.expect_gpus or 0)  # a container may see only its own
        return cls(
            gpu=gpu,
            threads=share_of_cores(children, nodes),
            siblings=1 if gpu is None else children,
            turn=Turn() if shared else nullcontext(),
            board=Board() if shared else None,
            weights=settings.weights.folder.expanduser(),
            provider=("cpu" if gpu is None else "cuda") if provider == "auto" else provider,
            memory_limit=settings.onnx.gpu_mem_limit,
            int8=settings.onnx.int8,
            dtype=settings.torch.dtype,
            compile=settings.torch.compile,
            diffusion=settings.diffusion,
            models=ModelMemory(_limit(settings, children)),
        )

    @property
    def name(self) -> str:
        """`gpu3` or `cpu`, as used in node names."""
        return "cpu" if self.gpu is None else f"gpu{self.gpu}"


def _limit(settings: Settings, children: int) -> int | None:
    """Maximum bytes of a child's open models. On a GPU, only a pinned child can find out what is usual (see
    node/child.py)."""
    if settings.worker.model_memory is not None or settings.worker.gpu is not None:
        return settings.worker.model_memory
    return int(CPU_SHARE * main_memory() / children)


def visible_gpus(mask: str) -> list[str]:
    """The devices in a value of CUDA_VISIBLE_DEVICES; like CUDA, stop at the first negative index."""
    parts = (part.strip() for part in mask.split(",") if part.strip())
    return list(takewhile(lambda part: not part.startswith("-"), parts))


def visible_gpu(gpu: int, mask: str | None) -> str:
    """The value of CUDA_VISIBLE_DEVICES that pins a process to the `gpu`-th device of `mask`.

    `mask` is the current value (comma-separated indices or UUIDs), None if unset.
    Raises ConfigurationError if the mask has no such device.
    """
    if mask is None:
        return str(gpu)
    devices = visible_gpus(mask)
    if gpu >= len(devices):
        raise ConfigurationError(f"GPU {gpu} does not exist: CUDA_VISIBLE_DEVICES={mask!r} exposes {len(devices)} GPUs")
    return devices[gpu]


def share_of_cores(children: int, nodes: int = 1) -> int:
    """The number of cores per child if this many `nodes` share the host; at least 1.

    A container with limited CPU time counts as that many cores, which it shares with no other node.
    """
    return max(1, min(len(os.sched_getaffinity(0)) // nodes, _quota()) // children)


def _quota() -> int:
    """How many cores this container may keep busy, by cgroups v2."""
    try:
        most, period = CPU_QUOTA.read_text().split()
        return max(1, round(int(most) / int(period)))
    except (OSError, ValueError):  # there is no quota, or it is `max`
        return sys.maxsize


def pin(device: Device) -> None:
    """Restrict this process to its device. Call it before importing anything that touches CUDA or starts threads."""
    if device.gpu is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the order of nvidia-smi; by default CUDA puts the fastest first
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpu(device.gpu, os.environ.get("CUDA_VISIBLE_DEVICES"))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(device.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"  # workers load models from disk and never download
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises installing torchvision, which is unwanted
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for deterministic matrix products
    # Used by numpy and OpenCV: its threads spin for milliseconds after each product, which doubled the CPU time per image.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    # glibc has an arena per thread and trims only the first: with two arenas a child grew from 130 to 156 MB over
    # 3,000 images, with one from 121 to 122. glibc has already read the variable, hence also the call.
    arenas = os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    if arenas.isdecimal():
        _malloc("mallopt", M_ARENA_MAX, int(arenas))
    # Freed blocks of up to 32 MiB, glibc's maximum, are kept for reuse until `give_back`. Otherwise a network's tensors are
    # unmapped and zeroed again at each step: 30 of 530 ms of CPU per image for U^2-Net.
    _malloc("mallopt", M_MMAP_THRESHOLD, 32 << 20)
    _malloc("mallopt", M_TRIM_THRESHOLD, 2**31 - 1)


def give_back() -> None:
    """Return freed memory to the system; glibc otherwise keeps free blocks between small ones still in use.

    Takes 0.2 to 20 ms.
    """
    _malloc("malloc_trim", 0)


def _malloc(function: str, *arguments: int) -> None:
    """Call one of glibc's extensions; other C libraries, such as musl, have none."""
    if hasattr(_libc, function):
        getattr(_libc, function)(*arguments)


def end_process() -> NoReturn:
    """Kill this process at once, skipping clean-up that would wait for a device that no longer responds."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process outlived SIGKILL")
