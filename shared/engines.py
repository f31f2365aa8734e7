"""Every engine of every operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from imagemill.shared.errors import InvalidOption
from imagemill.shared.options.base import OPERATIONS, Operation, nearest, validation_sentence
from imagemill.shared.options.inpaint import LamaInpaint, OpencvInpaint
from imagemill.shared.options.remove_background import OpencvRemoveBackground, RembgRemoveBackground
from imagemill.shared.options.stylize import DiffusionStylize, OpencvStylize

Options = OpencvRemoveBackground | RembgRemoveBackground | OpencvInpaint | LamaInpaint | OpencvStylize | DiffusionStylize

ENGINES: dict[Operation, dict[str, type[Options]]] = {
    "remove-background": {"opencv": OpencvRemoveBackground, "rembg": RembgRemoveBackground},
    "inpaint": {"opencv": OpencvInpaint, "lama": LamaInpaint},
    "stylize": {"opencv": OpencvStylize, "diffusion": DiffusionStylize},
}


def parse_options(operation: str, engine: str, given: Mapping[str, Any]) -> Options:
    """The options of a job from a mapping of names to values, which may be text.

    Raises InvalidOption with the nearest valid name for an operation, engine or option that
    does not exist, and with the range for a value outside it.
    """
    if operation not in OPERATIONS:
        raise InvalidOption(f"there is no operation {operation!r}{nearest(operation, list(OPERATIONS))}")
    engines = ENGINES[operation]
    if engine not in engines:
        raise InvalidOption(f"{operation} has no engine {engine!r}{nearest(engine, list(engines))}")
    model = engines[engine]
    names = [name for name in model.model_fields if name != "engine"]
    for name in given:
        if name not in names:
            raise InvalidOption(f"{operation} ({engine}) has no option {name!r}{nearest(name, names)}")
    values = {name: None if isinstance(value, str) and value.lower() == "none" else value for name, value in given.items()}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InvalidOption(validation_sentence(error)) from error
