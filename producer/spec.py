"""Build a job's spec from the flags of `imagemill submit`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from imagemill.producer.sources import file_url
from imagemill.shared.engines import parse_options
from imagemill.shared.errors import InvalidOption
from imagemill.shared.messages import Job, Output, Policy
from imagemill.shared.options.base import ADDRESSES, Model, nearest, parse_settings, validation_sentence
from imagemill.shared.presets import Preset, work_of
from imagemill.shared.quality import RULES
from imagemill.shared.urls import check_source_url, percent_encoded, shown


def job_spec(
    operation: str | None,
    engine: str | None,
    options: dict[str, str],
    output: Mapping[str, object],
    policy: Mapping[str, object],
    preset: Preset | None = None,
) -> Job:
    """The spec of a job. Values of None in `output` and `policy` take the preset's value or the default.

    Without a preset the operation is required and the engine defaults to opencv. The preset's values are copied
    into the spec. Raises InvalidOption with the reason, and with the nearest valid name for a misspelt one.
    """
    operation, engine = work_of(operation, engine, preset)
    given = set(options)
    if preset is not None:
        options = {**_addresses({**preset.options}), **options}
        output, policy = _merged(preset.output, output), _merged(preset.policy, policy)
    parsed = parse_options(operation, engine, options)
    parsed = type(parsed).model_construct(given, **dict(parsed))  # a preset's values were not given
    fields = {"operation": operation, "options": parsed}
    return Job.model_validate(
        {**fields, "output": _validated(Output, "output", output), "policy": _validated(Policy, "policy", policy)}
    )


def _merged(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`base` overridden by the values of `override` that are not None, recursively."""
    merged = dict(base)
    for name, value in override.items():
        if isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            merged[name] = _merged(merged[name], value)
        elif value is not None:
            merged[name] = value
    return merged


def option_values(settings: Iterable[str], mask: str | None) -> dict[str, str]:
    """The options from `--set KEY=VALUE` and `--mask`. URLs are checked, and paths become file URLs."""
    return _addresses(parse_settings(settings) | ({} if mask is None else {"mask": mask}))


def _addresses(values: dict[str, Any]) -> dict[str, Any]:
    """Options with their URLs checked and their paths turned into file URLs."""
    for name in ADDRESSES:
        value = values.get(name)
        if isinstance(value, str) and value.lower() != "none":
            try:
                values[name] = check_source_url(local_address(value))
            except ValueError as error:
                raise InvalidOption(f"{name}: {error}, not {shown(value)!r}") from error
    return values


def quality_values(mode: str | None, limits: Iterable[str]) -> dict[str, str] | None:
    """The policy's `quality` from `--check` and `--limit NAME=VALUE`; None if neither is given."""
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
        raise InvalidOption("--limit can't be combined with --check off, which measures nothing")
    return values or None


def local_address(text: str) -> str:
    """A URL, percent-encoded where it is not text; a path as `file:///absolute/path`."""
    return percent_encoded(text) if "://" in text or not text else file_url(text)


def _validated(model: type[Model], section: str, values: Mapping[str, object]) -> Model:
    try:
        return model.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        raise InvalidOption(f"{section}: {validation_sentence(error)}") from error
