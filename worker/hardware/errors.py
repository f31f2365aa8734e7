"""Classifies exceptions of the device step: out of memory, or a device that this process can no longer use.

torch, onnxruntime, cuDNN and cuBLAS have few exception types, so most errors are recognised by their message.
"""

from __future__ import annotations

import re

from imagemill.shared.errors import ConfigurationError, OutOfMemory


class DeviceUnusable(ConfigurationError, code=ConfigurationError.code):
    """With the device as it is set up, no model of the engine can run on it, whatever is in the model's file."""


OUT_OF_MEMORY = re.compile(
    "bad_alloc|bad allocation|alloc_failed|outofmemory|out of memory|not enough memory"
    "|(failed to|can't) allocate memory|can't start new thread",
    re.IGNORECASE,
)
"""In out-of-memory messages from torch, onnxruntime, the CUDA libraries and Python (thread stacks)."""

STICKY = re.compile(
    "illegal (memory access|instruction|address)|misaligned address|on global/shared address space"
    "|device-side assert|launch (failure|timed out|timeout)|invalid program counter"
    "|hardware stack error|uncorrectable (ecc|nvlink)|context is destroyed|driver shutting down"
    "|cuda error: unknown error|cuda failure 999",
    re.IGNORECASE,
)
"""In messages of errors that CUDA returns from every later call of the process (CUDA Runtime API, cudaError_t: "the process
must be terminated and relaunched")."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of the device step, or one of its causes, means that memory ran out."""
    return OUT_OF_MEMORY.search(_messages(error)) is not None


def is_sticky(error: BaseException) -> bool:
    """Whether the device will answer every further call of this process with the same error."""
    return STICKY.search(_messages(error)) is not None


def _messages(error: BaseException | None) -> str:
    """Messages of an exception and its causes, if raised by the device's libraries: others may quote untrusted text."""
    lines = []
    while error is not None:
        if isinstance(error, MemoryError | OutOfMemory):
            lines.append("out of memory")
        elif isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime"):
            lines.append(str(error))
        error = error.__cause__
    return "\n".join(lines)
