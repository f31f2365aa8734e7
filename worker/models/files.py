"""The models' files: where they come from, pinned and with checksums. Workers load from disk and never download."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from imagemill.shared.settings import WeightsSettings
from imagemill.worker.models.catalogue import CONVERTED, Weights
from imagemill.worker.models.checksums import _sidecar, digest, known, read_json, write_json

Kind = Literal["dynamic", "int8", "safetensors"]
"""What is made of a model here: its batch axis set free (models.batch_axis), its weights in 8 bits (models.quantize), or in
a format that holds nothing but numbers (models.conversion)."""
KINDS: tuple[Kind, ...] = ("dynamic", "int8", "safetensors")
State = Literal["missing", "there", "unconverted", "unchecked", "damaged"]


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


def _record(original: Path, kind: Kind) -> Path:
    return original.with_name(f"{variant(original, kind).name}.made.json")
