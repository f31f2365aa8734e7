"""The one model that an engine keeps open, and where its file is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

from imagemill.shared.errors import ConfigurationError, OperationFailed

Key = TypeVar("Key", bound=Hashable)
Model = TypeVar("Model")


class OpenModel(Generic[Key, Model]):
    """Keeps one model open; a job that needs another one, or another version of its file, replaces it. For one thread."""

    def __init__(self) -> None:
        self.current: Model | None = None
        self._key: Key | None = None
        self._proven = False

    def get(self, locate: Callable[[], Key], load: Callable[[Key], Model]) -> Model:
        """The model that `locate` names, opened by `load` unless it is open already.

        The first model proves that the node is set up correctly: until one has been opened, a ConfigurationError of either
        is passed on and stops the node. Later it only fails the image, as OperationFailed.
        """
        try:
            key = locate()
            if self.current is None or key != self._key:
                self.current = None  # before the next one is loaded: memory may not hold two
                self.current, self._key = load(key), key
        except ConfigurationError as error:
            if not self._proven:
                raise
            raise OperationFailed(error.message) from error
        self._proven = True
        return self.current


def missing_model(model: str, folder: Path) -> ConfigurationError:
    """The error for a model that has not been downloaded."""
    return ConfigurationError(f"model {model} is not in {folder}: run `imagemill models pull {model}`")
