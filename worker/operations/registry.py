"""Every engine of every operation, in one explicit list; importing this imports none of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from shared.errors import ConfigurationError, MissingExtra
from shared.options import nearest

if TYPE_CHECKING:
    from worker.operations.base import Operation

ENGINES: dict[tuple[str, str], str] = {
    ("remove-background", "opencv"): "worker.operations.remove_background.opencv:GrabCut",
    ("remove-background", "rembg"): "worker.operations.remove_background.rembg:Rembg",
    ("inpaint", "opencv"): "worker.operations.inpaint.opencv:Inpaint",
    ("inpaint", "lama"): "worker.operations.inpaint.lama:Lama",
    ("stylize", "opencv"): "worker.operations.stylize.opencv:Stylize",
}
"""(operation, engine) to `module:Class`."""

EXTRAS = {"opencv": "worker", "rembg": "rembg", "lama": "lama"}
"""The extra that installs what an engine imports."""


def create(operation: str, engine: str) -> Operation:
    """A new operation, not yet loaded.

    Raises ConfigurationError where there is no such operation or engine, and MissingExtra with the
    install command where the engine's libraries are not installed.
    """
    try:
        place = ENGINES[operation, engine]
    except KeyError as error:
        pairs = [f"{name}/{kind}" for name, kind in ENGINES]
        raise ConfigurationError(f"there is no engine {operation}/{engine}{nearest(f'{operation}/{engine}', pairs)}") from error
    module, _, name = place.partition(":")
    try:
        made: Operation = getattr(importlib.import_module(module), name)()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("worker", "shared"):
            raise  # a fault of ours, not a missing library
        command = f"pip install 'imagemill[{EXTRAS[engine]}]'"
        raise MissingExtra(f"{operation}/{engine} needs {error.name}, which is not installed: {command}") from error
    return made
