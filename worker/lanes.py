"""What a node can offer: its engines, and of those that run models, the models whose files are there."""

from __future__ import annotations

from shared.settings import Settings
from worker.weights import WEIGHTS, path_of


def lanes(settings: Settings) -> list[str]:
    """The lanes (see shared.queues) of the engines in `settings` that can work here."""
    found = []
    for engine in settings.worker.engines:
        models = [weights for weights in WEIGHTS if weights.engine == engine]
        if not models:
            found.append(engine)
        found += [f"{engine}.{weights.name}" for weights in models if path_of(weights, settings.weights).is_file()]
    return found


def without_models(settings: Settings) -> list[str]:
    """The engines in `settings` that run models and have none here: the node does not listen to their queues."""
    offered = lanes(settings)
    return [engine for engine in settings.worker.engines if not any(lane.partition(".")[0] == engine for lane in offered)]
