"""The `imagemill submit` command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.console import Console

from imagemill.producer import terminal
from imagemill.producer.following import Connect, exit_with, follow
from imagemill.producer.options_help import write_options
from imagemill.producer.sources import read_sources
from imagemill.producer.spec import job_spec, local_address, option_values, quality_values
from imagemill.producer.units import counted
from imagemill.shared.errors import InvalidSource
from imagemill.shared.messages import PRIORITIES, Job
from imagemill.shared.options.base import OPERATIONS
from imagemill.shared.presets import Presets
from imagemill.shared.queues import queue_name
from imagemill.shared.settings import load_settings

if TYPE_CHECKING:
    from imagemill.producer.client import Client
    from imagemill.producer.submission import Submission

HINT = "Add `--operation NAME` to list its options here; `--help-options` lists those of all operations."


class SubmitCommand(click.Command):
    """A command whose `--help` ends with the options of the operation that is named on the same line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Look at all flags first, because `--help` is handled before `--operation` is."""
        ctx.meta[__name__], _, _ = self.make_parser(ctx).parse_args([*args])
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of the named operation and engine, or how to see them."""
        named = ctx.meta.get(__name__, {})
        operation, engine = named.get("operation"), named.get("engine")
        if named.get("preset") is not None:
            preset = Presets(load_settings().presets).get(named["preset"])
            operation, engine = preset.operation, preset.engine
        if operation is None or not write_options(formatter, operation, engine):
            formatter.write_paragraph()
            formatter.write_text(HINT)


def _print_all_options(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        formatter = ctx.make_formatter()
        write_options(formatter)
        click.echo(formatter.getvalue().strip())
        ctx.exit()


@click.command(cls=SubmitCommand)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--operation", metavar="NAME", help=f"{', '.join(OPERATIONS)}; required unless --preset is given.")
@click.option("--engine", metavar="NAME", help="Implementation of the operation; default opencv, or the preset's.")
@click.option("--preset", metavar="NAME", help="A named look; `imagemill presets list` lists them.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set an option of the operation; repeatable.")
@click.option("--mask", metavar="URL", help="One mask for all images, as a URL or path (inpaint).")
@click.option("--output", required=True, metavar="URL", help="s3://bucket/prefix, file:///folder or a folder's path.")
@click.option("--format", type=click.Choice(["same", "png", "webp", "jpeg"]), help="Result format; default same.")
@click.option("--quality", type=int, metavar="1-100", help="Quality of JPEG and lossy WebP; default 90.")
@click.option(
    "--icc",
    type=click.Choice(["srgb", "keep"]),
    help="Convert to sRGB, or keep the source's profile; default srgb, inpaint: keep.",
)
@click.option("--key", metavar="TEMPLATE", help="File names of the results; default {job}/{index:06d}-{name}.")
@click.option("--priority", type=click.Choice(PRIORITIES), help="Queue priority; default normal.")
@click.option("--batch", type=click.Choice(["quality", "throughput"]), help="Small batches, or large ones; default throughput.")
@click.option("--fresh", is_flag=True, help="Compute every image again instead of reusing earlier results.")
@click.option(
    "--check",
    type=click.Choice(["off", "flag", "repair"]),
    help="Skip the quality check, flag poor results, or also repair them; default flag.",
)
@click.option("--limit", "limits", multiple=True, metavar="NAME=VALUE", help="Set a limit of the check; repeatable.")
@click.option("--skip-invalid", is_flag=True, help="Skip invalid rows instead of rejecting the list.")
@click.option("--expire-days", type=int, metavar="N", help="Have S3 delete everything under --output after N days.")
@click.option("--wait", is_flag=True, help="Show progress until the job ends.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on stdout.")
@click.option(
    "--help-options",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_all_options,
    help="Show the options and limits of all operations and exit.",
)
@click.pass_obj
def submit(
    connect: Connect,
    /,
    sources: Sequence[str],
    operation: str | None,
    engine: str | None,
    preset: str | None,
    settings: Sequence[str],
    mask: str | None,
    output: str,
    priority: str | None,
    batch: str | None,
    fresh: bool,
    check: str | None,
    limits: Sequence[str],
    skip_invalid: bool,
    expire_days: int | None,
    wait: bool,
    as_json: bool,
    **files: str | int | None,
) -> None:
    """Queue images for retouching.

    SOURCE is a list (.txt, .csv, .jsonl), - for stdin, a folder, s3://bucket/prefix, or an image's URL or path.
    """
    target = {"url": local_address(output), **files}  # files: format, quality, icc, key
    quality = quality_values(check, limits)
    policy = {"priority": priority, "batch": batch, "reuse": False if fresh else None, "quality": quality}
    configured = load_settings()
    look = Presets(configured.presets).get(preset) if preset is not None else None
    spec = job_spec(operation, engine, option_values(settings, mask), target, policy, look)
    out = terminal.make_console(stderr=True)
    with connect(configured) as client:
        if expire_days is not None:
            from imagemill.producer.s3_results import expire

            expire(configured.s3, spec.output.url, expire_days)
        submission = _submit(client, sources, spec, skip_invalid, out)
        if not as_json:
            click.echo(submission.job)
        if wait:
            exit_with(follow(client, submission.job, out), as_json)
        elif as_json:
            counts = {"total": submission.total, "duplicates": submission.duplicates, "invalid": submission.invalid_count}
            click.echo(json.dumps({"job": submission.job, **counts}))


def _submit(client: Client, sources: Sequence[str], spec: Job, skip_invalid: bool, out: Console) -> Submission:
    """Queue the job and report the outcome, including invalid rows and missing workers."""
    rows = read_sources(sources, s3=client.s3)
    try:
        with out.status("reading the list"):
            submission = client.submit(rows, spec, skip_invalid=skip_invalid)
    except InvalidSource as error:
        if not error.rows:
            raise
        terminal.bad_rows(out, error.rows, len(error.rows))
        hint = "fix them, or skip them with --skip-invalid"
        raise InvalidSource(f"{error.message.partition(': ')[0]}; {hint}", error.rows) from error
    if submission.invalid:
        terminal.bad_rows(out, submission.invalid, submission.invalid_count)
    text = f"job {submission.job}: {counted(submission.total, 'image')} queued"
    if submission.duplicates:
        text += f", including {counted(submission.duplicates, 'duplicate')}"
    if submission.invalid_count:
        text += f"; {counted(submission.invalid_count, 'invalid row')} skipped"
    terminal.say(out, text)
    if not submission.served:
        terminal.say(out, _no_worker(spec), "yellow")
    return submission


def _no_worker(spec: Job) -> str:
    queue = queue_name(spec.operation, spec.lane, spec.policy.priority)
    model = spec.lane.partition(".")[2]
    start = "`imagemill worker --cpu`"
    if model:
        start = f"`imagemill models pull {model}` and `IMAGEMILL_WORKER__ENGINES='[\"{spec.engine}\"]' imagemill worker`"
    return f"warning: no worker listens to {queue}; start one with {start}"
