"""From the flags of `imagemill submit` to a job's spec."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from imagemill.shared.engines import ENGINES, parse_options
from imagemill.shared.errors import InvalidOption
from imagemill.shared.messages import Job, Output, Policy
from imagemill.shared.options.base import ADDRESSES, Model, nearest, validation_sentence
from imagemill.shared.presets import Preset, work_of
from imagemill.shared.quality import RULES, Quality
from imagemill.shared.urls import check_source_url, shown

M = TypeVar("M", bound=Model)


def job_spec(
    operation: str | None,
    engine: str | None,
    options: dict[str, str],
    output: dict[str, object],
    policy: dict[str, object],
    preset: Preset | None = None,
) -> Job:
    """The spec of a job; what is None in `output` and `policy` was not given and takes the preset's value, or its default.

    Without a preset an operation is needed, and the engine is opencv where none is named. Nothing of the preset is left
    to be looked up later. Raises InvalidOption with what is wrong, and with the nearest valid name.
    """
    operation, engine = work_of(operation, engine, preset)
    if preset is not None:
        options = {**_addresses({**preset.options}), **options}
        output, policy = _over(preset.output, output), _over(preset.policy, policy)
    given = parse_options(operation, engine, options)
    fields = {"options": given, "output": _made(Output, "output", output), "policy": _made(Policy, "policy", policy)}
    return Job.model_validate({"operation": operation, **fields})


def _over(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` without what is None, laid over `base`; mappings inside too."""
    made = dict(base)
    for name, value in given.items():
        if isinstance(value, Mapping) and isinstance(made.get(name), Mapping):
            made[name] = _over(made[name], value)
        elif value is not None:
            made[name] = value
    return made


def option_values(settings: Iterable[str], mask: str | None) -> dict[str, str]:
    """The options that `--set KEY=VALUE` and `--mask` give; addresses are checked, and paths become addresses."""
    values: dict[str, str] = {}
    for setting in settings:
        name, mark, value = setting.partition("=")
        if not mark or not name.strip():
            raise InvalidOption(f"--set takes KEY=VALUE, not {setting!r}")
        values[name.strip().replace("-", "_")] = value
    if mask is not None:
        values["mask"] = mask
    return _addresses(values)


def _addresses(values: dict[str, Any]) -> dict[str, Any]:
    """Options with addresses checked, and paths as addresses."""
    for name in ADDRESSES:
        value = values.get(name)
        if isinstance(value, str) and value.lower() != "none":
            values[name] = _source(name, value)
    return values


def quality_values(mode: str | None, limits: Iterable[str]) -> dict[str, str] | None:
    """The policy's `quality` that `--check` and `--limit NAME=VALUE` give; None if there are none."""
    values = {} if mode is None else {"mode": mode}
    for limit in limits:
        name, mark, value = (part.strip() for part in limit.partition("="))
        if not mark:
            raise InvalidOption(f"--limit takes NAME=VALUE, not {limit!r}")
        name = name.replace("-", "_")
        if name not in RULES:
            raise InvalidOption(f"the check has no limit {name!r}{nearest(name, list(RULES))}")
        values[name] = value
    if mode == "off" and len(values) > 1:
        raise InvalidOption("--limit has no meaning with --check off: nothing is measured then")
    return values or None


def local_address(text: str) -> str:
    """An address as it is; a path as `file:///absolute/path`."""
    if "://" in text or not text:
        return text
    return Path(os.path.abspath(text)).as_uri()  # noqa: PTH100  # takes `..` out and leaves links as they are


def options_help() -> str:
    """What `--set` takes, by operation and engine, as click's help formats it."""
    parts = ["--set takes these options, by operation and engine:"]
    for engine in ENGINES:
        fields = [(name, field) for name, field in engine.options.model_fields.items() if name != "engine"]
        lines = [f"  {name}: {field.description}{_values(field)}" for name, field in fields]
        parts.append("\n".join(["\b", f"{engine.operation} ({engine.name})", *lines]))
    limits = [f"  {name}: {Quality.model_fields[name].description}" for name in RULES]
    parts.append("\n".join(["\b", "--limit takes these, of which results have what their operation has:", *limits]))
    return "\n\n".join(parts)


def _values(field: FieldInfo) -> str:
    """` (one of a, b; default a)`."""
    told = []
    if get_origin(field.annotation) is Literal:
        told.append("one of " + ", ".join(get_args(field.annotation)))
    default = "none" if field.default in (None, ()) else "empty" if field.default == "" else field.default
    return f" ({'; '.join([*told, f'default {default}'])})"


def _made(model: type[M], what: str, given: dict[str, object]) -> M:
    try:
        return model.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise InvalidOption(f"{what}: {validation_sentence(error)}") from error


def _source(name: str, text: str) -> str:
    try:
        return check_source_url(local_address(text))
    except ValueError as error:
        raise InvalidOption(f"{name}: {error}, not {shown(text)!r}") from error
