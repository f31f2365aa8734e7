"""Puts a model of the operator's own into the weights folder, whatever its kind, and takes it out again.

What is added is complete: it is made in a hidden folder beside its place, and moved there at the end.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from imagemill.shared.errors import ConfigurationError, UsageError, sentence
from imagemill.shared.options.base import check_model_name
from imagemill.worker.models import added
from imagemill.worker.models.added import TAKEN, Added, AddedFile, Kind
from imagemill.worker.models.checksums import sha256_of, sums_path, write_json
from imagemill.worker.models.download import check_space
from imagemill.worker.models.files import KINDS, remove_variants
from imagemill.worker.models.repositories import RECORD
from imagemill.worker.transfer.files import publish

Outcome = Literal["present", "added", "replaced"]

RESERVED = (*(f".{kind}" for kind in KINDS), ".made", ".sums", ".lock", ".part")
"""Endings of names that imagemill gives to files beside a model."""


@dataclass(frozen=True)
class Made:
    """A model that is ready to be moved to its place.

    `path` is its file or folder in the folder that it was made in, `place` where it belongs within the weights folder.
    `found` are sentences about what was recognised.
    """

    kind: Kind
    family: str
    path: Path
    place: str
    parameters: dict[str, Any] = field(default_factory=dict)
    found: tuple[str, ...] = ()


def check_name(name: str) -> None:
    """Raise UsageError for a name that no added model can have."""
    try:
        check_model_name(name)
    except ValueError as error:
        raise UsageError(f"{name!r}: {error}") from error
    if name in TAKEN:
        raise UsageError(f"{name} is a model in imagemill's own catalogue: choose another name")
    if name == "loras" or name.endswith(RESERVED):
        raise UsageError(f"{name} is the name of files that imagemill makes itself: choose another name")


def add(
    weights: Path,
    name: str,
    engine: str,
    make: Callable[[Path], Made],
    *,
    source: str,
    origin: str,
    replace: bool = False,
    agrees: Callable[[Added], bool] = lambda _: True,
) -> tuple[Outcome, Added, tuple[str, ...]]:
    """Add a model that `make` makes in the folder that it is given; also returns its record and what `make` has found.

    `source` says where it is from, and `origin` is the SHA-256 of that; if it was added before and its record `agrees`,
    nothing is done. Raises UsageError if the name is taken, and ConfigurationError, also if the folder can't be written.
    """
    check_name(name)
    try:
        with _locked(weights):
            before = _before(weights, name)
            if before is not None and before.origin == origin and before.is_here(weights) and agrees(before):
                return "present", before, ()
            if before is not None and not replace:
                when = f"{before.added:%Y-%m-%d}"
                raise UsageError(f"{name} was added on {when} from {before.source}: choose another name, or add --replace")
            with _workshop(weights / engine, name) as work:
                made = make(work)
                if (weights / made.place).exists() and before is None and not replace:
                    raise UsageError(f"{weights / made.place} is there: choose another name, or add --replace")
                record = _record(name, made, source, origin)
                _move(weights, made, work)
            added.write(weights, record)
            if before is not None:
                _delete(weights, {file.path for file in before.files} - {file.path for file in record.files})
            return "added" if before is None else "replaced", record, made.found
    except OSError as error:
        raise ConfigurationError(f"{weights} can't be written: {sentence(error)}") from error


def remove(weights: Path, name: str) -> int:
    """Delete an added model, also one with a damaged record; return the number of bytes that are free now. Raises OSError."""
    with _locked(weights):
        try:
            record = added.find(weights, name)
        except ConfigurationError:
            record = None
        freed = _delete(weights, {file.path for file in record.files}) if record is not None else 0
        added.record_path(weights, name).unlink(missing_ok=True)
        return freed


def copied(source: Path, target: Path) -> Path:
    """A copy of a file, if there is room for it. Raises ConfigurationError and OSError."""
    check_space(target.parent, source.name, source.stat().st_size)
    shutil.copyfile(source, target)
    return target


@contextmanager
def _locked(weights: Path) -> Iterator[None]:
    """Hold a lock between processes on the weights folder; the kernel releases it if the process dies."""
    weights.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(weights, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _before(weights: Path, name: str) -> Added | None:
    """The present record of this name. A damaged one counts as none: adding the model again is its repair."""
    try:
        return added.find(weights, name)
    except ConfigurationError:
        return None


@contextmanager
def _workshop(engine: Path, name: str) -> Iterator[Path]:
    """A hidden folder to make a model in; one that a killed process has left is removed first."""
    work = engine / f".adding-{name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):  # not empty
            engine.rmdir()


def _move(weights: Path, made: Made, work: Path) -> None:
    """Move what was made to its place. Workers may run as another user, who must be able to read it."""
    target = weights / made.place
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in (made.path, *made.path.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if target.is_dir():
        target.rename(work / "before")
    publish(made.path, target)
    if target.suffix == ".onnx":
        remove_variants(target)


def _record(name: str, made: Made, source: str, origin: str) -> Added:
    """The record of what was made. A folder gets one of its own, as those of pulled models have."""
    if made.path.is_dir():
        sums = {str(path.relative_to(made.path)): _sums(path) for path in sorted(made.path.rglob("*")) if path.is_file()}
        write_json(made.path / RECORD, {"added": name, "files": sums})
        sums[RECORD] = _sums(made.path / RECORD)
        files = [AddedFile(path=f"{made.place}/{path}", **known) for path, known in sums.items()]
    else:
        files = [AddedFile(path=made.place, **_sums(made.path))]
    known = {"kind": made.kind, "family": made.family, "parameters": made.parameters, "origin": origin}
    return Added(name=name, files=tuple(files), source=source, added=datetime.now(UTC), **known)


def _sums(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _delete(weights: Path, paths: set[str]) -> int:
    """Delete files of the weights folder and what was made of them, and folders that are empty then."""
    freed = 0
    for path in sorted(weights / path for path in paths):
        with suppress(FileNotFoundError):
            freed += path.stat().st_size
        if path.suffix == ".onnx":
            remove_variants(path)
        path.unlink(missing_ok=True)
        sums_path(path).unlink(missing_ok=True)
        for folder in path.parents:
            if folder == weights or any(folder.iterdir()):
                break
            folder.rmdir()
    return freed
