"""Reads tensors from torch checkpoints and TorchScript archives, as data: code in them never runs.

They are zip files with a pickle that describes the tensors (`torch/serialization.py`, `torch/csrc/jit/serialization/`) and one
member per storage with the numbers.
"""

from __future__ import annotations

import math
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from imagemill.shared.errors import ConfigurationError, sentence
from imagemill.worker.models.inert_pickle import LARGEST as LARGEST_PICKLE
from imagemill.worker.models.inert_pickle import Call, Global, PersistentId, Unreadable
from imagemill.worker.models.inert_pickle import read as read_pickle

LARGEST_ARCHIVE = 4 * 2**30
"""Maximum bytes of a checkpoint inside another archive, which may include training state."""
LARGEST = 16 * 2**30
"""Maximum bytes of a checkpoint's tensors."""
MOST = 20_000
"""Maximum number of parts of a model: the published checkpoint has a few thousand."""
LONGEST = 500
"""Maximum characters of a part's name."""
DAMAGED = (OSError, ValueError, RuntimeError, EOFError, SafetensorError, zipfile.BadZipFile, zlib.error, struct.error)
"""Exceptions that reading a damaged file can raise; `Unreadable` is a ValueError."""

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
}


Chosen = Callable[[Mapping[str, "Stored"]], Mapping[str, str]]
"""Maps the names that tensors are to have to their names in an archive, given everything in it."""


def tensors_of(file: IO[bytes], choose: Chosen, most: int, *, inside_another: bool = False) -> dict[str, Tensor]:
    """The tensors that `choose` picks from an archive, or from the only checkpoint in a zip file, of at most `most` bytes.

    Raises Unreadable and the other exceptions of `DAMAGED`.
    """
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) == 1:
            return _of_torch(archive, pickles[0].removesuffix("data.pkl"), choose, most)
        if inside_another:
            raise Unreadable("the archive inside it is none of torch's")
        inside = [member for member in archive.infolist() if member.filename.endswith(".ckpt")]
        if len(inside) != 1:
            raise Unreadable("it is a zip file, but neither torch's nor with exactly one checkpoint inside")
        if inside[0].file_size > LARGEST_ARCHIVE:
            raise Unreadable(f"{inside[0].filename} inside is larger than any checkpoint")
        with tempfile.TemporaryFile() as checkpoint:
            with _opened(archive, inside[0]) as source:
                shutil.copyfileobj(source, checkpoint)
            if not zipfile.is_zipfile(checkpoint):
                raise Unreadable(f"{inside[0].filename} inside is not a checkpoint from torch 1.6 or later")
            return tensors_of(checkpoint, choose, most, inside_another=True)


def read(path: Path) -> dict[str, Tensor]:
    """All tensors in a safetensors file or an archive, but those of a checkpoint's average. Raises as `tensors_of` does."""
    if not zipfile.is_zipfile(path):
        return load_file(path)
    with path.open("rb") as file:
        return tensors_of(file, lambda found: {name: name for name in found if not name.startswith("model_ema.")}, LARGEST)


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in an archive, by name; reads no tensor. Raises ConfigurationError."""
    found: dict[str, tuple[int, ...]] = {}

    def choose(tensors: Mapping[str, Stored]) -> dict[str, str]:
        found.update({name: tensor.size for name, tensor in tensors.items()})
        return {}

    try:
        with path.open("rb") as file:
            tensors_of(file, choose, 0)
    except DAMAGED as error:
        raise ConfigurationError(f"it is not a checkpoint, or it is damaged: {sentence(error)}") from error
    return found


@dataclass(frozen=True)
class Stored:
    """A tensor in an archive, as a view of the storage member `key`; lengths and offsets count numbers, not bytes."""

    key: str
    dtype: torch.dtype
    numbers: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def fits(self) -> bool:
        """Whether the tensor lies within its storage and is no larger."""
        counts = (self.numbers, self.offset, *self.size, *self.stride)
        if not all(type(count) is int and count >= 0 for count in counts) or len(self.size) != len(self.stride):
            return False
        last = self.offset + sum((length - 1) * step for length, step in zip(self.size, self.stride, strict=True))
        return math.prod(self.size) <= self.numbers and (0 in self.size or last < self.numbers)


def _of_torch(archive: zipfile.ZipFile, folder: str, choose: Chosen, most: int) -> dict[str, Tensor]:
    if f"{folder}byteorder" in archive.namelist() and _member(archive, f"{folder}byteorder", 16) != b"little":
        raise Unreadable("its byte order is not little-endian")
    tensors = dict(_tensors(read_pickle(_member(archive, f"{folder}data.pkl", LARGEST_PICKLE))))
    chosen = {name: tensors[key] for name, key in choose(tensors).items()}
    for name, stored in chosen.items():
        if not stored.fits():
            raise Unreadable(f"{name} does not fit into its storage")
    if sum(stored.numbers * stored.dtype.itemsize for stored in chosen.values()) > most:
        raise Unreadable("it is larger than any model of its kind")
    return {name: _loaded(archive, f"{folder}data/{stored.key}", stored) for name, stored in chosen.items()}


def _loaded(archive: zipfile.ZipFile, member: str, stored: Stored) -> Tensor:
    size = stored.numbers * stored.dtype.itemsize
    data = bytearray(_member(archive, member, size))
    if len(data) != size:
        raise Unreadable(f"{member} has {len(data)} bytes, not {size}")
    if not data:
        return torch.empty(stored.size, dtype=stored.dtype)
    numbers = torch.frombuffer(data, dtype=stored.dtype)
    return numbers.as_strided(stored.size, stored.stride, stored.offset).clone(memory_format=torch.contiguous_format)


def _member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """A member's bytes. Raises Unreadable if it is missing or has more than `most`."""
    try:
        member = archive.getinfo(name)
    except KeyError as error:
        raise Unreadable(f"{name} is missing") from error
    if member.file_size > most:
        raise Unreadable(f"{name} has {member.file_size} bytes, expected at most {most}")
    with _opened(archive, member) as file:
        return file.read()


def _opened(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> IO[bytes]:
    """Open a member; zipfile returns no more bytes than the member announces."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Unreadable(f"{member.filename} uses an unsupported compression")
    return archive.open(member)


def _tensors(root: Any) -> Iterator[tuple[str, Stored]]:
    """All tensors in a pickle's content, or in its `state_dict` if it has one, with the dotted path of names to each.

    A module's parts are in its state. Each object is visited once, however many paths lead to it.
    """
    pending: list[tuple[str, Any]] = [("", root.get("state_dict", root) if isinstance(root, dict) else root)]
    steps, visited = 0, set()
    while pending:
        name, node = pending.pop()
        steps += 1
        if steps > MOST or len(name) > LONGEST:
            raise Unreadable("it has more parts than any model")
        stored = _stored(node)
        if stored is not None:
            yield name, stored
        if stored is not None or id(node) in visited:
            continue
        visited.add(id(node))
        for mapping in [node.items, node.state] if isinstance(node, Call) else [node]:
            if isinstance(mapping, dict):
                parts = [(key, part) for key, part in mapping.items() if isinstance(part, Call | dict)]
                pending += [(f"{name}.{key}" if name else key, part) for key, part in parts]


def _stored(node: Any) -> Stored | None:
    """The tensor that this call would rebuild; None for any other node."""
    if not isinstance(node, Call):
        return None
    if str(node.function) == "torch._utils._rebuild_parameter" and node.arguments:
        return _stored(node.arguments[0])
    if str(node.function) != "torch._utils._rebuild_tensor_v2":
        return None
    match node.arguments:
        case (PersistentId(("storage", Global("torch", kind), str(key), _, int(numbers))), offset, size, stride, *_):
            if kind in DTYPES and isinstance(size, tuple) and isinstance(stride, tuple):
                return Stored(key, DTYPES[kind], numbers, offset, size, stride)
    return None
