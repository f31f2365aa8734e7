"""What an operator gives as a model: a file in one of the known formats, a folder, or something that is not a model."""

from __future__ import annotations

import hashlib
import json
import re
import stat
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from imagemill.shared.errors import ConfigurationError, UsageError, sentence
from imagemill.worker.models.checksums import sha256_of

Format = Literal["onnx", "safetensors", "torch", "folder"]

REPOSITORY = r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
ON_HUB = (
    re.compile(rf"{REPOSITORY}(/(?P<file>[^@]+))?(@(?P<revision>[A-Za-z0-9][\w./-]*))?", re.ASCII),
    re.compile(
        rf"https://huggingface\.co/{REPOSITORY}(/(tree|blob|resolve)/(?P<revision>[^/?]+)(/(?P<file>[^?]+))?)?/?(\?.*)?",
        re.ASCII,
    ),
)
"""What names something on the Hugging Face Hub: ids as imagemill takes them, and the addresses of pages and files there."""

TENSORS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
"""How the names of files with tensors end."""
HEAD = 512
"""Bytes at the beginning of a file that show what it is."""
LONGEST_HEADER = 100_000_000
"""Maximum bytes of a safetensors header, as in the safetensors library."""
EXPECTED = "expected an ONNX file, a safetensors file, a torch checkpoint or a folder in diffusers' layout"


@dataclass(frozen=True)
class OnHub:
    """A repository on the Hugging Face Hub, or one `file` in it; the revision is None unless it was given with them."""

    repository: str
    file: str | None
    revision: str | None

    @property
    def called(self) -> str:
        """What the operator calls it."""
        return f"{self.repository}/{self.file}" if self.file else self.repository


def on_hub(source: str) -> OnHub | None:
    """What a source names on the Hugging Face Hub; None if it can't be that, or is rather a file's path."""
    found = next((match for pattern in ON_HUB if (match := pattern.fullmatch(unquote(source)))), None)
    return (
        None
        if found is None or found["repository"].endswith((*TENSORS, ".onnx"))
        else OnHub(found["repository"], found["file"], found["revision"])
    )


def format_of(source: Path) -> Format:
    """The format of a local model, by its first bytes. Raises ConfigurationError with what it is instead."""
    try:
        status = source.stat()
        if stat.S_ISDIR(status.st_mode):
            return "folder"
        if not stat.S_ISREG(status.st_mode):
            raise ConfigurationError(f"{source} is not a regular file; {EXPECTED}")
        with source.open("rb") as file:
            head = file.read(HEAD)
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                names = archive.namelist()
            if not any(name.endswith(("data.pkl", ".ckpt")) for name in names):
                inside = f" with {names[0][:200]}" if names else " with nothing"
                raise ConfigurationError(f"{source} is a zip archive{inside} in it: unpack it first; {EXPECTED}")
            return "torch"
    except FileNotFoundError as error:
        if source.is_symlink():
            raise ConfigurationError(f"{source} is a link to {source.readlink()}, which is not there") from error
        raise ConfigurationError(f"there is no file {source}") from error
    except zipfile.BadZipFile:
        return "torch"  # reading its tensors says what is wrong
    except OSError as error:
        raise ConfigurationError(f"{source} can't be read: {sentence(error)}") from error
    wrong = no_model(head)
    if wrong is not None:
        raise ConfigurationError(f"{source} {wrong}; {EXPECTED}")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER:
        return "safetensors"
    return "onnx"


def check_no_address(source: str) -> None:
    """Raise UsageError for a SOURCE that is a URL."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        raise UsageError(f"{source} is a URL; expected a file or folder on this host: download it first")


def no_model(head: bytes) -> str | None:
    """What a file is if it is not a model, by its first bytes; None if it may be one."""
    start = head.lstrip().lower()
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file itself: run `git lfs pull` where it came from, or download the file"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, perhaps about the model or an error: download the file itself"
    if head.startswith(b"PK"):
        return "is a zip archive that is damaged or not complete: download it again"
    if head.startswith(b"\x80") and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "is a pickle, which can contain code: save it as safetensors, or with torch 1.6 or later"
    if head.startswith(b"GGUF"):
        return "is a GGUF file, which nodes can't load"
    if head.startswith((b"\x1f\x8b", b"BZh", b"7z\xbc\xaf", b"Rar!", b"\xfd7zXZ")):
        return "is a compressed archive: unpack it first"
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8")) or head[8:12] == b"WEBP":
        return "is an image"
    if head.startswith(b"\x89HDF"):
        return "is an HDF5 file, as Keras writes them"
    if head[4:8] == b"TFL3":
        return "is a TensorFlow Lite file"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it first"
    if not head.strip(bytes(range(32, 127)) + b"\t\r\n\f"):
        return "is a text file"
    return None


def header_of(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The type and shape of each tensor in a safetensors file, by name; reads no tensor.

    Raises ConfigurationError if the file is damaged or not complete.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            wrong = no_model(file.read(HEAD))
            if wrong is not None:
                raise ConfigurationError(f"{path} {wrong}")
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise ValueError(f"its header would have {length} bytes")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        tensors = {name: (str(entry["dtype"]), tuple(map(int, entry["shape"]))) for name, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except OSError as error:
        raise ConfigurationError(f"{path} can't be read: {sentence(error)}") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not a safetensors file, or it is damaged: {sentence(error)}") from error
    if 8 + length + end != size:
        raise ConfigurationError(f"{path} has {size} bytes, but its header says {8 + length + end}: get it again")
    return tensors


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors; empty for any other file. For files that `header_of` has read."""
    if format_of(path) != "safetensors":
        return {}
    with path.open("rb") as file:
        found = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__")
    return found if isinstance(found, dict) else {}


def digest_of_files(root: Path, files: Iterable[Path]) -> str:
    """The SHA-256 of a file, or of a folder's `files` with their paths in it. Raises OSError."""
    if root.is_file():
        return sha256_of(root)
    sums = {str(path.relative_to(root)): sha256_of(path) for path in files}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
