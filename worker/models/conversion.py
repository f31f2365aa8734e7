"""LaMa's weights out of the files that they are published in: read as data, nothing in them is unpickled or run.

Both torch's checkpoints and TorchScript archives are zip files, with a pickle that says which tensor is what
(`torch/serialization.py`, `torch/csrc/jit/serialization/`), and each tensor's numbers in a member of their own.
"""

from __future__ import annotations

import math
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imagemill.shared.errors import ConfigurationError, sentence
from imagemill.worker.models.inert_pickle import LARGEST as LARGEST_PICKLE
from imagemill.worker.models.inert_pickle import Call, Global, PersistentId, Unreadable
from imagemill.worker.models.inert_pickle import read as read_pickle
from imagemill.worker.operations.inpaint.lama_generator import PREFIX, Generator

LARGEST = 2**30
"""Bytes of a generator's weights: five times those of the published one."""
LARGEST_ARCHIVE = 4 * 2**30
"""Bytes of a checkpoint inside another archive: it may hold what only training needs."""
MOST = 20_000
"""Parts of a model: the published checkpoint has some thousands."""
LONGEST = 500
"""Characters of a part's name."""
ANCHOR = "model.1.ffc.convl2l.weight"
"""A weight that each of LaMa's generators has, by which it is found among other networks."""

DAMAGED = (OSError, ValueError, RuntimeError, EOFError, SafetensorError, zipfile.BadZipFile, zlib.error, struct.error)
"""What reading a damaged file may raise; `Unreadable` is a ValueError."""

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
}


def read(path: Path) -> dict[str, Tensor]:
    """The generator's weights from a safetensors file, a checkpoint, a TorchScript archive, or a zip file with a checkpoint.

    Names as upstream has them, `generator.model...`, whatever the file puts before them. Raises ConfigurationError
    for a file of something else and for a damaged one.
    """
    try:
        with path.open("rb") as file:
            found = _of_archive(file) if zipfile.is_zipfile(file) else _of_safetensors(path)
    except DAMAGED as error:
        raise ConfigurationError(f"{path} is no file of LaMa's weights, or a damaged one: {sentence(error)}") from error
    return found


def convert(source: Path, target: Path) -> int:
    """Write the weights of any file that can be read to a safetensors file; how many numbers these are.

    They are tried before. Raises ConfigurationError, also where `target` can't be written.
    """
    weights = read(source)
    try:
        with torch.inference_mode():
            made = Generator(weights)(torch.zeros(1, 4, 16, 16))
    except (ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{source} does not hold LaMa's generator: {sentence(error)}") from error
    if not made.isfinite().all():
        raise ConfigurationError(f"{source} holds weights that are not finite numbers")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, part)
        part.chmod(0o644)  # a worker may run as another user
        part.replace(target)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            part.unlink()
        raise ConfigurationError(f"{target} can't be written: {sentence(error)}") from error
    return sum(tensor.numel() for tensor in weights.values())


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in an archive: which part of the member `key`, in numbers."""

    key: str
    dtype: torch.dtype
    numbers: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def fits(self) -> bool:
        """Whether it lies within its member, and is no larger than that."""
        counts = (self.numbers, self.offset, *self.size, *self.stride)
        if not all(type(one) is int and one >= 0 for one in counts) or len(self.size) != len(self.stride):
            return False
        last = self.offset + sum((length - 1) * step for length, step in zip(self.size, self.stride, strict=True))
        return math.prod(self.size) <= self.numbers and (0 in self.size or last < self.numbers)


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    if path.stat().st_size > LARGEST:
        raise Unreadable("it is larger than any of LaMa's generators")
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":  # the length of a JSON object, then the object
            raise Unreadable("it is neither a zip archive, as torch writes, nor a safetensors file")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(key) for name, key in _generator(file.keys()).items()}


def _of_archive(file: IO[bytes]) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) == 1:
            return _of_torch(archive, pickles[0].removesuffix("data.pkl"))
        inside = [member for member in archive.infolist() if member.filename.endswith(".ckpt")]
        if len(inside) != 1:
            raise Unreadable("it is a zip file, but neither of torch nor with one checkpoint in it")
        if inside[0].file_size > LARGEST_ARCHIVE:
            raise Unreadable(f"{inside[0].filename} in it is larger than any of LaMa's checkpoints")
        with tempfile.TemporaryFile() as checkpoint:
            with _opened(archive, inside[0]) as source:
                shutil.copyfileobj(source, checkpoint)
            if not zipfile.is_zipfile(checkpoint):
                raise Unreadable(f"{inside[0].filename} in it is no checkpoint of torch 1.6 or later")
            return _of_archive(checkpoint)


def _of_torch(archive: zipfile.ZipFile, folder: str) -> dict[str, Tensor]:
    if f"{folder}byteorder" in archive.namelist() and _member(archive, f"{folder}byteorder", 16) != b"little":
        raise Unreadable("its numbers are in an order of bytes that is not read")
    tensors = dict(_tensors(read_pickle(_member(archive, f"{folder}data.pkl", LARGEST_PICKLE))))
    chosen = {name: tensors[key] for name, key in _generator(tensors).items()}
    for name, one in chosen.items():
        if not one.fits():
            raise Unreadable(f"{name} does not fit into the numbers that it is made of")
    if sum(one.numbers * one.dtype.itemsize for one in chosen.values()) > LARGEST:
        raise Unreadable("it is larger than any of LaMa's generators")
    return {name: _loaded(archive, f"{folder}data/{one.key}", one) for name, one in chosen.items()}


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
    """A member's bytes. Raises Unreadable where there are more than `most`."""
    try:
        member = archive.getinfo(name)
    except KeyError as error:
        raise Unreadable(f"{name} is missing in it") from error
    if member.file_size > most:
        raise Unreadable(f"{name} has {member.file_size} bytes, and {most} at most are expected")
    with _opened(archive, member) as file:
        return file.read()


def _opened(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> IO[bytes]:
    """A member to be read; it gives no more bytes than it has announced."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Unreadable(f"{member.filename} is compressed in a way that is not read")
    return archive.open(member)


def _generator(names: Iterable[str]) -> dict[str, str]:
    """The generator's weights among a file's: upstream's name to the file's. Raises Unreadable where there is none."""
    names = list(names)
    found = [name.removesuffix(ANCHOR) for name in names if name.endswith(ANCHOR)]
    if not found:
        raise Unreadable("no generator is in it")
    before = min(found, key=lambda prefix: (not prefix.endswith("generator."), len(prefix)))
    return {PREFIX + name.removeprefix(f"{before}model."): name for name in names if name.startswith(f"{before}model.")}


def _tensors(root: Any) -> Iterator[tuple[str, Stored]]:
    """All tensors in what a pickle holds, by the names on the way to them; a module's parts are its state.

    Of a checkpoint these are its `state_dict`'s. What leads to the same part twice, or back to itself, is followed once.
    """
    ahead: list[tuple[str, Any]] = [("", root.get("state_dict", root) if isinstance(root, dict) else root)]
    steps, followed = 0, set()
    while ahead:
        name, node = ahead.pop()
        steps += 1
        if steps > MOST or len(name) > LONGEST:
            raise Unreadable("it has more parts than any of LaMa's generators")
        stored = _stored(node)
        if stored is not None:
            yield name, stored
        if stored is not None or id(node) in followed:
            continue
        followed.add(id(node))
        for mapping in [node.items, node.state] if isinstance(node, Call) else [node]:
            if isinstance(mapping, dict):
                parts = [(key, part) for key, part in mapping.items() if isinstance(part, Call | dict)]
                ahead += [(f"{name}.{key}" if name else key, part) for key, part in parts]


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
