"""What a node can offer: its engines, and of engines with models those models whose files are on this host.

Models are in the catalogue, or the operator has added them.
"""

from __future__ import annotations

from imagemill.shared.engines import ENGINES, Engine, lane_of, split_lane
from imagemill.shared.options.base import nearest
from imagemill.shared.settings import Settings
from imagemill.worker.models import added, repositories
from imagemill.worker.models.catalogue import REPOSITORIES
from imagemill.worker.models.repositories import models_here, parts_here, parts_of, places_of
from imagemill.worker.models.stamps import Stamp, stamp, stamp_at


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


def parts(settings: Settings) -> dict[str, Stamp]:
    """The LoRAs, ControlNets and VAEs on this host, which jobs can name beside a model, with their files as they are now."""
    if "diffusion" not in settings.worker.engines:
        return {}
    weights = settings.weights.folder.expanduser()
    return {name: stamp_at(*places_of(weights, name)) for name in parts_here(weights)}


def missing(settings: Settings) -> dict[str, list[str]]:
    """The catalogue's models that are not on this host, by engine; an engine that has all of its models is left out."""
    here = {engine: present(settings, engine) for engine in settings.worker.engines}
    absent = {engine: [model for model in models_of(engine) if model not in models] for engine, models in here.items()}
    return {engine: models for engine, models in absent.items() if models}


def files_of(settings: Settings, lane: str) -> Stamp:
    """The files of a lane's model as they are now; nothing for an engine without models."""
    _, engine, model = split_lane(lane)
    if not model:
        return ()
    weights = settings.weights.folder.expanduser()
    files = [file for part in parts_of(model) for file in stamp(weights / engine, part)]
    return (*files, *stamp(weights / "added", model))


def children_per_gpu(settings: Settings) -> int:
    """How many child processes share a GPU: as set, or as many as suit all engines whose models are here.

    If there are none yet, as many as suit all that it waits for. More models may come later; the children stay as many.
    """
    here = {(operation, engine) for operation, engine, model in map(split_lane, lanes(settings)) if model}
    possible = [row for row in _possible(settings) if row.models]
    suitable = [row.children for row in possible if not here or (row.operation, row.name) in here]
    return settings.worker.children_per_gpu or min(suitable, default=1)


def shortcomings(settings: Settings) -> list[tuple[str, str]]:
    """The engines that this node was set up for and can't offer at all: for each, why and how to fix it."""
    found = []
    names = sorted({row.name for row in ENGINES})
    for engine in settings.worker.engines:
        models = models_of(engine)
        if engine not in names:
            found.append((f"unknown engine {engine!r}{nearest(engine, names)}", "set IMAGEMILL_WORKER__ENGINES"))
        elif not any(row.name == engine for row in _possible(settings)):
            operations = ", ".join(settings.worker.operations)
            found.append((f"the engine {engine} can do none of: {operations}", "set IMAGEMILL_WORKER__OPERATIONS"))
        elif models and not present(settings, engine):
            folder = settings.weights.folder.expanduser() / engine
            found.append((f"no model of the engine {engine} is in {folder}", f"imagemill models pull {models[0]}"))
    return found


def incomplete(settings: Settings) -> list[tuple[str, str]]:
    """The models of this node's engines that were here and are not any more as they were: for each, why and how to fix it.

    Where the reason says how to fix it, the latter is empty.
    """
    weights = settings.weights.folder.expanduser()
    records, faults = added.everything(weights)
    found = [(fault, "") for fault in faults]
    for entry in REPOSITORIES:
        recorded = repositories.folder_of(weights, entry) / repositories.RECORD
        if entry.engine in settings.worker.engines and recorded.is_file() and repositories.state(weights, entry) == "missing":
            why = f"files of {entry.name} are missing or damaged since it was pulled"
            found.append((why, f"imagemill models pull {entry.name}"))
    for record in records:
        if record.engine in settings.worker.engines and not record.is_here(weights):
            why = f"files of {record.name} are missing or have changed since it was added"
            found.append((why, f"imagemill models add {record.name} SOURCE --replace"))
    return found


def nothing_to_do(settings: Settings) -> str | None:
    """Why a node with these settings could never work in any lane; None if it can, now or once its models are there."""
    if _possible(settings):
        return None
    return "; ".join(["this node can't do any work", *(f"{why}: {fix}" for why, fix in shortcomings(settings))])


def _possible(settings: Settings) -> list[Engine]:
    """The engines of this node's operations, whether their models are here or not."""
    return [row for name in settings.worker.engines for row in _rows(name) if row.operation in settings.worker.operations]


def _rows(engine: str) -> list[Engine]:
    return [row for row in ENGINES if row.name == engine]
