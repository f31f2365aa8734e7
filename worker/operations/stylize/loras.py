"""LoRA adapters of one model: loaded on demand, with the least recently used dropped above a limit."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from safetensors import safe_open

from imagemill.shared.errors import ModelUnavailable, OutOfMemory, sentence
from imagemill.shared.options.stylize import Lora
from imagemill.worker.hardware.errors import is_out_of_memory
from imagemill.worker.models.repositories import lora_file
from imagemill.worker.operations.open_model import getting
from imagemill.worker.operations.stylize.loading import LoadPart

Stamp = tuple[str, int, int]
"""Path, size and modification time in nanoseconds, which identify a version of a file."""


class Loras:
    """The adapters of `pipe`, at most `limit` loaded unless one style needs more. For one thread.

    Each loaded adapter takes memory and slows `set_adapters` down; loading a dropped one again is fast. `load_part` makes room
    for one, and `changed` is called when the file of a loaded adapter has changed.
    """

    def __init__(self, pipe: Any, weights: Path, limit: int, load_part: LoadPart, changed: Callable[[], None]) -> None:
        self._pipe, self._weights, self._limit = pipe, weights, limit
        self._load_part, self._changed = load_part, changed
        self._loaded: OrderedDict[str, Stamp] = OrderedDict()
        self._active: tuple[Lora, ...] | None = ()

    @property
    def loaded(self) -> list[str]:
        """Names of the adapters in memory, least recently used first."""
        return list(self._loaded)

    def use(self, style: Sequence[Lora]) -> None:
        """Activate exactly these adapters. Raises ModelUnavailable if one is missing, damaged, or doesn't fit the model."""
        stamps = {lora.name: _version(self._weights, lora.name) for lora in style}
        stale = [name for name, current in stamps.items() if self._loaded.get(name, current) != current]
        if tuple(style) == self._active and not stale:
            return
        self._active = None  # unknown if one of the following steps fails
        self._drop(stale)
        if stale:
            self._changed()
        missing = [name for name in stamps if name not in self._loaded]
        idle = [name for name in self._loaded if name not in stamps]
        self._drop(idle[: max(0, len(self._loaded) + len(missing) - self._limit)])
        for name in missing:
            self._load_part(name, stamps[name][1], partial(self._load, name, stamps[name]))
        if style:
            self._pipe.enable_lora()
            self._pipe.set_adapters([lora.name for lora in style], [lora.weight for lora in style])
        elif self._loaded:
            self._pipe.disable_lora()
        for name in stamps:
            self._loaded.move_to_end(name)
        self._active = tuple(style)

    def _load(self, name: str, version: Stamp) -> None:
        path, sound = Path(version[0]), False
        try:
            _check(path)
            sound = True
            self._pipe.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=name, local_files_only=True, use_safetensors=True
            )
        except Exception as error:  # the file may contain anything
            with warnings.catch_warnings():  # peft says which adapter is active now, which `use` sets anyway
                warnings.simplefilter("ignore")
                self._drop([name])
            if isinstance(error, SoftTimeLimitExceeded):
                raise
            if is_out_of_memory(error):
                raise OutOfMemory(f"the LoRA {name} does not fit into memory: {sentence(error)}") from error
            reason = f"the LoRA {name} can't be used from {path}: {sentence(error)}"
            raise ModelUnavailable.of_part(name, reason, misfit=sound) from error
        self._loaded[name] = version

    def _drop(self, names: Sequence[str]) -> None:
        known = {name for names_of_part in self._pipe.get_list_adapters().values() for name in names_of_part}
        for name in names:
            self._loaded.pop(name, None)
        if known.intersection(names):
            self._pipe.delete_adapters(sorted(known.intersection(names)))


def find(weights: Path, name: str) -> Path:
    """The path of an adapter's file. Raises ModelUnavailable, with the command that gets it, if it does not exist."""
    path = lora_file(weights, name)
    if not path.is_file():
        raise ModelUnavailable.of_part(name, f"the LoRA {name} is not on this node: run {getting(name)}")
    return path


def stamp(path: Path) -> Stamp:
    """The current version of a file."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


def _version(weights: Path, name: str) -> Stamp:
    try:
        return stamp(find(weights, name))
    except OSError as error:
        raise ModelUnavailable.of_part(name, f"the LoRA {name} can't be read: {sentence(error)}") from error


def _check(path: Path) -> None:
    """Raise an error if a file is damaged, whatever model it is for."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            if not file.get_tensor(name).float().isfinite().all():
                raise ValueError(f"it has values that are not finite numbers, in {name}")
