"""The `imagemill presets` commands: which looks there are, what they amount to, and whether they can be used."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import yaml
from rich import box
from rich.table import Table

from imagemill.producer import show
from imagemill.shared.presets import Presets
from imagemill.shared.settings import load_settings


@click.group()
def presets() -> None:
    """List, show and check looks for `submit --preset`: those that ship, and your own (IMAGEMILL_PRESETS)."""


@presets.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per preset.")
def list_presets(as_json: bool) -> None:
    """List the names, with what each is for."""
    known = Presets(load_settings().presets)
    found = [known.get(name) for name in known.names()]
    if as_json:
        for one in found:
            told = {"name": one.name, "operation": one.operation, "engine": one.engine, "description": one.description}
            click.echo(json.dumps({**told, "file": str(one.file)}, ensure_ascii=False))
        return
    table = Table("preset", "operation", "engine", "", box=box.SIMPLE, show_edge=False)
    for one in found:
        table.add_row(one.name, one.operation, one.engine, one.description)
    show.make_console(stderr=False).print(table)


@presets.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def show_preset(name: str, as_json: bool) -> None:
    """Print all that a preset amounts to, with every option, as a file of your own could say it."""
    found = Presets(load_settings().presets).get(name).resolved()
    if as_json:
        click.echo(json.dumps({"name": name, **found}, ensure_ascii=False))
    else:
        click.echo(yaml.safe_dump({name: found}, sort_keys=False, allow_unicode=True, width=100), nl=False)


@presets.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def check(file: Path | None) -> None:
    """Check all presets, with those of FILE beside those that ship; else with your own. Exits 2 where one is wrong."""
    known = Presets(file or load_settings().presets)
    wrong = list(known.faults())
    for fault in wrong:
        click.secho(fault.message, fg="red", err=True)
    if not wrong:
        click.echo(f"{show.counted(len(known.names()), 'preset')}: all can be used")
    sys.exit(2 if wrong else 0)
