"""Loads the engines that shared/engines.py lists."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from imagemill.shared.engines import ENGINES
from imagemill.shared.errors import ConfigurationError, MissingExtra, sentence
from imagemill.shared.options.base import nearest

if TYPE_CHECKING:
    from imagemill.worker.operations.base import AnyOperation


def create(operation: str, engine: str) -> AnyOperation:
    """A new engine, not yet loaded.

    Raises ConfigurationError if the operation or engine is unknown or its libraries are incompatible, and MissingExtra
    with the install command if they are not installed.
    """
    rows = {f"{row.operation}/{row.name}": row for row in ENGINES}
    name = f"{operation}/{engine}"
    if name not in rows:
        raise ConfigurationError(f"unknown engine {name}{nearest(name, list(rows))}")
    module, _, class_name = rows[name].module.partition(":")
    try:
        instance: AnyOperation = getattr(importlib.import_module(module), class_name)()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "imagemill":
            raise  # a bug in imagemill, not a missing library
        command = f"pip install 'imagemill[{rows[name].extra}]'"
        raise MissingExtra(f"{name} needs {error.name}, which is not installed: {command}") from error
    except (ImportError, RuntimeError) as error:  # incompatible libraries
        raise ConfigurationError(f"{name} can't be loaded: {sentence(error)}{_hint()}") from error
    return instance


def _hint() -> str:
    """How to fix the most common cause: a torchvision that does not match torch."""
    if importlib.util.find_spec("torchvision") is None:
        return ""
    return "; torchvision is installed; imagemill doesn't need it, and it must match torch: pip uninstall torchvision"
