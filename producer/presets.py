"""The `imagemill presets` commands: list, show and check the named looks for `imagemill submit --preset`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import yaml
from rich import box
from rich.table import Table

from imagemill.producer import terminal
from imagemill.shared.presets import Presets
from imagemill.shared.settings import load_settings


@click.group()
def presets() -> None:
    """List, show and check presets.

    Presets are built in, or your own (IMAGEMILL_PRESETS).
    """


@presets.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per preset.")
def list_presets(as_json: bool) -> None:
    """List all presets with their descriptions."""
    known = Presets(load_settings().presets)
    found = [known.get(name) for name in known.names()]
    if as_json:
        for preset in found:
            click.echo(preset.model_dump_json(include={"name", "operation", "engine", "description", "file"}))
        return
    table = Table("preset", "operation", "engine", "", box=box.SIMPLE, show_edge=False)
    for preset in found:
        table.add_row(preset.name, preset.operation, preset.engine, preset.description)
    terminal.make_console(stderr=False).print(table)


@presets.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show_preset(name: str, as_json: bool) -> None:
    """Print a preset with all its options, as in a preset file."""
    found = Presets(load_settings().presets).get(name).resolved()
    if as_json:
        click.echo(json.dumps({"name": name, **found}, ensure_ascii=False))
    else:
        click.echo(yaml.safe_dump({name: found}, sort_keys=False, allow_unicode=True, width=100), nl=False)


@presets.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def check(file: Path | None) -> None:
    """Check the presets in FILE or, by default, your own.

    The built-in presets are checked too. Exits with status 2 if any preset is invalid.
    """
    known = Presets(file or load_settings().presets)
    faults = list(known.faults())
    for fault in faults:
        click.secho(fault.message, fg="red", err=True)
    if not faults:
        click.echo(f"{terminal.counted(len(known.names()), 'preset')}, all valid")
    sys.exit(2 if faults else 0)
