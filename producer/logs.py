"""The `imagemill logs` command."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

from imagemill.producer.story import Found, Line, expand, read
from imagemill.shared.errors import JobNotFound, UsageError
from imagemill.shared.plain_text import harmless

COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}
SHOWN_OTHERWISE = {"time", "level", "logger", "pid", "message", "node", "gpu", "job", "jobs", "trace_id", "action", "traceback"}


@click.command()
@click.argument("job")
@click.argument("places", nargs=-1, required=True, metavar="FILE|FOLDER...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
def logs(job: str, places: Sequence[str], as_json: bool) -> None:
    """Tell the story of a job from the nodes' log files.

    FILE may be a pattern, gzipped, or - for stdin. Lines from all nodes are merged by time. Nodes write these files with
    IMAGEMILL_LOG_JSON=true.
    """
    found = Found()
    for line in read(expand(places), job, found):
        click.echo(json.dumps(line) if as_json else told(line))
    if not found.lines:
        raise UsageError("no JSON lines in these files; nodes write them with IMAGEMILL_LOG_JSON=true")
    if not found.of_the_job:
        raise JobNotFound(f"nothing about job {job} in these files ({found.lines} lines read)")


def told(line: Line) -> str:
    """A line for people: time, node, what happened and its fields; the traceback below."""
    fields = {name: value for name, value in line.items() if name not in SHOWN_OTHERWISE and value not in (None, "", {}, [])}
    pairs = " ".join(f"{name}={_short(value)}" for name, value in fields.items())
    colour = COLOURS.get(str(line.get("level")))
    message = click.style(f"{_plain(line['message']):<24}", fg=colour, bold=colour is not None)
    head = f"{_plain(line['time'])[:23]}  {_plain(line.get('node', '-')):<16}  {message}  {pairs}".rstrip()
    trace = str(line.get("traceback", "")).splitlines()
    return "\n".join([head, *(f"    {_plain(each)}" for each in trace)])


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{_plain(name)}:{_plain(count)}" for name, count in value.items())
    text = _plain(value)
    return json.dumps(text, ensure_ascii=False) if " " in text else text


def _plain(value: object) -> str:
    """Strangers choose names, and a terminal obeys them."""
    return harmless(str(value))
