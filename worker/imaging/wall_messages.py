"""What passes through the wall: JSON over a socket, and bytes and pixels in memory that both sides share."""

from __future__ import annotations

import fcntl
import math
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any

import numpy as np

MESSAGE_BYTES = 2**16
EXTRA_BYTES = 2**24
"""Of metadata and the like, in addition to the pixels."""

USUAL_BYTES = 40 * 2**20
"""Of the memory that a helper and its parent always share, one for questions and one for answers. Pages that have been used are
much cheaper than new ones. What is larger gets memory of its own, in which the pixels then stay."""

_ALIGNED = 64


class Shared:
    """Memory that two processes share. Without `fd`, it is new, and of a `size` that neither can change."""

    def __init__(self, size: int, fd: int | None = None) -> None:
        self.fd = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) if fd is None else fd
        self.size = size
        try:
            if fd is None:
                os.ftruncate(self.fd, size)
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(self.fd)
            raise

    @cached_property
    def memory(self) -> mmap.mmap:
        """All of it. Mapped when it is first used, because a decoder may need the address space until then."""
        return mmap.mmap(self.fd, self.size)

    def close(self) -> None:
        """Close it here; arrays that lie in it keep it in memory."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        with suppress(BufferError):
            if (memory := vars(self).pop("memory", None)) is not None:
                memory.close()

    def part(self, at: int, length: int) -> memoryview:
        """Some bytes of it. Raises ValueError if it is smaller, or TypeError."""
        if not (0 <= at <= self.size and 0 <= length <= self.size - at):
            raise ValueError("it lies outside of the shared memory")
        return memoryview(self.memory)[at : at + length]


def passing(kind: Any) -> list[str]:
    """The fields of a dataclass that pass through the wall: all except those marked to stay where they are."""
    return [field.name for field in fields(kind) if not field.metadata.get("stays")]


class Packer:
    """Turns values into JSON, and gathers the bytes and arrays in them, to be written one after another."""

    def __init__(self) -> None:
        self.size = 0
        self._parts: list[tuple[int, memoryview]] = []

    def pack(self, value: Any) -> Any:
        """JSON for a value: a dataclass becomes an object, bytes and uint8 arrays the place where they lie."""
        if isinstance(value, bytes):
            return {"bytes": [self._add(memoryview(value)), len(value)]}
        if isinstance(value, np.ndarray):
            return {"array": [self._add(np.ascontiguousarray(value).data.cast("B")), *value.shape]}
        if is_dataclass(value):
            return {name: self.pack(getattr(value, name)) for name in passing(value)}
        if isinstance(value, Mapping):
            return {name: self.pack(each) for name, each in value.items()}
        if isinstance(value, tuple | list):
            return [self.pack(each) for each in value]
        return value

    def _add(self, part: memoryview) -> int:
        at = -(-self.size // _ALIGNED) * _ALIGNED
        self.size = at + len(part)
        self._parts.append((at, part))
        return at

    def write(self, memory: Shared) -> None:
        """Write the bytes and arrays into shared memory. Raises ValueError if it is too small."""
        for at, part in self._parts:
            memory.part(at, len(part))[:] = part


def unpack(value: Any, memory: Shared, *, copy: bool) -> Any:
    """The values that a Packer has packed, with lists as tuples and objects as dictionaries.

    Without `copy`, arrays stay in the shared memory. Raises ValueError or TypeError if they can't be.
    """
    if isinstance(value, list):
        return tuple(unpack(each, memory, copy=copy) for each in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {"bytes"}:
        return memory.part(*value["bytes"]).tobytes()
    if value.keys() == {"array"}:
        at, *shape = value["array"]
        found = np.frombuffer(memory.part(at, math.prod(shape)), np.uint8).reshape(shape)
        return found.copy() if copy else found
    return {name: unpack(each, memory, copy=copy) for name, each in value.items()}
