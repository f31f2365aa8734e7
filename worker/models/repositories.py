"""Folders of models from the Hugging Face Hub: their state, their checksums, and which files of a repository are loaded.

`imagemill models pull` checks every download against the hub's checksums for the pinned commit and records them in the
folder, where `imagemill models verify` and the nodes read them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from imagemill.shared.diffusion_models import FAMILIES
from imagemill.shared.engines import ENGINES
from imagemill.shared.errors import UsageError
from imagemill.shared.options.stylize import LORA_NAME
from imagemill.worker.models import added, files
from imagemill.worker.models.catalogue import LICENSED, MODELS, REPOSITORIES, WEIGHTS, Repository
from imagemill.worker.models.checksums import digest, read_json, sha256_of

RECORD = "imagemill.json"
"""The record in a repository's folder: its commit, and each file's size, SHA-256 and checksum on the hub."""

State = Literal["missing", "there", "unchecked"]


def folder_of(weights: Path, entry: Repository) -> Path:
    """Where a repository's files belong: `{weights}/{engine}/{name}`."""
    return weights / entry.engine / entry.name


def lora_file(weights: Path, name: str) -> Path:
    """A LoRA's file: the pulled one, or else the operator's own, `{weights}/diffusion/loras/{name}.safetensors`."""
    entry = next((entry for entry in REPOSITORIES if entry.name == name and entry.kind == "lora"), None)
    pulled = None if entry is None else folder_of(weights, entry) / entry.files[0]
    if pulled is not None and pulled.is_file():
        return pulled
    return weights / "diffusion" / "loras" / f"{name}.safetensors"


def state(weights: Path, entry: Repository) -> State:
    """The state of a repository's folder, without reading large files; `unchecked` folders were not written by a pull."""
    folder = folder_of(weights, entry)
    recorded = read_json(folder / RECORD).get("files", {})
    if recorded:
        sizes = {name: path.stat().st_size for name in recorded if (path := folder / name).is_file()}
        return "there" if sizes == {name: file["size"] for name, file in recorded.items()} else "missing"
    places = {(Path(pattern).parent, Path(pattern).suffix) for pattern in entry.files if not pattern.endswith(".txt")}
    complete = all(any((folder / part).glob(f"*{suffix}")) for part, suffix in places)
    return "unchecked" if complete else "missing"


def is_here(weights: Path, model: str) -> bool:
    """Whether a model that jobs can name is on disk, in files that nodes can load. Raises ConfigurationError."""
    if model in LICENSED:
        return files.is_licensed(weights, LICENSED[model]) and files.required_file(weights, LICENSED[model]).is_file()
    if model not in MODELS:
        record = added.find(weights, model)
        if record is None or record.kind not in added.SELECTABLE or not record.is_here(weights):
            return False
        return record.kind != "checkpoint" or record.family in FAMILIES
    parts = parts_of(model)
    return all(state(weights, entry) != "missing" for entry in REPOSITORIES if entry.name in parts) and all(
        files.required_file(weights, entry).is_file() for entry in WEIGHTS if entry.name in parts
    )


def parts_of(model: str) -> tuple[str, ...]:
    """The entries of the catalogue, or the added model, whose files a model that jobs can name consists of."""
    return MODELS.get(model, (model,))


def models_here(weights: Path, engine: str) -> list[str]:
    """The models that jobs of an engine can name and that are on disk: first the catalogue's, then added ones."""
    own = [name for name, entry in LICENSED.items() if entry.engine == engine]
    own += [record.name for record in added.selectable(weights, engine)]
    models = dict.fromkeys(model for row in ENGINES if row.name == engine for model in (*row.models, *own))
    return [model for model in models if is_here(weights, model)]


def parts_here(weights: Path) -> list[str]:
    """The LoRAs, ControlNets and VAEs on disk: the catalogue's, added ones, and files among the operator's own LoRAs."""
    kinds = ("lora", "controlnet", "vae")
    found = [entry.name for entry in REPOSITORIES if entry.kind in kinds and state(weights, entry) != "missing"]
    found += [record.name for record in added.everything(weights)[0] if record.kind in kinds and record.is_here(weights)]
    own = [path.stem for path in (weights / "diffusion" / "loras").glob("*.safetensors")]
    found += [name for name in own if re.fullmatch(LORA_NAME, name)]
    return sorted(set(found))


def places_of(weights: Path, part: str) -> list[Path]:
    """Where the files of a LoRA, ControlNet or VAE are: a folder, a file, or the record of one that the operator has added."""
    own = weights / "diffusion"
    return [own / part, own / "loras" / f"{part}.safetensors", added.record_path(weights, part)]


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The file names that match a pattern, sorted; `*` does not match `/`."""
    return sorted(
        name for name in names if any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)
    )


def describe(weights: Path, entry: Repository) -> dict[str, Any]:
    """A repository's catalogue entry with its state, path and size in bytes, and the fields that files have."""
    path, status = folder_of(weights, entry), state(weights, entry)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if status != "missing" else None
    return {**asdict(entry), "state": status, "path": str(path), "bytes": size, "also": []}


def verify(weights: Path, entry: Repository) -> Iterator[tuple[bool, str]]:
    """Read all files of a repository; yield its faults, or else that it is correct, as sentences. Raises OSError."""
    folder, faults = folder_of(weights, entry), []
    record = read_json(folder / RECORD)
    if not record:
        faults.append(f"{folder} was not written by `imagemill models pull`, so there are no checksums to compare")
    for name, expected in record.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif (sha256 := sha256_of(path)) != expected["sha256"]:
            faults.append(f"{path} has changed since it was pulled: its SHA-256 is {sha256}, not {expected['sha256']}")
    yield from ((False, f"{fault}: imagemill models pull {entry.name}") for fault in faults)
    if not faults:
        yield True, f"{entry.name}: correct (commit {record['commit']})"


def remove(weights: Path, entry: Repository) -> int | None:
    """Delete a pulled repository; return the number of bytes freed, or None if it was not there. Raises UsageError."""
    folder = folder_of(weights, entry)
    if not folder.is_dir():
        return None
    if not (folder / RECORD).is_file():
        raise UsageError(f"{folder} was not written by `imagemill models pull`: if nothing needs it, delete it yourself")
    freed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return freed


def digest_of(folder: Path) -> str:
    """16 hex digits that identify the content of a repository's folder, from its record or else its safetensors files.

    The latter are hashed once and their checksums remembered. Raises OSError.
    """
    recorded = read_json(folder / RECORD).get("files", {})
    sums = {name: file["sha256"] for name, file in recorded.items()} or {
        str(path.relative_to(folder)): digest(path) for path in folder.rglob("*.safetensors")
    }
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]
