"""A fake GPU, operations that fill its memory, and the exceptions that real devices raise."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException

from imagemill.worker.hardware.memory import Peak
from imagemill.worker.operations.base import Sample, Spec
from tests.fakes import Invert

TORCH_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.68 GiB of which 1.12 GiB is free. "
    "Including non-PyTorch memory, this process has 22.55 GiB memory in use."
)
ARENA_MESSAGE = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. Name:'Conv_3' "
    "Status Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* onnxruntime::BFCArena::"
    "AllocateRawInternal(size_t, bool, onnxruntime::Stream*, bool, onnxruntime::WaitNotificationFn) "
    "Failed to allocate memory for requested buffer of size 839524096"
)

SHORT: dict[str, Callable[[], Exception]] = {
    "torch": lambda: torch.OutOfMemoryError(TORCH_MESSAGE),
    "torch on the CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "140737488355328 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "torch elsewhere": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    "torch's cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "onnxruntime's arena": lambda: RuntimeException(ARENA_MESSAGE),
    "onnxruntime's CUDA": lambda: Fail(
        "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0 ; hostname=a ; expr=cudaMalloc(&p, size);"
    ),
    "Python": MemoryError,
    "a thread's stack": lambda: RuntimeError("can't start new thread"),
}
"""Out-of-memory exceptions, as the libraries raise them."""

DEAD: dict[str, Callable[[], Exception]] = {
    "illegal access": lambda: torch.AcceleratorError(
        "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in https://docs.nvidia.com/"
    ),
    "assert": lambda: torch.AcceleratorError("CUDA error: device-side assert triggered"),
    "launch": lambda: RuntimeError("CUDA error: unspecified launch failure"),
    "ECC": lambda: torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    "unknown": lambda: torch.AcceleratorError("CUDA error: unknown error"),
    "Triton": lambda: RuntimeError("Triton Error [CUDA]: misaligned address"),
    "onnxruntime": lambda: Fail(
        "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=a ; "
        "expr=cudaStreamSynchronize(static_cast<cudaStream_t>(stream_));"
    ),
}
"""Exceptions after which the process can no longer use its GPU."""

HARMLESS: dict[str, Callable[[], Exception]] = {
    "argument": lambda: torch.AcceleratorError("CUDA error: invalid argument"),
    "shape": lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    "half": lambda: RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'"),
    "quoted text": lambda: ValueError("out of memory of illegal memory access: device-side assert"),
}
"""Exceptions of one batch that say nothing about the next one."""


class FakeGpu:
    """A device with `total` bytes, `held` of them by other processes; implements imagemill.worker.hardware.memory.Memory.

    A `blind` device reports peaks of 0, as if its memory were allocated outside of what is counted.
    """

    name = "Fake GPU 1000"
    grows = True

    def __init__(
        self, total: int, *, held: int = 0, error: Callable[[], Exception] = SHORT["torch"], blind: bool = False
    ) -> None:
        self.total, self.held, self.error, self.blind = total, held, error, blind
        self.lost = False
        self._taken = 0

    def free(self) -> int:
        return self.total - self.held

    def take(self, size: int) -> None:
        """Allocate `size` bytes; raises the device's error if fewer are free."""
        if size > self.free():
            raise self.error()
        self._taken = max(self._taken, size)

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        peak, self._taken = Peak(), 0
        yield peak
        peak.bytes = 0 if self.blind else self._taken
        peak.share = (self.held + self._taken) / self.total

    def broken(self) -> bool:
        return self.lost


class Hungry(Invert):
    """Doubles numbers, and takes `base` bytes plus `each` per number."""

    spec = Spec("stylize", "opencv", max_batch=64)

    def __init__(self, gpu: FakeGpu, each: int, base: int = 0) -> None:
        self.gpu, self.each, self.base = gpu, each, base
        self.sizes: list[int] = []

    def group_key(self, sample: Sample) -> Hashable:
        return "numbers"

    def run(self, samples: Sequence[Sample]) -> list[Any]:
        self.sizes.append(len(samples))
        self.gpu.take(self.base + self.each * len(samples))
        return [2 * sample.data for sample in samples]


class Frugal(Hungry):
    """Takes half the memory at relief level 1 and a quarter at level 2, the last."""

    def __init__(self, gpu: FakeGpu, each: int, base: int = 0) -> None:
        super().__init__(gpu, each, base)
        self.level = 0
        self.levels: list[int] = []

    def run(self, samples: Sequence[Sample]) -> list[Any]:
        self.levels.append(self.level)
        self.gpu.take((self.base + self.each * len(samples)) >> self.level)
        return [2 * sample.data for sample in samples]

    def relieve(self, level: int) -> bool:
        if level > 2:
            return False
        self.level = level
        return True
