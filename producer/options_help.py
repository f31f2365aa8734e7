"""The options of operations and the limits of the check, for `imagemill submit --help` and `--help-options`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from imagemill.shared.engines import ENGINES
from imagemill.shared.options.base import OPERATIONS, Operation
from imagemill.shared.quality import LIMITS, RULES, Quality


def write_options(formatter: click.HelpFormatter, operation: str | None = None, engine: str | None = None) -> bool:
    """Write the options and limits of the named operation and engine, or of all; False if there is no such operation."""
    operations = [name for name in OPERATIONS if operation in (None, name)]
    for row in ENGINES:
        if row.operation in operations and engine in (None, row.name):
            fields = row.options.model_fields.items()
            with formatter.section(f"Options of {row.operation} ({row.name}), for --set"):
                formatter.write_dl([(name, _described(field)) for name, field in fields if name != "engine"])
    if operations:
        with formatter.section("Limits of the quality check, for --limit"):
            formatter.write_dl([(limit, _limit(limit, operations)) for limit in RULES])
    return bool(operations)


def _described(field: FieldInfo) -> str:
    """`description (one of a, b; default a)`."""
    if isinstance(field.default, bool):
        default = "yes" if field.default else "no"
    else:
        default = "none" if field.default in (None, ()) else "empty" if field.default == "" else f"{field.default}"
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    explained = len(choices) < 2 or all(choice in f"{field.description}" for choice in choices)
    values = "" if explained else f"one of {', '.join(choices)}; "
    return f"{field.description} ({values}default {default})"


def _limit(name: str, operations: Sequence[Operation]) -> str:
    """A limit's description and its defaults for `operations`."""
    defaults = "; ".join(f"default {LIMITS[o][name]:g} for {o}" for o in operations if name in LIMITS[o])
    return f"{Quality.model_fields[name].description}" + (f" ({defaults})" if defaults else "")
