"""The one model that an engine keeps open."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

from imagemill.shared.errors import ConfigurationError, ModelUnavailable, OperationFailed, sentence
from imagemill.worker.models.added import TAKEN

Key = TypeVar("Key", bound=Hashable)
Model = TypeVar("Model")


class OpenModel(Generic[Key, Model]):
    """Keeps one model open, until a job needs another model or the file has changed. For use in one thread."""

    def __init__(self) -> None:
        self.current: Model | None = None
        self._key: Key | None = None
        self._proven = False

    def get(self, locate: Callable[[], Key], load: Callable[[Key], Model]) -> Model:
        """The model that `locate` identifies, opened with `load` unless it is open already.

        Until a first model has been opened, errors of either function are passed on and stop the node, since the node itself
        may be set up wrongly. Later they only fail the image, as ModelUnavailable, or as OutOfMemory if the model is too large.
        """
        try:
            key = locate()
            if self.current is None or key != self._key:
                self.current = None  # freed first, since memory may not hold two models
                self.current, self._key = load(key), key
        except (ConfigurationError, OperationFailed, OSError) as error:
            if not self._proven:
                raise
            reason = f"the model can't be read: {sentence(error)}" if isinstance(error, OSError) else error.message
            raise ModelUnavailable(reason) from error
        self._proven = True
        return self.current


def missing_model(model: str, folder: Path) -> ConfigurationError:
    """The error for a model that has been neither downloaded nor added."""
    return ConfigurationError(f"model {model} is not in {folder}: run {getting(model)}")


def getting(*models: str) -> str:
    """The commands that bring models onto this host."""
    pulled = [model for model in models if model in TAKEN]
    commands = [f"`imagemill models add {model} SOURCE`" for model in models if model not in TAKEN]
    return " and ".join(commands + [f"`imagemill models pull {' '.join(pulled)}`"] * bool(pulled))
