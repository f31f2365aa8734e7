"""Checksums of the models' files, computed once and remembered beside them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BLOCK = 1 << 20


class Sums:
    """The SHA-256 of bytes that come in blocks, and beside it the sum that a publisher gives."""

    def __init__(self, like: str = "sha256:") -> None:
        self._algorithm = like.partition(":")[0]
        # Not for security: that a file is the pinned one also hangs on TLS, and some publishers give an MD5 alone.
        self._published = hashlib.new(self._algorithm, usedforsecurity=False)
        self._sha256 = hashlib.sha256()

    def update(self, block: bytes) -> None:
        self._published.update(block)
        self._sha256.update(block)

    @property
    def checksum(self) -> str:
        """`md5:...` or `sha256:...`, as in Weights."""
        return f"{self._algorithm}:{self._published.hexdigest()}"

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


@dataclass(frozen=True)
class Known:
    """What is known of a file as long as its size and time are these; `checksum` is empty where it was not computed."""

    sha256: str
    size: int
    mtime_ns: int
    checksum: str = ""


def digest(path: Path) -> str:
    """A file's SHA-256 in hex, remembered beside it until its size or time of change differ. Raises OSError."""
    remembered = known(path)
    return remembered.sha256 if remembered else check(path, "sha256:").sha256


def with_digest(path: Path) -> tuple[Path, str]:
    """A file and its digest: another key than before as soon as the file is replaced."""
    return path, digest(path)


def known(path: Path) -> Known | None:
    """What is remembered of a file as it is now; None where nothing is. Raises OSError where there is no file."""
    status, remembered = path.stat(), _unwritten.get(path)
    with suppress(TypeError):  # nothing, or something else, is in that file
        remembered = Known(**read_json(_sidecar(path)))
    if remembered is not None and (remembered.size, remembered.mtime_ns) == (status.st_size, status.st_mtime_ns):
        return remembered
    return None


def check(path: Path, like: str) -> Known:
    """Read a whole file, and remember its sums; `like` is a checksum whose kind is computed beside SHA-256. Raises OSError."""
    sums, before = Sums(like), path.stat()
    for block in blocks(path):
        sums.update(block)
    found = Known(sums.sha256, before.st_size, before.st_mtime_ns, sums.checksum)
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns):
        remember(path, found)
    return found


def remember(path: Path, found: Known) -> None:
    """Write a file's sums beside it; where that can't be written they are remembered by this process."""
    try:
        write_json(_sidecar(path), asdict(found))
    except OSError:
        _unwritten[path] = found


_unwritten: dict[Path, Known] = {}
"""Sums of files in folders that are read-only: a node asks for them at each image."""


def blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes, a part at a time."""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sums.json")


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object; empty where it is missing or no such thing."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a small JSON file at once: several processes may write the same. Raises OSError."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(json.dumps(content))
    written = Path(file.name)
    try:
        written.chmod(0o644)  # a worker may run as another user
        written.replace(path)
    except BaseException:
        written.unlink()
        raise
