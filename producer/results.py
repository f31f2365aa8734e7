"""The `imagemill results` and `imagemill report` commands."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from imagemill.producer import terminal
from imagemill.producer.following import Connect
from imagemill.producer.outliers import Outlier, outliers
from imagemill.shared.errors import UsageError
from imagemill.shared.messages import Row
from imagemill.shared.quality import flags_of
from imagemill.shared.settings import load_settings

if TYPE_CHECKING:
    from imagemill.producer.client import Client

COLUMNS = ("item", "index", "source", "state", "output", "code", "message", "attempts", "duplicate_of")


@click.command()
@click.argument("job")
@click.option("--format", "form", type=click.Choice(["jsonl", "csv"]), default="jsonl", show_default=True)
@click.option("--failed", is_flag=True, help="Only failed images.")
@click.option("--flagged", is_flag=True, help="Only images flagged by the check or unlike the others, with their flags.")
@click.option("--presign", type=int, metavar="SECONDS", help="Add a public link to each result in S3, valid this long.")
@click.pass_obj
def results(
    connect: Connect, job: str, form: Literal["jsonl", "csv"], failed: bool, flagged: bool, presign: int | None
) -> None:
    """Print the result of each image, one per line."""
    if failed and flagged:
        raise UsageError("--failed and --flagged can't be combined: a failed image has no result to flag")
    with connect(load_settings()) as client:
        lines = _lines((row for row in client.results(job) if row.state == "failed" or not failed), client, presign)
        if flagged:
            lines = _flagged(client.results(job), outliers(client.results(job)), client, presign)
        more = [name for name, wanted in (("flags", flagged), ("link", presign is not None)) if wanted]
        _write(lines, (*COLUMNS, "notes", *more), form)


@click.command()
@click.argument("job")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write; default JOB.html.")
@click.option("--most", type=click.IntRange(min=0), default=200, show_default=True, help="Maximum number of images shown.")
@click.pass_obj
def report(connect: Connect, job: str, out: Path | None, most: int) -> None:
    """Write an HTML page about a job: before and after, failures, timings.

    Links to images in S3 are valid for seven days.
    """
    from imagemill.producer.report import JobPage, render
    from imagemill.producer.s3_results import picture_links

    configured = load_settings()
    path = out or Path(f"{job}.html")
    console = terminal.make_console(stderr=True)
    pictures = picture_links(configured.s3, lambda text: terminal.say(console, text, "yellow"))
    with connect(configured) as client:
        page = JobPage(client.status(job), client.spec(job), client.results(job), outliers(client.results(job)))
        text = render([page], picture=pictures, most=most, title=f"imagemill {job}")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from error
    click.echo(str(path))


def _lines(rows: Iterable[Row], client: Client, presign: int | None) -> Iterator[dict[str, Any]]:
    for row in rows:
        line = row.model_dump(mode="json", include=set(COLUMNS))
        line["notes"] = [*(row.result.notes if row.result else ())]
        if presign is not None:
            remote = row.output is not None and row.output.startswith("s3://")
            line["link"] = client.link(row, presign) if remote else None
        yield line


def _flagged(
    rows: Iterable[Row], drift: Mapping[int, Outlier], client: Client, presign: int | None
) -> Iterator[dict[str, Any]]:
    """Lines of flagged images and outliers, with `flags`: `blurred`, `drift:lightness`, ..."""
    for row in rows:
        flags = [*flags_of(row.result.notes if row.result else ())]
        if row.index in drift:
            flags.append(f"drift:{drift[row.index].measure}")
        if flags:
            (line,) = _lines([row], client, presign)
            yield {**line, "flags": flags}


def _write(lines: Iterable[dict[str, Any]], columns: Sequence[str], form: Literal["jsonl", "csv"]) -> None:
    if form == "jsonl":
        for line in lines:
            click.echo(json.dumps(line, ensure_ascii=False))
        return
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: " ".join(value) if isinstance(value, list) else value for name, value in line.items()})
