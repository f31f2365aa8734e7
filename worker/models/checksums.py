"""Checksums of model files, computed once and remembered next to each file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from imagemill.worker.transfer.files import replacing

BLOCK = 1 << 20


@dataclass(frozen=True)
class FileSums:
    """Checksums of a file, valid while it has this size and modification time; `checksum` is empty if not computed."""

    sha256: str
    size: int
    mtime_ns: int
    checksum: str = ""


class Hasher:
    """Hashes blocks of bytes with SHA-256 and with the algorithm of a publisher's checksum, such as `md5:...`."""

    def __init__(self, checksum: str) -> None:
        # Some publishers only give an MD5, so the integrity of a download also depends on TLS.
        self._published = hashlib.new(checksum.partition(":")[0], usedforsecurity=False)
        self._sha256 = hashlib.sha256()

    def update(self, block: bytes) -> None:
        self._published.update(block)
        self._sha256.update(block)

    @property
    def checksum(self) -> str:
        """`md5:...` or `sha256:...`, as in Weights."""
        return f"{self._published.name}:{self._published.hexdigest()}"

    def sums(self, status: os.stat_result) -> FileSums:
        return FileSums(self._sha256.hexdigest(), status.st_size, status.st_mtime_ns, self.checksum)


def digest(path: Path) -> str:
    """A file's SHA-256 in hex, read from the file only if its size or modification time has changed. Raises OSError."""
    remembered = remembered_sums(path)
    if remembered is None:
        with _hashing:  # all threads of a process ask at once for the model of their first images
            remembered = remembered_sums(path) or hash_file(path)
    return remembered.sha256


def with_digest(path: Path) -> tuple[Path, str]:
    """A file and its digest: a cache key that changes when the file is replaced. Raises OSError."""
    return path, digest(path)


def remembered_sums(path: Path) -> FileSums | None:
    """The remembered checksums of a file that has not changed since, or None. Raises OSError if the file is missing."""
    status, remembered = path.stat(), _unwritten.get(path)
    with suppress(TypeError):  # the file of sums is missing or holds something else
        remembered = FileSums(**read_json(sums_path(path)))
    if remembered is not None and (remembered.size, remembered.mtime_ns) == (status.st_size, status.st_mtime_ns):
        return remembered
    return None


def hash_file(path: Path, checksum: str = "sha256:") -> FileSums:
    """Read a whole file, compute SHA-256 and the kind of sum that `checksum` is, and remember both. Raises OSError."""
    hasher, before = Hasher(checksum), path.stat()
    for block in read_blocks(path):
        hasher.update(block)
    sums, after = hasher.sums(before), path.stat()
    if (after.st_size, after.st_mtime_ns) == (sums.size, sums.mtime_ns):
        remember(path, sums)
    return sums


def sha256_of(path: Path) -> str:
    """A file's SHA-256 in hex, always read from the file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remember(path: Path, sums: FileSums) -> None:
    """Write a file's checksums next to it, or keep them in this process if the folder is read-only."""
    try:
        write_json(sums_path(path), asdict(sums))
    except OSError:
        _unwritten[path] = sums


_hashing = Lock()
_unwritten: dict[Path, FileSums] = {}
"""Checksums of files in read-only folders: nodes need them for every image."""


def read_blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes, in blocks."""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def sums_path(path: Path) -> Path:
    """The file that remembers a file's checksums."""
    return path.with_name(f"{path.name}.sums.json")


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object; empty if the file is missing or holds anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a small JSON file atomically, because several processes may write it. Raises OSError."""
    with replacing(path) as part:
        part.write_text(json.dumps(content))
        part.chmod(0o644)  # workers may run as another user
