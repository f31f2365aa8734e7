"""Presets for `imagemill submit --preset NAME`: those that ship (presets.yaml) and those in the operator's own file.

    product-dark:
      extends: product-clean          # another preset; the shipped one if it has the same name
      description: ...
      operation: stylize              # operation and engine decide which options are valid
      engine: diffusion
      options: {prompt: ..., steps: 30, loras: {my-style: 0.8}}
      output: {format: png}           # as in imagemill.shared.messages.Output, without its URL
      policy: {priority: low}         # as in imagemill.shared.messages.Policy

A preset inherits each value that it does not set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from imagemill.shared.engines import find_engine, parse_options
from imagemill.shared.errors import InvalidOption, InvalidPreset, UsageError
from imagemill.shared.messages import Output, Policy
from imagemill.shared.options.base import ADDRESSES, OPERATIONS, Model, Operation, nearest, validation_sentence
from imagemill.shared.preset_files import Written, load
from imagemill.shared.urls import check_source_url, shown

SHIPPED = Path(__file__).with_name("presets.yaml")
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


class Preset(Model):
    """A preset with everything it inherits. `options`, `output` and `policy` hold only the values it sets, no defaults."""

    name: str
    file: Path
    extends: str | None = None
    description: str = ""
    operation: Operation
    engine: str
    options: dict[str, Any] = Field(default_factory=dict)
    output: dict[str, Any] = Field(default_factory=dict)
    policy: dict[str, Any] = Field(default_factory=dict)

    def resolved(self) -> dict[str, Any]:
        """The whole preset, including options left at their defaults."""
        options = parse_options(self.operation, self.engine, self.options).model_dump(mode="json", exclude={"engine"})
        return {**self.model_dump(exclude={"name", "file", "extends"}), "options": options}


def work_of(operation: str | None, engine: str | None, preset: Preset | None) -> tuple[str, str]:
    """Operation and engine, as given or from the preset; the engine defaults to opencv.

    Raises UsageError without an operation, and InvalidOption when the preset is for a different operation or engine.
    """
    if preset is None:
        if operation is None:
            raise UsageError(f"name an operation ({', '.join(OPERATIONS)}) with --operation, or use --preset NAME")
        return operation, engine or "opencv"
    for name, value, required in (("operation", operation, preset.operation), ("engine", engine, preset.engine)):
        if value is not None and value != required:
            raise InvalidOption(f"the preset {preset.name} is for the {name} {required}, not {value!r}")
    return preset.operation, preset.engine


class Presets:
    """The shipped presets and those in the file `own`, which override shipped ones of the same name.

    The constructor raises InvalidPreset if a file can't be read or is not a file of presets.
    """

    def __init__(self, own: Path | None = None) -> None:
        self._shipped = read(SHIPPED)
        self._known = {**self._shipped, **(read(own.expanduser()) if own is not None else {})}

    def names(self) -> list[str]:
        """All names, shipped ones first."""
        return list(self._known)

    def get(self, name: str) -> Preset:
        """The preset `name`. Raises UsageError if it does not exist, and InvalidPreset, with file and line, if it is wrong."""
        if name not in self._known:
            raise UsageError(f"unknown preset {name!r}{nearest(name, self.names())}")
        return _validated(name, self._known[name].file, self._inherited(name, self._known))

    def faults(self) -> Iterator[InvalidPreset]:
        """The first error of each preset that has one."""
        for name in self.names():
            try:
                self.get(name)
            except InvalidPreset as error:
                yield error

    def _inherited(self, name: str, known: Mapping[str, Written], above: tuple[Written, ...] = ()) -> Written:
        """A preset's values and those it inherits; `above` are the presets that extend it."""
        preset = known[name]
        base = preset.get("extends")
        if base is None:
            return preset
        if preset is self._shipped.get(name) or (base == name and name in self._shipped):
            known = self._shipped  # what ships extends what ships, and so does a preset that extends its own name
        if not isinstance(base, str) or base not in known:
            raise preset.wrong(["extends"], f"extends an unknown preset, {base!r}{nearest(str(base), list(known))}")
        above = (*above, preset)
        if any(known[base] is extending for extending in above):
            raise preset.wrong(["extends"], f"presets extend each other in a circle: {name} extends {base}")
        inherited = self._inherited(base, known, above)
        for key in ("operation", "engine"):
            if key in preset and key in inherited and preset[key] != inherited[key]:
                raise preset.wrong([key], f"extends {base}, which is for the {key} {inherited[key]}, not {preset[key]!r}")
        return inherited.overridden(preset)


def _validated(name: str, file: Path, values: Written) -> Preset:
    path: tuple[str, ...] = ()
    fields: dict[str, Any] = {}
    try:
        preset = Preset.model_validate({**values, "name": name, "file": file})
        options = find_engine(preset.operation, preset.engine).options
        models: dict[str, type[Model]] = {"options": options, "output": Output, "policy": Policy}
        for section, model in models.items():
            path = (section,)
            fields = getattr(preset, section)
            _check_names(section, fields, model, values)
            model.model_validate({**fields, **({"url": "file:///"} if section == "output" else {})})
    except InvalidOption as error:
        raise values.wrong(["engine"], error.message) from error
    except ValidationError as error:
        # A rule that several values break together names none of them: the error is at the last one.
        where = error.errors()[0]["loc"] or list(fields)[-1:]
        raise values.wrong([*path, *where], ": ".join([*path, validation_sentence(error)])) from error
    return preset


def _check_names(section: str, fields: Mapping[str, Any], model: type[Model], values: Written) -> None:
    names = sorted(set(model.model_fields) - {"engine", "url"})
    for name, value in fields.items():
        if name not in names:
            raise values.wrong([section, name], f"{section} has no {name!r}{nearest(name, names)}")
        if name in ADDRESSES and isinstance(value, str) and "://" in value:
            try:  # a path is checked when a job is submitted, from the folder that is then current
                check_source_url(value)
            except ValueError as error:
                raise values.wrong([section, name], f"{name}: {error}, not {shown(value)!r}") from error


def read(path: Path) -> Mapping[str, Written]:
    """A file's presets by name, without what they inherit. Raises InvalidPreset."""
    presets = load(path)
    keys = [key for key in Preset.model_fields if key not in ("name", "file")]
    for name, preset in presets.items():
        if not NAME.fullmatch(name):
            raise presets.wrong([name], f"a preset's name may have lowercase letters, digits and hyphens only, not {name!r}")
        if not isinstance(preset, Written) or not preset:
            raise presets.wrong([name], f"the preset {name} must map names to values")
        for key in preset:
            if key not in keys:
                raise preset.wrong([key], f"a preset has no {key!r}{nearest(key, keys)}")
    return presets
