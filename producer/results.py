"""The `imagemill results` and `imagemill report` commands, and results in S3: their expiry and links to them."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import click

from imagemill.producer.following import Connect, Outage
from imagemill.producer.outliers import outliers
from imagemill.producer.terminal import make_console, say
from imagemill.shared.errors import ConfigurationError, ImageError, InvalidOption, ServiceUnavailable, UsageError
from imagemill.shared.plain_text import cell
from imagemill.shared.quality import flags_of
from imagemill.shared.s3 import LONGEST_LINK, ensure_bucket, expire_after, make_client, make_signer, presign, split
from imagemill.shared.settings import S3Settings, load_settings

COLUMNS = ("item", "index", "source", "state", "output", "code", "message", "attempts", "duplicate_of")


@click.command()
@click.argument("job")
@click.option("--format", "form", type=click.Choice(["jsonl", "csv"]), default="jsonl", show_default=True)
@click.option("--failed", is_flag=True, help="Only failed images.")
@click.option(
    "--flagged", is_flag=True, help="Only images that the check flagged or that look unlike the others, with their flags."
)
@click.option("--presign", type=int, metavar="SECONDS", help="Add a public link to each result in S3, valid for this long.")
@click.pass_obj
def results(connect: Connect, job: str, form: str, failed: bool, flagged: bool, presign: int | None) -> None:
    """Print the result of each image, one per line."""
    if failed and flagged:
        raise UsageError("--failed and --flagged can't be combined: a failed image has no result to flag")
    outage = Outage(make_console(stderr=True))
    with connect(load_settings()) as client:
        columns = [*COLUMNS, *["part"] * bool(client.spec(job).options.parts)]
        more = [name for name, wanted in (("flags", flagged), ("link", presign is not None)) if wanted]
        table = csv.DictWriter(sys.stdout, (*columns, "notes", *more), lineterminator="\n")
        if form == "csv":
            table.writeheader()
        drift = outliers(outage.between(client.results(job, lost=outage))) if flagged else {}
        for row in outage.between(client.results(job, lost=outage)):
            line = row.model_dump(mode="json", include=set(columns))
            line["notes"] = [*(row.result.notes if row.result else ())]
            if flagged:  # `blurred`, `drift:lightness`, ...
                drifted = [f"drift:{drift[row.index].measure}"] if row.index in drift else []
                line["flags"] = [*flags_of(line["notes"]), *drifted]
            if (failed and row.state != "failed") or (flagged and not line["flags"]):
                continue
            if presign is not None:
                line["link"] = client.link(row, presign) if (row.output or "").startswith("s3://") else None
            if form == "jsonl":
                click.echo(json.dumps(line, ensure_ascii=False))
            else:
                table.writerow({name: _cell(value) for name, value in line.items()})


def _cell(value: object) -> object:
    text = " ".join(value) if isinstance(value, list) else value
    return cell(text) if isinstance(text, str) else text


@click.command()
@click.argument("job")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write; default JOB.html.")
@click.option("--most", type=click.IntRange(min=0), default=200, show_default=True, help="Maximum number of images shown.")
@click.option("--no-links", is_flag=True, help="Leave out the pictures and all links to images.")
@click.pass_obj
def report(connect: Connect, job: str, out: Path | None, most: int, no_links: bool) -> None:
    """Write an HTML page about a job.

    It shows images before and after, failures and timings. Its links to images in S3 work for seven days, for anyone who has
    the page.
    """
    from imagemill.producer.report import JobPage, render  # imports Jinja

    configured = load_settings()
    path = out or Path(f"{job}.html")
    failures: list[str] = []
    outage = Outage(make_console(stderr=True))
    with connect(configured) as client:
        drift = outliers(outage.between(client.results(job, lost=outage)))
        page = JobPage(client.status(job), client.spec(job), outage.between(client.results(job, lost=outage)), drift)
        picture = (lambda _: None) if no_links else picture_links(configured.s3, failures)
        text = render([page], picture=picture, most=most, title=f"imagemill {job}")
    if failures:
        say(make_console(stderr=True), f"the report has no pictures: {failures[0]}", "yellow")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from error
    click.echo(str(path))


def expire(settings: S3Settings, url: str, days: int) -> None:
    """Have S3 delete everything under `s3://bucket/prefix` after `days`.

    Raises InvalidOption if the output is not in S3 or has no prefix, ServiceUnavailable if S3 does not
    respond, ConfigurationError if it refuses.
    """
    if not url.startswith("s3://"):
        raise InvalidOption("--expire-days needs an --output of s3://bucket/prefix")
    bucket, prefix = split(url)
    if not prefix:
        raise InvalidOption("--expire-days needs a prefix: with s3://bucket alone, the whole bucket would expire")
    client = make_client(settings)
    try:
        ensure_bucket(client, bucket, settings.create_bucket, settings.region)
        expire_after(client, bucket, prefix, days)
    except ImageError as error:
        raise (ServiceUnavailable if error.retryable else ConfigurationError)(error.message) from error


def picture_links(settings: S3Settings, failures: list[str]) -> Callable[[str], str | None]:
    """A function from an image's URL to one that a browser can load.

    S3 URLs become links that are valid for seven days; others stay. If a link can't be made, the function
    returns None and adds the reason to `failures`.
    """
    signer = cache(lambda: make_signer(settings))

    def link(url: str) -> str | None:
        if not url.startswith("s3://"):
            return url
        try:
            return presign(signer(), url, LONGEST_LINK)
        except (ImageError, ConfigurationError) as error:
            failures.append(error.message)
            return None

    return link
