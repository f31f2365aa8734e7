"""The models' files: where they come from, pinned and with checksums. Workers load from disk and never download."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from shared.settings import WeightsSettings

REMBG = "https://github.com/danielgatis/rembg/releases/download"
SANSTER = "https://github.com/Sanster/models/releases/download"
BLOCK = 1 << 20
MB = 1_000_000

Kind = Literal["dynamic", "int8", "safetensors"]
"""What is made of a model here: its batch axis set free (worker.batch_axis), its weights in 8 bits (worker.quantize), or in
a format that holds nothing but numbers (worker.operations.inpaint.checkpoint)."""
KINDS: tuple[Kind, ...] = ("dynamic", "int8", "safetensors")
State = Literal["missing", "there", "unconverted", "unchecked", "damaged"]

CONVERTED = ("lama",)
"""Engines whose models are published in a format that may hold code: nodes load the safetensors file made of it, alone."""


@dataclass(frozen=True)
class Weights:
    """One file. `checksum` is `md5:...` or `sha256:...`, as its publisher gives it.

    `revision` is the tag or commit that `url` is pinned to. `about_bytes` is its size to three
    digits, to show and to look for room on the disk; None where it isn't known. What isn't
    `commercial` may not be used commercially: it is pulled only by its name and with its licence
    accepted, and no option selects it.
    """

    name: str
    engine: str
    file: str
    source: str
    revision: str
    url: str
    checksum: str
    licence: str
    about_bytes: int | None = None
    commercial: bool = True


def _rembg(
    name: str, checksum: str, licence: str, about_bytes: int, *, file: str | None = None, commercial: bool = True
) -> Weights:
    """A file of the release that rembg itself downloads from, with the checksum that rembg has for it."""
    file, tag = file or f"{name}.onnx", "v0.0.0"
    url = f"{REMBG}/{tag}/{file}"
    return Weights(name, "rembg", file, "danielgatis/rembg", tag, url, checksum, licence, about_bytes, commercial)


WEIGHTS: tuple[Weights, ...] = (
    _rembg("u2net", "md5:60024c5c889badc19c04ad937298a77b", "Apache-2.0", 176 * MB),
    _rembg("u2netp", "md5:8e83ca70e441ab06c318d82300c84806", "Apache-2.0", 4_570_000),
    _rembg("u2net_human_seg", "md5:c09ddc2e0104f800e3e1bb4652583d1f", "Apache-2.0", 176 * MB),
    _rembg("silueta", "md5:55e59e0d8062d2f5d013f4725ee84782", "Apache-2.0", 44_200_000),
    _rembg("isnet-general-use", "md5:fc16ebd8b0c10d971d3513d564d01e29", "Apache-2.0", 179 * MB),
    _rembg("isnet-anime", "md5:6f184e756bb3bd901c8849220a83e38e", "Apache-2.0", 176 * MB),
    _rembg("birefnet-general", "md5:7a35a0141cbbc80de11d9c9a28f52697", "MIT", 973 * MB, file="BiRefNet-general-epoch_244.onnx"),
    _rembg(
        "birefnet-general-lite",
        "md5:4fab47adc4ff364be1713e97b7e66334",
        "MIT",
        224 * MB,
        file="BiRefNet-general-bb_swin_v1_tiny-epoch_232.onnx",
    ),
    _rembg(
        "bria-rmbg",
        "sha256:5b486f08200f513f460da46dd701db5fbb47d79b4be4b708a19444bcd4e79958",
        "BRIA RMBG-2.0, non-commercial",
        1020 * MB,
        file="bria-rmbg-2.0.onnx",
        commercial=False,
    ),
    Weights(
        "lama",
        "lama",
        "big-lama.pt",
        "Sanster/models",
        "add_big_lama",
        f"{SANSTER}/add_big_lama/big-lama.pt",
        "md5:e3aa4aaa15225a33ec84f9f4bc47e500",
        "Apache-2.0",
        205 * MB,
    ),
)


def path_of(weights: Weights, settings: WeightsSettings) -> Path:
    """Where a model's file lies, or would, as it is published: `{folder}/{engine}/{name}.onnx`."""
    return settings.folder.expanduser() / weights.engine / f"{weights.name}{Path(weights.file).suffix}"


def needed(weights: Weights, settings: WeightsSettings) -> Path:
    """The file without which no node can run a model: its own, or where it is converted the one made of it."""
    path = path_of(weights, settings)
    return variant(path, "safetensors") if weights.engine in CONVERTED else path


def model_file(folder: Path, engine: str, name: str, *, int8: bool = False) -> Path:
    """The file that a node loads for a model: in 8 bits if wanted and there, else with a free batch axis, else as it came.

    `folder` is the weights' folder. A file that was made of another original than the one there is passed over. Of engines
    that are `CONVERTED` it is what was made of the original, whether that is there or not.
    """
    if engine in CONVERTED:
        return folder / engine / f"{name}.safetensors"
    original = folder / engine / f"{name}.onnx"
    kinds: tuple[Kind, ...] = ("int8", "dynamic") if int8 else ("dynamic",)
    return next((variant(original, kind) for kind in kinds if is_current(original, kind)), original)


def variant(original: Path, kind: Kind) -> Path:
    """Where lies what is made of a model: `u2net.int8.onnx`, `lama.safetensors`."""
    if kind == "safetensors":
        return original.with_suffix(".safetensors")
    return original.with_suffix(f".{kind}{original.suffix}")


def is_current(original: Path, kind: Kind) -> bool:
    """Whether there is such a file, made of the original that is there."""
    made = made_of(original, kind)
    return made.get("accepted") is True and variant(original, kind).is_file() and made.get("original") == digest(original)


def made_of(original: Path, kind: Kind) -> dict[str, Any]:
    """What is on record about a file that was made of a model, or that was refused; empty where nothing is."""
    return read_json(_record(original, kind))


def put_on_record(original: Path, kind: Kind, *, accepted: bool, told: dict[str, Any]) -> None:
    """Remember what came of making a file, with its digest and the original's, and `told`, what was measured."""
    file = variant(original, kind)
    sums = {"original": digest(original) if original.is_file() else None, "sha256": digest(file) if accepted else None}
    write_json(_record(original, kind), {"accepted": accepted, **sums, **told})


def forget_variants(original: Path) -> None:
    """Remove what was made of a model."""
    for kind in KINDS:
        file = variant(original, kind)
        for path in (file, _sidecar(file), _record(original, kind)):
            path.unlink(missing_ok=True)


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


def state(weights: Weights, settings: WeightsSettings) -> State:
    """What is known of a model's file without reading it.

    `unchecked` is one that neither pull nor verify has seen, `unconverted` one that is there but not what nodes load.
    """
    loadable = needed(weights, settings).is_file()
    try:
        found = known(path_of(weights, settings))
    except OSError:
        return "unchecked" if loadable else "missing"  # of somebody's own, converted
    if not loadable:
        return "unconverted"
    if found is None or found.checksum.partition(":")[0] != weights.checksum.partition(":")[0]:
        return "unchecked"
    return "there" if found.checksum == weights.checksum else "damaged"


def blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes, a part at a time."""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sums.json")


def _record(original: Path, kind: Kind) -> Path:
    return original.with_name(f"{variant(original, kind).name}.made.json")


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
