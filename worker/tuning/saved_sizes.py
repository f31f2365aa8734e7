"""Batch sizes measured by `imagemill tune`: one file per device in the weights folder, from which nodes start.

{"version": 1, "device": "NVIDIA H200", "engines": {"stylize/diffusion": {KIND: {"peaks": {SIZE: BYTES}, ...}}}}
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from imagemill.shared.options.base import validation_sentence
from imagemill.worker.line.batch_sizes import ALL_KINDS, OWN, Known
from imagemill.worker.models.checksums import read_json, write_json
from imagemill.worker.operations.base import Spec

log = logging.getLogger(__name__)

VERSION = 1


def path_of(folder: Path, device: str) -> Path:
    """The file for a device, given its manufacturer's name, in the weights folder."""
    return folder / "tuned" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-') or 'device'}.json"


def read(folder: Path, device: str, spec: Spec) -> dict[str, Known]:
    """The sizes known for each kind of sample of an engine; empty if none were saved, or by another version."""
    path = path_of(folder, device)
    try:
        return ALL_KINDS.validate_python(_engines(path).get(f"{spec.name}/{spec.engine}", {}))
    except ValidationError as error:
        fields = dict(action="load", path=str(path), reason=validation_sentence(error))
        log.warning("saved batch sizes ignored", extra=fields)
        return {}


def write(folder: Path, device: str, spec: Spec, sizes: dict[str, Known]) -> Path:
    """Add sizes to the device's file, replacing those of the same kinds. Raises OSError."""
    path = path_of(folder, device)
    merged = {**read(folder, device, spec), **sizes}
    saved = ALL_KINDS.dump_python(merged, mode="json", exclude={"__all__": OWN})
    engines = {**_engines(path), f"{spec.name}/{spec.engine}": saved}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"version": VERSION, "device": device, "engines": engines})
    return path


def _engines(path: Path) -> dict[str, Any]:
    content = read_json(path)
    engines = content.get("engines")
    return engines if content.get("version") == VERSION and isinstance(engines, dict) else {}
