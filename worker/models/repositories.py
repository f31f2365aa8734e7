"""Folders of models from the Hugging Face Hub: their state, their checksums, and which files of a repository are loaded.

`imagemill models pull` checks every download against the hub's checksums for the pinned commit and records them in the
folder, where `imagemill models verify` and the nodes read them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from imagemill.worker.models.catalogue import MODELS, Repository, repository
from imagemill.worker.models.checksums import Hasher, digest, read_blocks, read_json

RECORD = "imagemill.json"
"""The record in a repository's folder: its commit, and each file's size, SHA-256 and checksum on the hub."""

State = Literal["missing", "there", "unchecked"]


def folder_of(weights: Path, entry: Repository) -> Path:
    """Where a repository's files belong: `{weights}/{engine}/{name}`."""
    return weights / entry.engine / entry.name


def lora_file(weights: Path, name: str) -> Path:
    """A LoRA's file: the pulled one, or else the operator's own, `{weights}/diffusion/loras/{name}.safetensors`."""
    pulled = weights / "diffusion" / name / "pytorch_lora_weights.safetensors"
    return pulled if pulled.is_file() else weights / "diffusion" / "loras" / f"{name}.safetensors"


def state(weights: Path, entry: Repository) -> State:
    """The state of a repository's folder, without reading large files; `unchecked` folders were not written by a pull."""
    folder = folder_of(weights, entry)
    recorded = read_json(folder / RECORD).get("files", {})
    if recorded:
        return "there" if all(_has_size(folder / name, file["size"]) for name, file in recorded.items()) else "missing"
    return "unchecked" if _looks_complete(folder, entry) else "missing"


def is_here(weights: Path, model: str) -> bool:
    """Whether all repositories of a model are on disk."""
    return all(state(weights, repository(name)) != "missing" for name in MODELS[model])


def _looks_complete(folder: Path, entry: Repository) -> bool:
    """Whether a folder has safetensors and JSON files in every place where the repository has them."""
    places = {(Path(pattern).parent, Path(pattern).suffix) for pattern in entry.files if not pattern.endswith(".txt")}
    return all(any((folder / part).glob(f"*{suffix}")) for part, suffix in places)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The file names that match a pattern, sorted; `*` does not match `/`."""
    return sorted(
        name for name in names if any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)
    )


def describe(weights: Path, entry: Repository) -> dict[str, Any]:
    """A repository's catalogue entry with its state, path and size in bytes, and the fields that files have."""
    path, status = folder_of(weights, entry), state(weights, entry)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if status != "missing" else None
    return {**asdict(entry), "state": status, "path": str(path), "bytes": size, "also": [], "commercial": True}


def verify(weights: Path, entry: Repository) -> Iterator[tuple[bool, str]]:
    """Read all files of a repository; yield its faults, or else that it is correct, as sentences. Raises OSError."""
    folder, fix = folder_of(weights, entry), f"imagemill models pull {entry.name}"
    record = read_json(folder / RECORD)
    faults = []
    if not record:
        faults.append(f"{folder} was not written by `imagemill models pull`, so there are no checksums to compare")
    for name, expected in record.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif (sha256 := sha256_and_blob(path)[0]) != expected["sha256"]:
            faults.append(f"{path} has changed since it was pulled: its SHA-256 is {sha256}, not {expected['sha256']}")
    yield from ((False, f"{fault}: {fix}") for fault in faults)
    if not faults:
        yield True, f"{entry.name}: correct (commit {record['commit']})"


def sha256_and_blob(path: Path) -> tuple[str, str]:
    """A file's SHA-256, and its git blob hash (SHA-1), in hex. Raises OSError."""
    hasher, blob = Hasher(), hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    for block in read_blocks(path):
        hasher.update(block)
        blob.update(block)
    return hasher.sha256, blob.hexdigest()


def digest_of(folder: Path) -> str:
    """16 hex digits that identify the content of a repository's folder, from its record or else its safetensors files.

    The latter are hashed once and their checksums remembered. Raises OSError.
    """
    recorded = read_json(folder / RECORD).get("files", {})
    sums = {name: file["sha256"] for name, file in recorded.items()} or {
        str(path.relative_to(folder)): digest(path) for path in folder.rglob("*.safetensors")
    }
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]
