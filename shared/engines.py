"""All engines, one row per operation and engine.

A new engine needs a row here and a module in worker/operations/; CONTRIBUTING.md explains how. Importing this module
imports no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from imagemill.shared.diffusion_models import BASES
from imagemill.shared.errors import InvalidOption
from imagemill.shared.options.base import OPERATIONS, EngineOptions, Operation, listed, nearest, validation_sentence
from imagemill.shared.options.inpaint import LamaInpaint, OpencvInpaint
from imagemill.shared.options.remove_background import (
    GARMENT_MODELS,
    PROMPTED_MODELS,
    OpencvRemoveBackground,
    RembgRemoveBackground,
)
from imagemill.shared.options.stylize import DiffusionStylize, OpencvStylize


@dataclass(frozen=True)
class Engine:
    """One engine of one operation.

    `module` locates its class (`package.module:Class`), and the package extra `extra` installs that module's dependencies.
    `models` maps each model in the catalogue to its files there; jobs can also name models that the operator has added
    (worker/models/added.py). `lasting_notes` are the notes that an image gets on every run: a result with any other note may
    be due to temporary circumstances, such as a missed deadline, and is never reused. `children` is how many child processes
    share a GPU by default: two if the engine is too fast on a GPU for one Python process to feed.
    """

    operation: Operation
    name: str
    options: type[EngineOptions]
    module: str
    extra: str
    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lasting_notes: frozenset[str] = frozenset()
    children: int = 1

    @property
    def lanes(self) -> tuple[str, ...]:
        """Its lanes: `inpaint.opencv`, or one for each model of the catalogue, such as `remove-background.rembg.u2net`."""
        return tuple(lane_of(self.operation, self.name, model) for model in self.models) or (
            lane_of(self.operation, self.name),
        )

    def choices(self, option: str) -> tuple[str, ...]:
        """The values that an option can take, if they are listed; for `model`, those in the catalogue."""
        return tuple(self.models) if option == "model" else listed(self.options.model_fields[option])


def lane_of(operation: str, engine: str, model: str | None = None) -> str:
    """The lane of an operation, engine and model: what a node must offer to work on a job."""
    return ".".join(part for part in (operation, engine, model) if part)


def split_lane(lane: str) -> tuple[str, str, str]:
    """A lane's operation, engine and model; the model is empty for an engine without models."""
    operation, engine, model = f"{lane}..".split(".", 2)
    return operation, engine, model.rstrip(".")


_OPERATIONS = "imagemill.worker.operations"
_HOLE_NOTES = frozenset(
    {"empty_mask", "large_mask"} | {f"mask_read_as:{how}" for how in ("alpha", "colour", "inverted", "levels")}
)

REMBG_MODELS = (
    "u2net",
    "u2netp",
    "u2net_human_seg",
    "silueta",
    "isnet-general-use",
    "isnet-anime",
    "birefnet-general",
    "birefnet-general-lite",
    "birefnet-portrait",
    "birefnet-dis",
    "birefnet-hrsod",
    "birefnet-cod",
    "birefnet-massive",
    "ben2",
    *GARMENT_MODELS,
    *PROMPTED_MODELS,
)
"""rembg's models that may be used commercially, by rembg's names, and BEN2."""

ENGINES: list[Engine] = [
    Engine(
        "remove-background",
        "opencv",
        OpencvRemoveBackground,
        f"{_OPERATIONS}.remove_background.opencv:GrabCut",
        "worker",
        lasting_notes=frozenset({"empty_cutout"}),
    ),
    Engine(
        "remove-background",
        "rembg",
        RembgRemoveBackground,
        f"{_OPERATIONS}.remove_background.rembg:Rembg",
        "rembg",
        {model: (f"{model}.encoder", f"{model}.decoder") if model in PROMPTED_MODELS else (model,) for model in REMBG_MODELS},
        frozenset({"empty_cutout", "enlarged", "matting_too_large", "no_shadow_found"}),
        children=2,
    ),
    Engine("inpaint", "opencv", OpencvInpaint, f"{_OPERATIONS}.inpaint.opencv:Inpaint", "worker", lasting_notes=_HOLE_NOTES),
    Engine(
        "inpaint",
        "lama",
        LamaInpaint,
        f"{_OPERATIONS}.inpaint.lama:Lama",
        "lama",
        {"lama": ("lama",)},
        _HOLE_NOTES,
        children=2,
    ),
    Engine("stylize", "opencv", OpencvStylize, f"{_OPERATIONS}.stylize.opencv:Stylize", "worker"),
    Engine(
        "stylize",
        "diffusion",
        DiffusionStylize,
        f"{_OPERATIONS}.stylize.diffusion:Diffusion",
        "diffusion",
        {name: base.parts for name, base in BASES.items()},
    ),
]


def engines_of(operation: str) -> dict[str, Engine]:
    """An operation's engines by name; empty for an unknown operation."""
    return {engine.name: engine for engine in ENGINES if engine.operation == operation}


def find_engine(operation: str, name: str) -> Engine:
    """The engine with this name. Raises InvalidOption with the nearest valid name if the operation or engine is unknown."""
    if operation not in OPERATIONS:
        raise InvalidOption(f"unknown operation {operation!r}{nearest(operation, list(OPERATIONS))}")
    engines = engines_of(operation)
    if name not in engines:
        raise InvalidOption(f"{operation} has no engine {name!r}{nearest(name, list(engines))}")
    return engines[name]


def _elsewhere(operation: str, option: str) -> str:
    """`; it is an option of stylize (diffusion)` if another engine has it, those of the same operation first; else nothing."""
    rows = [row for row in ENGINES if option != "engine" and option in row.options.model_fields]
    rows = [row for row in rows if row.operation == operation] or rows
    return f"; it is an option of {' and '.join(f'{row.operation} ({row.name})' for row in rows)}" if rows else ""


def parse_options(operation: str, engine: str, given: Mapping[str, Any]) -> EngineOptions:
    """A job's options from a mapping of names to values, which may be text.

    Raises InvalidOption with the nearest valid name for an unknown operation, engine or option, or with the valid range of a
    value.
    """
    model = find_engine(operation, engine).options
    names = [name for name in model.model_fields if name != "engine"]
    for name in given:
        if name not in names:
            hint = _elsewhere(operation, name) or nearest(name, names)
            raise InvalidOption(f"{operation} ({engine}) has no option {name!r}{hint}")
    values = {name: None if isinstance(value, str) and value.lower() == "none" else value for name, value in given.items()}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InvalidOption(validation_sentence(error)) from error
