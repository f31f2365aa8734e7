"""Models that come as folders from the hub: which repositories, pinned to commits, and which of their files are loaded.

The files' checksums are the hub's own: `imagemill models pull` has them from the pinned commit, checks what it downloads
against them, and writes them beside the files, where `imagemill models verify` and the nodes find them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from imagemill.worker.models.catalogue import MODELS, Repository, repository
from imagemill.worker.models.checksums import Sums, blocks, digest, read_json

RECORD = "imagemill.json"
"""In a repository's folder: its commit, and of each file size, SHA-256 and the sum that the hub gives."""

State = Literal["missing", "there", "unchecked"]


def folder_of(weights: Path, one: Repository) -> Path:
    """Where a repository's files lie, or would: `{weights}/{engine}/{name}`."""
    return weights / one.engine / one.name


def lora_file(weights: Path, name: str) -> Path:
    """The file of an adapter: one that was pulled, else the operator's own, `{weights}/diffusion/loras/{name}.safetensors`."""
    pulled = weights / "diffusion" / name / "pytorch_lora_weights.safetensors"
    return pulled if pulled.is_file() else weights / "diffusion" / "loras" / f"{name}.safetensors"


def state(weights: Path, one: Repository) -> State:
    """What is known of a repository's folder without reading its large files; `unchecked` is one that no pull has recorded."""
    folder = folder_of(weights, one)
    recorded = read_json(folder / RECORD).get("files", {})
    if recorded:
        return "there" if all(_has(folder / name, told["size"]) for name, told in recorded.items()) else "missing"
    return "unchecked" if _loadable(folder, one) else "missing"


def is_here(weights: Path, model: str) -> bool:
    """Whether all that a model is loaded from is on this host's disk."""
    return all(state(weights, repository(name)) != "missing" for name in MODELS[model])


def _loadable(folder: Path, one: Repository) -> bool:
    """Whether a folder that something else has put here has safetensors and JSON wherever the repository has some."""
    wanted = {(Path(pattern).parent, Path(pattern).suffix) for pattern in one.files if not pattern.endswith(".txt")}
    return all(any((folder / part).glob(f"*{suffix}")) for part, suffix in wanted)


def _has(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def wanted(one: Repository, names: Iterable[str], pattern: str | None = None) -> list[str]:
    """Those of a repository's files that are loaded, or that one of its patterns is for."""
    patterns = one.files if pattern is None else (pattern,)
    return sorted(name for name in names if any(_matches(name, each) for each in patterns))


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def faults(weights: Path, one: Repository) -> Iterator[str]:
    """What is wrong with a repository's files, in sentences; reads all of them. Raises OSError."""
    folder = folder_of(weights, one)
    record = read_json(folder / RECORD)
    if not record:
        yield f"{folder} was not pulled by imagemill, so that there is nothing to check it against"
    for name, told in record.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
        elif (found := sums(path)[0]) != told["sha256"]:
            yield f"{path} is not the file that was pulled: its SHA-256 is {found}, not {told['sha256']}"


def sums(path: Path) -> tuple[str, str]:
    """A file's SHA-256, and the SHA-1 that git gives to a blob of its bytes, in hex. Raises OSError."""
    whole, blob = Sums(), hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    for block in blocks(path):
        whole.update(block)
        blob.update(block)
    return whole.sha256, blob.hexdigest()


def digest_of(folder: Path) -> str:
    """16 hex digits that stand for what is in a repository's folder: of the sums on record, else of its safetensors' own.

    Those are computed once and remembered beside the files. Raises OSError.
    """
    recorded = read_json(folder / RECORD).get("files", {})
    known = {name: told["sha256"] for name, told in recorded.items()} or {
        str(path.relative_to(folder)): digest(path) for path in folder.rglob("*.safetensors")
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
