"""Every engine of every operation, in one explicit list; importing this imports none of them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from imagemill.shared.errors import ConfigurationError, MissingExtra, sentence
from imagemill.shared.options.base import nearest

if TYPE_CHECKING:
    from imagemill.worker.operations.base import Operation

ENGINES: dict[tuple[str, str], str] = {
    ("remove-background", "opencv"): "imagemill.worker.operations.remove_background.opencv:GrabCut",
    ("remove-background", "rembg"): "imagemill.worker.operations.remove_background.rembg:Rembg",
    ("inpaint", "opencv"): "imagemill.worker.operations.inpaint.opencv:Inpaint",
    ("inpaint", "lama"): "imagemill.worker.operations.inpaint.lama:Lama",
    ("stylize", "opencv"): "imagemill.worker.operations.stylize.opencv:Stylize",
    ("stylize", "diffusion"): "imagemill.worker.operations.stylize.diffusion:Diffusion",
}
"""(operation, engine) to `module:Class`."""

EXTRAS = {"opencv": "worker", "rembg": "rembg", "lama": "lama", "diffusion": "diffusion"}
"""The extra that installs what an engine imports."""


def create(operation: str, engine: str) -> Operation:
    """A new operation, not yet loaded.

    Raises ConfigurationError where there is no such operation or engine, or its libraries don't fit each other, and
    MissingExtra with the install command where they are not installed.
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
        if (error.name or "").split(".")[0] == "imagemill":
            raise  # a fault of ours, not a missing library
        command = f"pip install 'imagemill[{EXTRAS[engine]}]'"
        raise MissingExtra(f"{operation}/{engine} needs {error.name}, which is not installed: {command}") from error
    except (ImportError, RuntimeError) as error:  # libraries that don't fit each other
        raise ConfigurationError(f"{operation}/{engine} can't be loaded: {sentence(error)}{_hint()}") from error
    return made


def _hint() -> str:
    """What is most often behind a library of a neural engine that can't be imported."""
    if importlib.util.find_spec("torchvision") is None:
        return ""
    return "; torchvision is installed, which nothing here needs and which must fit torch: pip uninstall torchvision"
