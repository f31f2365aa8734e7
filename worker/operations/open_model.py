"""The models that an engine keeps open."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

from imagemill.shared.errors import ConfigurationError, ModelUnavailable, OperationFailed, OutOfMemory, sentence
from imagemill.worker.hardware.device import give_back
from imagemill.worker.hardware.errors import DeviceUnusable
from imagemill.worker.hardware.memory import give_up_caches
from imagemill.worker.hardware.model_memory import ModelMemory
from imagemill.worker.models.added import TAKEN

Name = TypeVar("Name", bound=Hashable)
Version = TypeVar("Version", bound=Hashable)
Model = TypeVar("Model")
Part = TypeVar("Part")


class OpenModel(Generic[Name, Version, Model]):
    """Keeps an engine's models open, as many as the child's `memory` for models allows. For use in one thread.

    `size` tells, by name, how many bytes a model takes that is not open yet. An open model may know better, and says so as
    `bytes`; it may also load parts later, with `load_part`.
    """

    def __init__(self, size: Callable[[Name], int]) -> None:
        self.memory = ModelMemory()
        self.current: Model | None = None
        """The one that was used last."""
        self._size = size
        self._key: Hashable = None  # of the model in use, in the memory
        self._open: dict[Name, tuple[Version, Model]] = {}

    def get(self, locate: Callable[[], tuple[Name, Version]], load: Callable[[tuple[Name, Version]], Model]) -> Model:
        """The model whose name and version `locate` returns, opened with `load` unless it is open already.

        Another version of the same model is closed. Raises ModelUnavailable if the model can't be opened for any reason, and
        DeviceUnusable if no model could.
        """
        self.current = None
        try:
            name, version = locate()
            self._key = key = id(self), name
            if name in self._open and self._open[name][0] != version:
                self.memory.close(key)
            if name not in self._open:
                self._make_room_and_load((name, version), load)
        except DeviceUnusable:
            raise
        except (ConfigurationError, OperationFailed, OSError) as error:
            reason = f"the model can't be read: {sentence(error)}" if isinstance(error, OSError) else error.message
            raise ModelUnavailable(reason) from error
        self.memory.used(key)
        _, self.current = self._open[name]
        return self.current

    def load_part(self, part: str, size: int, load: Callable[[], Part]) -> Part:
        """Load a part of so many bytes for the model in use, for which others are closed if need be.

        Raises ModelUnavailable if there is not enough memory for it even so.
        """
        self.measure()
        self.memory.make_room(size, self._key)
        loaded = _loaded(load)
        if isinstance(loaded, OutOfMemory) and self.memory.clear(self._key):
            loaded = _loaded(load)
        if isinstance(loaded, OutOfMemory):
            raise ModelUnavailable.of_part(part, loaded.message, misfit=True, passing=True)
        return loaded

    def measure(self) -> None:
        """The model in use may have become larger or smaller, as parts of it were loaded or dropped."""
        if self.current is not None and hasattr(self.current, "bytes"):
            self.memory.resized(self._key, self.current.bytes)

    def close(self) -> None:
        """Close all of them."""
        for name in list(self._open):
            self.memory.close((id(self), name))

    def _make_room_and_load(self, key: tuple[Name, Version], load: Callable[[tuple[Name, Version]], Model]) -> None:
        self.memory.make_room(self._size(key[0]))
        model = _loaded(lambda: load(key))
        if isinstance(model, OutOfMemory) and self.memory.clear():
            model = _loaded(lambda: load(key))
        if isinstance(model, OutOfMemory):
            unavailable = ModelUnavailable(model.message)
            unavailable.passing = True
            raise unavailable
        self._open[key[0]] = key[1], model
        self.memory.opened((id(self), key[0]), getattr(model, "bytes", self._size(key[0])), lambda: self._drop(key[0]))

    def _drop(self, name: Name) -> None:
        _, model = self._open.pop(name)
        if model is self.current:
            self.current = None
        del model
        give_up_caches(frozen=True)
        give_back()


def _loaded(load: Callable[[], Part]) -> Part | OutOfMemory:
    """What was loaded, or the error without the frames that hold some of it."""
    try:
        return load()
    except OutOfMemory as error:
        error.__cause__ = error.__context__ = None
        failure = error.with_traceback(None)
    give_up_caches()
    return failure


def file_size(path: Path) -> int:
    """Bytes of a model's file."""
    return path.stat().st_size


def missing_model(model: str, folder: Path) -> ConfigurationError:
    """The error for a model that has been neither downloaded nor added."""
    return ConfigurationError(f"model {model} is not in {folder}: run {getting(model)}")


def getting(*models: str) -> str:
    """The commands that bring models onto this host."""
    pulled = [model for model in models if model in TAKEN]
    commands = [f"`imagemill models add {model} SOURCE`" for model in models if model not in TAKEN]
    return " and ".join(commands + [f"`imagemill models pull {' '.join(pulled)}`"] * bool(pulled))
