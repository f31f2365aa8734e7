"""What a node can offer: its engines, and of engines with models those models whose files are on this host.

Models are in the catalogue, or the operator has added them.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.sharedctypes import RawArray

from imagemill.shared.engines import ENGINES, Engine, lane_of, split_lane
from imagemill.shared.options.base import nearest
from imagemill.shared.settings import Settings
from imagemill.worker.models.repositories import models_here


def lanes(settings: Settings) -> list[str]:
    """The lanes (see shared/engines.py) that this node can work on."""
    here = {engine: present(settings, engine) for engine in settings.worker.engines}
    return [
        lane_of(row.operation, engine, model)
        for engine, models in here.items()
        for row in _rows(engine)
        if row.operation in settings.worker.operations
        for model in (models if row.models else [None])
    ]


def models_of(engine: str) -> list[str]:
    """The models of the engine that are in the catalogue; empty for an engine without models."""
    return list(dict.fromkeys(model for row in _rows(engine) for model in row.models))


def present(settings: Settings, engine: str) -> list[str]:
    """The engine's models that are on this host, first those of the catalogue."""
    return models_here(settings.weights.folder.expanduser(), engine)


def missing(settings: Settings) -> dict[str, list[str]]:
    """The catalogue's models that are not on this host, by engine; an engine that has all of its models is left out."""
    here = {engine: present(settings, engine) for engine in settings.worker.engines}
    absent = {engine: [model for model in models_of(engine) if model not in models] for engine, models in here.items()}
    return {engine: models for engine, models in absent.items() if models}


def children_per_gpu(settings: Settings) -> int:
    """How many child processes share a GPU: as set, or as many as suit all engines with models that this node offers."""
    engines = {(operation, engine) for operation, engine, model in map(split_lane, lanes(settings)) if model}
    suitable = [row.children for row in ENGINES if (row.operation, row.name) in engines]
    return settings.worker.children_per_gpu or min(suitable, default=1)


def shortcomings(settings: Settings) -> list[tuple[str, str]]:
    """The engines that this node was set up for and can't offer at all: for each, why and how to fix it."""
    found = []
    names = sorted({row.name for row in ENGINES})
    for engine in settings.worker.engines:
        models = models_of(engine)
        if engine not in names:
            found.append((f"unknown engine {engine!r}{nearest(engine, names)}", "set IMAGEMILL_WORKER__ENGINES"))
        elif models and not present(settings, engine):
            folder = settings.weights.folder.expanduser() / engine
            found.append((f"no model of the engine {engine} is in {folder}", f"imagemill models pull {models[0]}"))
        elif not any(row.operation in settings.worker.operations for row in _rows(engine)):
            operations = ", ".join(settings.worker.operations)
            found.append((f"the engine {engine} can do none of: {operations}", "set IMAGEMILL_WORKER__OPERATIONS"))
    return found


def nothing_to_do(settings: Settings) -> str | None:
    """Why a node with these settings could work in no lane; None if it can."""
    if lanes(settings):
        return None
    return "; ".join(["this node can't do any work", *(f"{why}: {fix}" for why, fix in shortcomings(settings))])


class Lanes:
    """The lanes of a node, in memory that its processes share; create it before the fork.

    A lane whose model can't be opened goes out of service, for all children, until the node restarts.
    """

    def __init__(self, lanes: Sequence[str]) -> None:
        self._lanes = list(lanes)
        self._closed = RawArray("b", len(self._lanes))

    def open(self) -> list[str]:
        """The lanes in service."""
        return [lane for lane, closed in zip(self._lanes, self._closed, strict=True) if not closed]

    def closed(self) -> list[str]:
        """The lanes out of service."""
        return [lane for lane, closed in zip(self._lanes, self._closed, strict=True) if closed]

    def close(self, lane: str) -> None:
        """Take a lane out of service."""
        self._closed[self._lanes.index(lane)] = 1


def _rows(engine: str) -> list[Engine]:
    return [row for row in ENGINES if row.name == engine]
