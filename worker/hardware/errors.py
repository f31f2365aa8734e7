"""Classifies exceptions of the device step: out of memory, or a device that this process can no longer use.

torch, onnxruntime, cuDNN and cuBLAS have few exception types, so most errors are recognised by their message.
"""

from __future__ import annotations

from collections.abc import Iterator

from imagemill.shared.errors import OutOfMemory

OUT_OF_MEMORY = (
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
"""Lower-case parts of out-of-memory messages from torch, onnxruntime, the CUDA libraries and Python (thread stacks)."""

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
"""Lower-case parts of messages of errors that CUDA returns from every later call of the process (CUDA Runtime API,
cudaError_t: "the process must be terminated and relaunched")."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of the device step, or one of its causes, means that memory ran out."""
    return any(isinstance(cause, MemoryError | OutOfMemory) or _mentions(cause, OUT_OF_MEMORY) for cause in _chain(error))


def is_sticky(error: BaseException) -> bool:
    """Whether the device will answer every further call of this process with the same error."""
    return any(_mentions(cause, STICKY) for cause in _chain(error))


def _mentions(error: BaseException, phrases: tuple[str, ...]) -> bool:
    """Only for exception types of the device's libraries: other messages may quote untrusted text."""
    if not isinstance(error, RuntimeError) and not type(error).__module__.startswith("onnxruntime"):
        return False
    message = str(error).lower()
    return any(phrase in message for phrase in phrases)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
