"""What `imagemill tune` has found out, in a file per device beside the weights; nodes begin with it.

{"version": 1, "device": "NVIDIA H200", "engines": {"stylize/diffusion": {KIND: {"peaks": {SIZE: BYTES}, ...}}}}
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from imagemill.shared.options.base import validation_sentence
from imagemill.worker.line.batch_sizes import Known
from imagemill.worker.models.checksums import read_json, write_json
from imagemill.worker.operations.base import Spec

log = logging.getLogger(__name__)

VERSION = 1
PASSING = {"relief", "patience", "waited"}
"""What is true of a process only."""
KINDS: TypeAdapter[dict[str, Known]] = TypeAdapter(dict[str, Known])


def path_of(folder: Path, device: str) -> Path:
    """The file of a device, by its maker's name, below the weights' folder."""
    return folder / "tuned" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-') or 'device'}.json"


def read(folder: Path, device: str, spec: Spec) -> dict[str, Known]:
    """What is known of an engine's kinds of samples; nothing where the device was not tuned, or by another version."""
    path = path_of(folder, device)
    content = read_json(path)
    if content.get("version") != VERSION:
        return {}
    try:
        return KINDS.validate_python(_engines(content).get(_engine(spec), {}))
    except ValidationError as error:
        told = dict(action="load", path=str(path), reason=validation_sentence(error))
        log.warning("what was tuned can't be read", extra=told)
        return {}


def write(folder: Path, device: str, spec: Spec, found: dict[str, Known]) -> Path:
    """Add what was found to the device's file, in place of what was known of the same kinds. Raises OSError."""
    path, content = path_of(folder, device), read_json(path_of(folder, device))
    engines = _engines(content) if content.get("version") == VERSION else {}
    known = {**read(folder, device, spec), **found}
    engines[_engine(spec)] = KINDS.dump_python(known, mode="json", exclude={"__all__": PASSING})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"version": VERSION, "device": device, "engines": engines})
    return path


def _engines(content: dict[str, Any]) -> dict[str, Any]:
    found = content.get("engines")
    return found if isinstance(found, dict) else {}


def _engine(spec: Spec) -> str:
    return f"{spec.name}/{spec.engine}"
