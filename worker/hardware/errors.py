"""What the device's exceptions mean: memory is short, or this process can't use the device any more.

torch, onnxruntime, cuDNN and cuBLAS have few types of their own and say most in words.
"""

from __future__ import annotations

from collections.abc import Iterator

from imagemill.shared.errors import OutOfMemory

SHORT = (
    "bad_alloc",
    "bad allocation",
    "failed to allocate memory",
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
    "outofmemory",
    "can't start new thread",
)
"""How torch, onnxruntime, CUDA's libraries and Python (of a thread's stack) say in lower case that memory is short."""

STICKY = (
    "illegal memory access",
    "illegal instruction",
    "illegal address",
    "device-side assert",
    "launch failure",
    "launch timed out",
    "launch timeout",
    "misaligned address",
    "invalid program counter",
    "hardware stack error",
    "on global/shared address space",
    "uncorrectable ecc",
    "uncorrectable nvlink",
    "context is destroyed",
    "driver shutting down",
    "cuda error: unknown error",
    "cuda failure 999",
)
"""Errors that CUDA repeats at every later call of the process, in lower case (CUDA Runtime API, cudaError_t: "the same
error until the process is terminated")."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of the device step, or one that it was raised from, says that memory ran out."""
    return any(isinstance(one, MemoryError | OutOfMemory) or _says(one, SHORT) for one in _causes(error))


def is_sticky(error: BaseException) -> bool:
    """Whether it says that the device answers this process with nothing but this error from now on."""
    return any(_says(one, STICKY) for one in _causes(error))


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    """Only of those who speak for the device: any other text may quote what a stranger wrote."""
    if not isinstance(error, RuntimeError) and not type(error).__module__.startswith("onnxruntime"):
        return False
    text = str(error).lower()
    return any(one in text for one in words)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
