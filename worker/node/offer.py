"""What a node can offer: its engines, and of those that run models, the models whose files are there."""

from __future__ import annotations

from imagemill.shared.engines import ENGINES
from imagemill.shared.options.base import nearest
from imagemill.shared.queues import worker_queues
from imagemill.shared.settings import Settings
from imagemill.worker.models.catalogue import MODELS, WEIGHTS
from imagemill.worker.models.files import required_file
from imagemill.worker.models.repositories import is_here


def lanes(settings: Settings) -> list[str]:
    """The lanes (see imagemill.shared.queues) of the engines in `settings` that can work here."""
    found = []
    for engine in settings.worker.engines:
        models = models_of(engine)
        if not models:
            found.append(engine)
        found += [f"{engine}.{model}" for model in models if _is_here(engine, model, settings)]
    return found


def models_of(engine: str) -> list[str]:
    """The models that an engine's options can select; none for an engine that runs no models."""
    if engine == "diffusion":
        return list(MODELS)
    return [weights.name for weights in WEIGHTS if weights.engine == engine and weights.commercial]


def _is_here(engine: str, model: str, settings: Settings) -> bool:
    if engine == "diffusion":
        return is_here(settings.weights.folder.expanduser(), model)
    (weights,) = (weights for weights in WEIGHTS if (weights.engine, weights.name) == (engine, model))
    return required_file(weights, settings.weights).is_file()


def missing(settings: Settings) -> dict[str, list[str]]:
    """Per engine in `settings` the models whose files are not here; engines that lack none are left out."""
    names = {
        engine: [model for model in models_of(engine) if not _is_here(engine, model, settings)]
        for engine in settings.worker.engines
    }
    return {engine: absent for engine, absent in names.items() if absent}


def without_models(settings: Settings) -> list[str]:
    """The engines in `settings` that run models and have none here: the node does not listen to their queues."""
    return [engine for engine, absent in missing(settings).items() if len(absent) == len(models_of(engine))]


def shortcomings(settings: Settings) -> list[tuple[str, str]]:
    """The engines in `settings` that are not offered at all: for each of them why, and how to mend it."""
    said = []
    known = {engine for engines in ENGINES.values() for engine in engines}
    for engine in settings.worker.engines:
        if engine not in known:
            said.append((f"there is no engine {engine!r}{nearest(engine, sorted(known))}", "set IMAGEMILL_WORKER__ENGINES"))
        elif engine in without_models(settings):
            folder, first = settings.weights.folder.expanduser() / engine, models_of(engine)[0]
            said.append((f"no model of the engine {engine} is in {folder}", f"imagemill models pull {first}"))
        elif not any(engine in ENGINES[operation] for operation in settings.worker.operations):
            wanted = ", ".join(settings.worker.operations)
            said.append((f"the engine {engine} does none of the operations {wanted}", "set IMAGEMILL_WORKER__OPERATIONS"))
    return said


def nothing_to_do(settings: Settings) -> str | None:
    """Why a node with these settings would listen to no queue; None where it listens to one."""
    if worker_queues(settings.worker.operations, lanes(settings)):
        return None
    return "; ".join(["this node has nothing to listen to", *(f"{why}: {mend}" for why, mend in shortcomings(settings))])
