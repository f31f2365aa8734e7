"""Models that the operator has added: one JSON record for each, `{weights}/added/NAME.json`, and the files that it lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue, ValidationError

from imagemill.shared.errors import ConfigurationError, sentence
from imagemill.shared.options.base import Model, ModelName, check_model_name, validation_sentence
from imagemill.worker.models import files
from imagemill.worker.models.catalogue import MODELS, REPOSITORIES, WEIGHTS
from imagemill.worker.models.checksums import sha256_of, write_json

Kind = Literal["matting", "checkpoint", "controlnet", "vae", "lora", "inpainting"]
ENGINES: Mapping[Kind, str] = {
    "matting": "rembg",
    "checkpoint": "diffusion",
    "controlnet": "diffusion",
    "vae": "diffusion",
    "lora": "diffusion",
    "inpainting": "lama",
}
"""The engine that uses each kind of model."""

TITLES: Mapping[str, str] = {
    "matting": "matting model",
    "checkpoint": "checkpoint",
    "controlnet": "ControlNet",
    "vae": "VAE",
    "lora": "LoRA",
    "inpainting": "inpainting model",
    "checker": "safety checker",
}
"""What people call each kind, with that of the catalogue which can't be added."""

SELECTABLE: tuple[Kind, ...] = ("matting", "checkpoint", "inpainting")
"""The kinds that a job can name as its `model`; each of them is a lane."""

TAKEN = frozenset({*MODELS, *(file.name for file in WEIGHTS), *(repository.name for repository in REPOSITORIES)})
"""Names in the catalogue, which no added model can have."""


def _inside(path: str) -> str:
    parts = PurePosixPath(path)
    if not parts.parts or parts.is_absolute() or ".." in parts.parts:
        raise ValueError("a file's path must lie within the weights folder")
    return path


class AddedFile(Model):
    """One file of a model: its path within the weights folder, its size in bytes and its SHA-256 in hex."""

    path: Annotated[str, Field(max_length=500), AfterValidator(_inside)]
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Added(Model):
    """An added model: what it is, what its family needs to know about it, its files, and where and when it came from.

    `family` is one that its engine knows, such as `isnet`. `parameters` belong to the family and are checked by it. `origin`
    is the SHA-256 of the source, which identifies it if it is added again.
    """

    version: Literal[1] = 1
    name: ModelName
    kind: Kind
    family: str = Field(max_length=64)
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    files: tuple[AddedFile, ...] = Field(min_length=1, max_length=1000)
    source: str = Field(max_length=1000)
    origin: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    added: datetime

    @property
    def engine(self) -> str:
        """The name of the engine that uses it."""
        return ENGINES[self.kind]

    @property
    def place(self) -> str:
        """Its file or folder, within the weights folder."""
        first = PurePosixPath(self.files[0].path)
        return str(first if self.kind in ("matting", "inpainting", "lora") else PurePosixPath(*first.parts[:2]))

    def is_here(self, weights: Path) -> bool:
        """Whether all of its files are in the weights folder, with their original sizes."""
        try:
            return all((weights / file.path).stat().st_size == file.size for file in self.files)
        except OSError:
            return False


def record_path(weights: Path, name: str) -> Path:
    """Where a model's record belongs."""
    return weights / "added" / f"{name}.json"


def find(weights: Path, name: str) -> Added | None:
    """The record of an added model; None if there is none. Raises ConfigurationError if it is damaged.

    A record is read again only after it has been replaced, because this is called for every image.
    """
    path = record_path(weights, name)
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"{path} can't be read: {sentence(error)}") from error
    return _read(path, status.st_mtime_ns, status.st_ino)


def everything(weights: Path) -> tuple[list[Added], list[str]]:
    """All added models by name, and what is wrong with those records that can't be used, as sentences."""
    found, faults = [], []
    for name in names(weights):
        try:
            record = find(weights, name)
        except ConfigurationError as error:
            faults.append(error.message)
        else:
            found += [record] if record is not None else []
    return found, faults


def names(weights: Path) -> list[str]:
    """The names of all added models, including those whose records are damaged."""
    return sorted(path.stem for path in (weights / "added").glob("*.json"))


def selectable(weights: Path, engine: str) -> list[Added]:
    """The added models that jobs of an engine can name, whether or not their files are here."""
    return [record for record in everything(weights)[0] if record.engine == engine and record.kind in SELECTABLE]


def write(weights: Path, record: Added) -> None:
    """Store a model's record. Raises OSError."""
    path = record_path(weights, record.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record.model_dump(mode="json"))


def describe(weights: Path, record: Added) -> dict[str, Any]:
    """An added model with its state, path, size in bytes and current variants, and the fields that the catalogue's have."""
    path, here = weights / record.place, record.is_here(weights)
    own = path.suffix == ".onnx" and path.is_file()
    return {
        **record.model_dump(mode="json", exclude={"version", "files", "origin"}),
        **{"engine": record.engine, "state": "there" if here else "damaged" if path.exists() else "missing"},
        **{"path": str(path), "bytes": sum(file.size for file in record.files) if here else None},
        **{"also": [kind for kind in files.KINDS if own and files.is_current(path, kind)], "licence": "", "revision": ""},
    }


def verify(weights: Path, record: Added) -> Iterator[tuple[bool, str]]:
    """Read the files of an added model, and their variants; yield whether each is correct, and a sentence. Raises OSError."""
    remedy, faults = f"imagemill models add {record.name} SOURCE --replace", []
    for file in record.files:
        path = weights / file.path
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif (sha256 := sha256_of(path)) != file.sha256:
            faults.append(f"{path} has changed since it was added: its SHA-256 is {sha256}, not {file.sha256}")
    yield from ((False, f"{fault}: {remedy}") for fault in faults)
    if not faults:
        yield True, f"{record.name}: correct (added {record.added:%Y-%m-%d} from {record.source})"
    if record.kind == "matting":
        yield from files.verify_variants(weights / record.place, record.files[0].sha256)


@lru_cache(maxsize=256)
def _read(path: Path, mtime_ns: int, inode: int) -> Added:  # noqa: ARG001  # they tell versions of the record apart
    remedy = f"add the model again with `imagemill models add {path.stem} SOURCE --replace`"
    try:
        check_model_name(path.stem)
        record = Added.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{path} can't be read: {sentence(error)}") from error
    except ValidationError as error:
        raise ConfigurationError(f"{path} is damaged ({validation_sentence(error)}): {remedy}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not the record of a model: {sentence(error)}") from error
    if record.name != path.stem:
        raise ConfigurationError(f"{path} is the record of another model, {record.name}: {remedy}")
    if record.name in TAKEN:
        raise ConfigurationError(f"{path}: {record.name} is now in imagemill's own catalogue: add it under another name")
    return record
