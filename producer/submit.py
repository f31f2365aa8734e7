"""The `imagemill submit` command, whose help also lists the options of operations and the limits of the check."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import click
from pydantic.fields import FieldInfo
from rich.console import Console

from imagemill.producer.following import Connect, Following
from imagemill.producer.results import expire
from imagemill.producer.rows import Rows, Skipped
from imagemill.producer.sources import read_sources
from imagemill.producer.spec import job_spec, local_address, option_values, quality_values
from imagemill.producer.terminal import bad_rows, counted, make_console, say, warn
from imagemill.producer.times import parse_time
from imagemill.shared.engines import ENGINES
from imagemill.shared.errors import InvalidOption, InvalidSource
from imagemill.shared.keys import LAYOUTS
from imagemill.shared.messages import PRIORITIES, Format, Job, JobStatus, KeepMetadata
from imagemill.shared.options.base import OPERATIONS
from imagemill.shared.presets import Presets
from imagemill.shared.quality import LIMITS, RULES, Quality
from imagemill.shared.settings import Settings, load_settings

if TYPE_CHECKING:
    from imagemill.producer.client import Client
    from imagemill.producer.submission import Submission


class SubmitCommand(click.Command):
    """A command whose `--help` ends with the options of the operation that is named on the same line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Look at all flags first, because `--help` is handled before `--operation` is.

        `--dry-run` alone must not take the next argument as its value.
        """
        args = ["--dry-run=list" if arg == "--dry-run" else arg for arg in args]
        ctx.meta[__name__], _, _ = self.make_parser(ctx).parse_args([*args])
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of the named operation and engine, or how to see them."""
        named = ctx.meta.get(__name__, {})
        operation, engine = named.get("operation"), named.get("engine")
        if named.get("preset") is not None:
            preset = Presets(load_settings().presets).get(named["preset"])
            operation, engine = preset.operation, preset.engine
        if operation in OPERATIONS:
            _write_options(formatter, operation, engine)
        else:
            formatter.write_paragraph()
            formatter.write_text(
                "Add `--operation NAME` to list its options here; `--help-options` lists those of all operations."
            )


def _print_all_options(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        formatter = ctx.make_formatter()
        _write_options(formatter)
        click.echo(formatter.getvalue().strip())
        ctx.exit()


def _write_options(formatter: click.HelpFormatter, operation: str | None = None, engine: str | None = None) -> None:
    """Write the options and limits of the named operation and engine, or of all."""
    for row in ENGINES:
        if operation in (None, row.operation) and engine in (None, row.name):
            fields = row.options.model_fields.items()
            with formatter.section(f"Options of {row.operation} ({row.name}), for --set"):
                formatter.write_dl([(name, _described(field, row.choices(name))) for name, field in fields if name != "engine"])
    with formatter.section("Limits of the quality check, for --limit"):
        formatter.write_dl([(limit, _limit(limit, operation)) for limit in RULES])


def _described(field: FieldInfo, choices: Sequence[str]) -> str:
    """`description (one of a, b; default a)`."""
    if isinstance(field.default, bool):
        default = "yes" if field.default else "no"
    else:
        value = "; ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        default = "none" if field.default in (None, ()) else "empty" if value == "" else f"{value}"
    explained = len(choices) < 2 or all(choice in f"{field.description}" for choice in choices)
    values = "" if explained else f"one of {', '.join(choices)}; "
    return f"{field.description} ({values}default {default})"


def _limit(name: str, operation: str | None) -> str:
    """A limit's description and its default for the operation, or for each."""
    limits = {each: LIMITS[each].get(name) for each in OPERATIONS if operation in (None, each)}
    defaults = "; ".join(f"default {limit:g} for {each}" for each, limit in limits.items() if limit is not None)
    return f"{Quality.model_fields[name].description}" + (f" ({defaults})" if defaults else "")


@click.command(cls=SubmitCommand)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--operation", metavar="NAME", help=f"{', '.join(OPERATIONS)}; required unless --preset is given.")
@click.option("--engine", metavar="NAME", help="Implementation of the operation; default opencv, or the preset's.")
@click.option("--preset", metavar="NAME", help="A named look; `imagemill presets list` lists them.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set an option of the operation; repeatable.")
@click.option("--mask", metavar="URL", help="One mask for all images, as a URL or path (inpaint).")
@click.option("--output", required=True, metavar="URL", help="s3://bucket/prefix, file:///folder or a folder's path.")
@click.option("--format", type=click.Choice(get_args(Format)), help="Result format; default same.")
@click.option("--quality", type=int, metavar="1-100", help="Quality of JPEG, AVIF and lossy WebP; default 90.")
@click.option(
    "--icc",
    type=click.Choice(["srgb", "keep"]),
    help="Convert to sRGB, or keep the source's profile; default srgb, or keep for inpaint.",
)
@click.option(
    "--metadata",
    type=click.Choice(get_args(KeepMetadata)),
    help="What EXIF, XMP and IPTC to keep: all, creator and rights only, or none; default copyright.",
)
@click.option("--column", metavar="NAME", help="The table's column with the images; default: found by name or content.")
@click.option("--key", metavar="TEMPLATE", help="File names of the results; default {job}/{index:06d}-{name}.")
@click.option(
    "--layout",
    type=click.Choice([*LAYOUTS]),
    help="Instead of --key: original names (flat), names and folders (tree), or numbered names (indexed, the default).",
)
@click.option("--priority", type=click.Choice(PRIORITIES), help="Which jobs go first; default normal.")
@click.option("--owner", metavar="NAME", help="Whom the job is for; owners take turns.")
@click.option(
    "--not-before", metavar="TIME", help="Begin no earlier than 2026-11-29T08:00, or than 90s, 30m, 2h or 1d from now."
)
@click.option("--until", metavar="TIME", help="Deadline, likewise; images that haven't begun by then fail as expired.")
@click.option("--batch", type=click.Choice(["quality", "throughput"]), help="Small batches, or large ones; default throughput.")
@click.option("--fresh", is_flag=True, help="Compute every image again instead of reusing earlier results.")
@click.option(
    "--check",
    type=click.Choice(["off", "flag", "repair"]),
    help="Skip the quality check, flag poor results, or also repair them; default flag.",
)
@click.option("--limit", "limits", multiple=True, metavar="NAME=VALUE", help="Set a limit of the check; repeatable.")
@click.option("--name", metavar="NAME", help="The job's ID. After an error, the same command with the same name continues.")
@click.option("--skip-invalid", is_flag=True, help="Skip invalid rows instead of rejecting the list.")
@click.option("--expire-days", type=int, metavar="N", help="Have S3 delete everything under --output after N days.")
@click.option(
    "--dry-run",
    type=click.Choice(["list", "fetch"]),
    metavar="[=fetch]",
    help="Show what would be queued, without queuing it. With =fetch, also open the first 20 images and a random 20, "
    "with their masks and everything else that a job would fetch.",
)
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
    preset: str | None,
    name: str | None,
    skip_invalid: bool,
    expire_days: int | None,
    dry_run: str | None,
    wait: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Queue images for retouching.

    SOURCE is a list (.txt, .csv, .jsonl), - for stdin, a folder, s3://bucket/prefix, or an image's URL or path. Lists may be
    tables exported from spreadsheets and shops.
    """
    if flags["layout"] is not None:
        if flags["key"] is not None:
            raise InvalidOption("--key and --layout can't be combined")
        flags["key"] = LAYOUTS[flags["layout"]]
    files = {name: flags[name] for name in ("format", "quality", "icc", "metadata", "key")}
    files["url"] = local_address(flags["output"])
    policy: dict[str, object] = {name: flags[name] for name in ("priority", "owner", "batch")}
    policy |= {"reuse": False if flags["fresh"] else None, "quality": quality_values(flags["check"], flags["limits"])}
    policy |= {name: parse_time(flag, flags[name]) for name, flag in (("not_before", "--not-before"), ("until", "--until"))}
    configured = load_settings()
    look = Presets(configured.presets).get(preset) if preset is not None else None
    options = option_values(flags["settings"], flags["mask"])
    spec = job_spec(flags["operation"], flags["engine"], options, files, policy, look)
    out = make_console(stderr=True)
    with connect(configured) as client:
        skipped = Skipped()
        rows = read_sources(sources, s3=client.s3, column=flags["column"], skipped=skipped)
        if dry_run is not None:
            how = {"name": name, "skip_invalid": skip_invalid, "fetch": dry_run == "fetch"}
            _try(client, configured, rows, spec, out, as_json=as_json, **how)
            _tell_skipped(out, skipped)
            return
        if expire_days is not None:
            expire(configured.s3, spec.output.url, expire_days)
        submission = _submit(client, rows, spec, out, skip_invalid=skip_invalid, name=name)
        _tell_skipped(out, skipped)
        if not as_json:
            click.echo(submission.job)
        told = {"advice": submission.advice, "warnings": submission.warnings}
        if wait:
            following = Following(submission.job, out, last=_as_queued(submission, spec))
            following.to_the_end(client, as_json=as_json, also=told)
        elif as_json:
            counts = {"total": submission.total, "duplicates": submission.duplicates, "invalid": submission.invalid_count}
            counts["skipped"] = skipped.count
            click.echo(json.dumps({"job": submission.job, **counts, **told}))


def _as_queued(submission: Submission, spec: Job) -> JobStatus:
    """What is known of a job before Redis has been asked."""
    return JobStatus(
        **{name: getattr(spec, name) for name in ("operation", "engine", "lane")},
        **{name: getattr(submission, name) for name in ("job", "total", "duplicates")},
        **{"state": "queued", "done": 0, "failed": 0, "created": time.time(), "seconds": 0.0},
        priority=spec.policy.priority,
        output=spec.output.url,
    )


def _tell_skipped(out: Console, skipped: Skipped) -> None:
    if skipped.count:
        more = ", ..." if skipped.count > len(skipped.names) else ""
        what = "1 file that isn't an image" if skipped.count == 1 else f"{skipped.count:,} files that aren't images"
        say(out, f"skipped {what}: {', '.join(skipped.names)}{more}", "yellow")


def _try(
    client: Client,
    settings: Settings,
    rows: Rows,
    spec: Job,
    out: Console,
    *,
    as_json: bool,
    **how: Any,
) -> None:
    """Show what would be queued."""
    from imagemill.producer import dry_run

    with out.status("reading the list"):
        found, bad = dry_run.dry_run(client, settings, rows, spec, **how)
    warn(out, found.warnings, found.advice if found.nodes else None)  # what `show` tells instead of the time
    if as_json:
        click.echo(json.dumps(dry_run.as_json(found, bad)))
    else:
        dry_run.show(make_console(stderr=False), found, bad)


def _submit(client: Client, rows: Rows, spec: Job, out: Console, *, skip_invalid: bool, name: str | None) -> Submission:
    """Queue the job and report the outcome, including invalid rows and missing workers."""
    try:
        with out.status("reading the list"):
            submission = client.submit(rows, spec, skip_invalid=skip_invalid, name=name)
    except InvalidSource as error:
        if not error.rows:
            raise
        bad_rows(out, error.rows, len(error.rows))
        warn(out, error.warnings)
        hint = "fix them, or skip them with --skip-invalid"
        raise InvalidSource(f"{error.message.partition(': ')[0]}; {hint}", error.rows, error.warnings) from error
    if submission.invalid:
        bad_rows(out, submission.invalid, submission.invalid_count)
    queued = "queued already" if submission.before else "queued"
    parts = spec.options.parts
    text = f"job {submission.job}: {counted(submission.total, 'result' if parts else 'image')} {queued}"
    text += f" ({', '.join(parts)} of each image)" if parts else ""
    if submission.duplicates:
        text += f", including {counted(submission.duplicates, 'duplicate')}"
    if submission.invalid_count:
        text += f"; {counted(submission.invalid_count, 'invalid row')} skipped"
    say(out, text)
    warn(out, submission.warnings, submission.advice)
    return submission
