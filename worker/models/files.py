"""Where model files are on disk, and which of them a node loads. Nodes never download."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from imagemill.worker.hardware.cpu import has_vnni
from imagemill.worker.models.catalogue import CONVERTED, WEIGHTS, Weights
from imagemill.worker.models.checksums import digest, hash_file, read_json, remembered_sums, sums_path, write_json

Kind = Literal["fp32", "dynamic", "int8", "safetensors"]
"""A variant made from a published file: in single instead of half precision (models.single_precision), with a free batch axis
(models.batch_axis), with 8-bit weights (models.quantize), or in a format that can't contain code (models.conversion)."""
KINDS: tuple[Kind, ...] = ("fp32", "dynamic", "int8", "safetensors")
State = Literal["missing", "there", "unconverted", "unchecked", "damaged"]


def path_of(folder: Path, weights: Weights) -> Path:
    """Where the published file belongs: `{folder}/{engine}/{name}.onnx`."""
    return folder / weights.engine / f"{weights.name}{Path(weights.file).suffix}"


def required_file(folder: Path, weights: Weights) -> Path:
    """The file that a node needs in order to run a model: the published one, or the one converted from it."""
    path = path_of(folder, weights)
    return variant(path, "safetensors") if weights.engine in CONVERTED else path


def model_file(folder: Path, engine: str, name: str, *, int8: bool = False, cpu: bool = True) -> Path:
    """The file that a node loads: 8-bit if wanted and present, else in single precision on a CPU, else with a free batch
    axis, else as published.

    `folder` is the weights folder. Variants of an earlier original are skipped, and so are 8-bit ones that need another
    CPU. For `CONVERTED` engines this is always the converted file, whether or not the original is still there.
    """
    if engine in CONVERTED:
        return folder / engine / f"{name}.safetensors"
    original = folder / engine / f"{name}.onnx"
    kinds: dict[Kind, bool] = {"int8": int8, "fp32": cpu, "dynamic": True}
    return next((variant(original, kind) for kind, wanted in kinds.items() if wanted and is_current(original, kind)), original)


def accept_licence(folder: Path, weights: Weights) -> None:
    """Record that the operator has accepted the licence of a model that may not be used commercially. Raises OSError."""
    write_json(_licence_path(folder, weights), {"licence": weights.licence})


def is_licensed(folder: Path, weights: Weights) -> bool:
    """Whether the operator has accepted the model's present licence, or doesn't have to."""
    return weights.commercial or read_json(_licence_path(folder, weights)).get("licence") == weights.licence


def variant(original: Path, kind: Kind) -> Path:
    """Where a variant of a published file belongs: `u2net.int8.onnx`, `lama.safetensors`."""
    if kind == "safetensors":
        return original.with_suffix(".safetensors")
    return original.with_suffix(f".{kind}{original.suffix}")


def is_current(original: Path, kind: Kind) -> bool:
    """Whether the variant exists, was accepted, was made from the present original, and gives right results on this CPU."""
    record = variant_record(original, kind)
    if record.get("accepted") is not True or (record.get("needs_vnni") and not has_vnni()):
        return False
    return variant(original, kind).is_file() and record.get("original") == digest(original)


def perhaps_half(folder: Path) -> list[str]:
    """The catalogue's ONNX models whose files are half as large as published and were never looked at by pull.

    Such a file is in half precision, most likely, and somebody has put it there. Telling for sure takes a library that nodes
    do without.
    """
    found = []
    for weights in (weights for weights in WEIGHTS if weights.engine not in CONVERTED):
        path = path_of(folder, weights)
        if path.is_file() and not variant_record(path, "fp32"):
            found += [weights.name] * (0.45 < path.stat().st_size / weights.about_bytes < 0.55)
    return found


def variant_record(original: Path, kind: Kind) -> dict[str, Any]:
    """The record of the last attempt to make a variant; empty if there was none."""
    return read_json(_record_path(original, kind))


def record_variant(original: Path, kind: Kind, *, accepted: bool, details: dict[str, Any]) -> None:
    """Record an attempt to make a variant: its outcome, the SHA-256 of both files, and `details`."""
    file = variant(original, kind)
    sums = {"original": digest(original) if original.is_file() else None, "sha256": digest(file) if accepted else None}
    write_json(_record_path(original, kind), {"accepted": accepted, **sums, **details})


def remove_variants(original: Path) -> None:
    """Delete all variants of a file, and their records."""
    for kind in KINDS:
        file = variant(original, kind)
        for path in (file, sums_path(file), _record_path(original, kind)):
            path.unlink(missing_ok=True)


def state(folder: Path, weights: Weights) -> State:
    """The state of a model's files, without reading them.

    `unchecked`: neither pull nor verify has read the file. `unconverted`: the file that nodes load is still to be made.
    """
    loadable = required_file(folder, weights).is_file()
    try:
        sums = remembered_sums(path_of(folder, weights))
    except OSError:
        return "unchecked" if loadable else "missing"  # converted from the operator's own file
    if not loadable:
        return "unconverted"
    if sums is None or sums.checksum.partition(":")[0] != weights.checksum.partition(":")[0]:
        return "unchecked"
    return "there" if sums.checksum == weights.checksum else "damaged"


def describe(folder: Path, weights: Weights) -> dict[str, Any]:
    """A model's catalogue entry with its kind, state, path, size in bytes and current variants, and no family."""
    original, path = path_of(folder, weights), required_file(folder, weights)
    also = [kind for kind in KINDS if original.is_file() and is_current(original, kind)]
    size = path.stat().st_size if path.is_file() else None
    row = {**asdict(weights), "url": weights.url, "kind": weights.kind, "family": ""}
    return {**row, "state": state(folder, weights), "path": str(path), "bytes": size, "also": also}


def verify(folder: Path, weights: Weights) -> Iterator[tuple[bool, str]]:
    """Read a model's file and its variants; yield for each whether it is correct, and a sentence. Raises OSError."""
    path, fix = path_of(folder, weights), f"imagemill models pull {weights.name}"
    if state(folder, weights) == "missing":
        yield False, f"{weights.name} is missing: {fix}"
        return
    original = None
    if path.is_file():
        sums = hash_file(path, weights.checksum)
        original = sums.sha256
        if sums.checksum == weights.checksum:
            yield True, f"{weights.name}: correct ({sums.checksum}, sha256:{sums.sha256})"
        else:
            yield False, f"{path} is not the published file: its checksum is {sums.checksum}, not {weights.checksum}: {fix}"
    yield from verify_variants(path, original)


def verify_variants(path: Path, original: str | None) -> Iterator[tuple[bool, str]]:
    """Read the variants of a file whose SHA-256 is `original`; yield for each whether it is correct, and a sentence."""
    for kind in KINDS:
        file, record = variant(path, kind), variant_record(path, kind)
        if file == path or not file.is_file():
            continue
        sha256 = hash_file(file).sha256
        if not record and original is None:
            yield True, f"{file.name}: not made by imagemill, nothing to compare it with (sha256:{sha256})"
        elif record.get("original") != original:
            yield False, f"{file} was made from another {path.name} and is not used: delete it"
        elif record.get("sha256") != sha256:
            yield False, f"{file} has changed since it was made: delete it and make it again"
        else:
            yield True, f"{file.name}: correct (sha256:{sha256})"


def remove(folder: Path, weights: Weights) -> int | None:
    """Delete a model's file and everything made from it; return the number of bytes freed, or None if it was not there."""
    original, freed = path_of(folder, weights), None
    for path in {original, required_file(folder, weights)}:
        if path.is_file():
            freed = (freed or 0) + path.stat().st_size
    remove_variants(original)
    for path in (original, sums_path(original), original.with_name(f"{original.name}.part"), _licence_path(folder, weights)):
        path.unlink(missing_ok=True)
    return freed


def _licence_path(folder: Path, weights: Weights) -> Path:
    return path_of(folder, weights).with_suffix(".licence.json")


def _record_path(original: Path, kind: Kind) -> Path:
    return original.with_name(f"{variant(original, kind).name}.made.json")
