"""Reads LaMa's weights from the formats that they are published in, as data: no code in them is run.

Torch checkpoints and TorchScript archives are zip files with a pickle that describes the tensors
(`torch/serialization.py`, `torch/csrc/jit/serialization/`) and one member per storage with the numbers.
"""

from __future__ import annotations

import math
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from imagemill.shared.errors import ConfigurationError, sentence
from imagemill.worker.models.inert_pickle import LARGEST as LARGEST_PICKLE
from imagemill.worker.models.inert_pickle import Call, Global, PersistentId, Unreadable
from imagemill.worker.models.inert_pickle import read as read_pickle
from imagemill.worker.operations.inpaint.lama_generator import PREFIX, Generator
from imagemill.worker.transfer.files import replacing

LARGEST = 2**30
"""Maximum bytes of a generator's weights: five times the published one."""
LARGEST_ARCHIVE = 4 * 2**30
"""Maximum bytes of a checkpoint inside another archive, which may include training state."""
MOST = 20_000
"""Maximum number of parts of a model: the published checkpoint has a few thousand."""
LONGEST = 500
"""Maximum characters of a part's name."""
ANCHOR = "model.1.ffc.convl2l.weight"
"""A weight of every LaMa generator, which identifies it among other networks."""

DAMAGED = (OSError, ValueError, RuntimeError, EOFError, SafetensorError, zipfile.BadZipFile, zlib.error, struct.error)
"""Exceptions that reading a damaged file can raise; `Unreadable` is a ValueError."""

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
}


def read(path: Path) -> dict[str, Tensor]:
    """Read the generator's weights from a safetensors file, checkpoint, TorchScript archive or zip file with a checkpoint.

    Names are upstream's, `generator.model...`, even if they have another prefix in the file. Raises ConfigurationError for
    a damaged file, or one without a LaMa generator.
    """
    try:
        with path.open("rb") as file:
            return _of_archive(file) if zipfile.is_zipfile(file) else _of_safetensors(path)
    except DAMAGED as error:
        raise ConfigurationError(f"{path} has no LaMa weights or is damaged: {sentence(error)}") from error


def convert(source: Path, target: Path) -> int:
    """Write a file's weights to a safetensors file, after a test run; return the number of parameters.

    Raises ConfigurationError, also if `target` can't be written.
    """
    weights = read(source)
    try:
        with torch.inference_mode():
            output = Generator(weights)(torch.zeros(1, 4, 16, 16))
    except (ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{source} has no working LaMa generator: {sentence(error)}") from error
    if not output.isfinite().all():
        raise ConfigurationError(f"{source} has weights that are not finite numbers")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            part.write_bytes(save(weights))  # safetensors' own way of writing a file wants to rename it
            part.chmod(0o644)  # workers may run as another user
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{target} can't be written: {sentence(error)}") from error
    return sum(tensor.numel() for tensor in weights.values())


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


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    if path.stat().st_size > LARGEST:
        raise Unreadable("it is larger than any LaMa generator")
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":  # 8 bytes with a length, then a JSON object
            raise Unreadable("it is neither a torch zip archive nor a safetensors file")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(key) for name, key in _generator(file.keys()).items()}


def _of_archive(file: IO[bytes], *, inside_another: bool = False) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) == 1:
            return _of_torch(archive, pickles[0].removesuffix("data.pkl"))
        if inside_another:
            raise Unreadable("the archive inside it is none of torch's")
        inside = [member for member in archive.infolist() if member.filename.endswith(".ckpt")]
        if len(inside) != 1:
            raise Unreadable("it is a zip file, but neither torch's nor with exactly one checkpoint inside")
        if inside[0].file_size > LARGEST_ARCHIVE:
            raise Unreadable(f"{inside[0].filename} inside is larger than any LaMa checkpoint")
        with tempfile.TemporaryFile() as checkpoint:
            with _opened(archive, inside[0]) as source:
                shutil.copyfileobj(source, checkpoint)
            if not zipfile.is_zipfile(checkpoint):
                raise Unreadable(f"{inside[0].filename} inside is not a checkpoint from torch 1.6 or later")
            return _of_archive(checkpoint, inside_another=True)


def _of_torch(archive: zipfile.ZipFile, folder: str) -> dict[str, Tensor]:
    if f"{folder}byteorder" in archive.namelist() and _member(archive, f"{folder}byteorder", 16) != b"little":
        raise Unreadable("its byte order is not little-endian")
    tensors = dict(_tensors(read_pickle(_member(archive, f"{folder}data.pkl", LARGEST_PICKLE))))
    chosen = {name: tensors[key] for name, key in _generator(tensors).items()}
    for name, stored in chosen.items():
        if not stored.fits():
            raise Unreadable(f"{name} does not fit into its storage")
    if sum(stored.numbers * stored.dtype.itemsize for stored in chosen.values()) > LARGEST:
        raise Unreadable("it is larger than any LaMa generator")
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


def _generator(names: Iterable[str]) -> dict[str, str]:
    """Map upstream's names of the generator's weights to the file's names. Raises Unreadable without a generator."""
    names = list(names)
    prefixes = [name.removesuffix(ANCHOR) for name in names if name.endswith(ANCHOR)]
    if not prefixes:
        raise Unreadable("it has no generator")
    prefix = min(prefixes, key=lambda prefix: (not prefix.endswith("generator."), len(prefix))) + "model."
    return {PREFIX + name.removeprefix(prefix): name for name in names if name.startswith(prefix)}


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
            raise Unreadable("it has more parts than any LaMa generator")
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
