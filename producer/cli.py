"""The `imagemill` command.

Results and JSON go to stdout; messages and progress go to stderr. Exit codes: 0 all images done, 1 some
failed, 2 wrong usage or configuration, 3 a service is unreachable, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import click
from rich.console import Console

from imagemill.producer import show
from imagemill.producer.commands import INTERRUPTED, Commands, installed_version
from imagemill.producer.drift import Outlier, outliers
from imagemill.producer.presets import presets
from imagemill.producer.sources import read_sources
from imagemill.producer.spec import job_spec, local_address, option_values, options_help, quality_values
from imagemill.shared.errors import InvalidSource, UsageError
from imagemill.shared.messages import PRIORITIES, Job, JobStatus, Row
from imagemill.shared.options.base import OPERATIONS
from imagemill.shared.presets import Presets
from imagemill.shared.quality import flags_of
from imagemill.shared.queues import queue_name
from imagemill.shared.settings import Settings, load_settings

if TYPE_CHECKING:
    from imagemill.producer.client import Client, Submission

Connect: TypeAlias = "Callable[[Settings], Client]"
COLUMNS = ("item", "index", "source", "state", "output", "code", "message", "attempts", "duplicate_of")


def _connect(settings: Settings) -> Client:
    from imagemill.producer.client import Client  # brings Celery along, which half of the calls don't need

    return Client(settings)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(installed_version(), prog_name="imagemill")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Retouch images in bulk: addresses in, retouched images out.

    Settings come from IMAGEMILL_... variables or a .env file, S3 keys from the AWS variables.
    """
    ctx.obj = ctx.obj or _connect


@main.command(epilog=options_help())
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--operation", help=f"What to do: {', '.join(OPERATIONS)}; else as the preset says.")
@click.option("--engine", help="What does it; default opencv, or as the preset says.")
@click.option("--preset", metavar="NAME", help="A look by its name; `imagemill presets list` lists them.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="An option of the operation; see below.")
@click.option("--mask", metavar="ADDRESS", help="One mask for the whole job (inpaint).")
@click.option("--output", required=True, metavar="ADDRESS", help="s3://bucket/prefix, file:///folder or a folder's path.")
@click.option("--format", "form", type=click.Choice(["same", "png", "webp", "jpeg"]), help="Of the results; default same.")
@click.option("--quality", type=int, help="Of JPEG and lossy WebP, 1 to 100; default 90.")
@click.option("--icc", type=click.Choice(["srgb", "keep"]), help="Profile of the results; default srgb, of inpaint keep.")
@click.option("--key", metavar="TEMPLATE", help="Names of the results; default {job}/{index:06d}-{name}.")
@click.option("--priority", type=click.Choice(PRIORITIES), help="Default normal.")
@click.option("--attempts", type=int, help="Tries per image before it is recorded as failed; default 3.")
@click.option("--batch", type=click.Choice(["quality", "throughput"]), help="Small batches, or large ones (default).")
@click.option("--fresh", is_flag=True, help="Compute each image anew, though its result is remembered from before.")
@click.option("--check", type=click.Choice(["off", "flag", "repair"]), help="Of results: measured and flagged; default flag.")
@click.option("--limit", "limits", multiple=True, metavar="NAME=VALUE", help="A limit of the check; see below.")
@click.option("--skip-invalid", is_flag=True, help="Leave rows out that can't be used, instead of refusing the list.")
@click.option("--expire-days", type=int, metavar="N", help="Have S3 delete what lies below --output after N days.")
@click.option("--wait", is_flag=True, help="Show progress until all images are done.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on stdout.")
@click.pass_obj
def submit(
    connect: Connect,
    sources: Sequence[str],
    operation: str | None,
    engine: str | None,
    preset: str | None,
    settings: Sequence[str],
    mask: str | None,
    output: str,
    form: str | None,
    quality: int | None,
    icc: str | None,
    key: str | None,
    priority: str | None,
    attempts: int | None,
    batch: str | None,
    fresh: bool,
    check: str | None,
    limits: Sequence[str],
    skip_invalid: bool,
    expire_days: int | None,
    wait: bool,
    as_json: bool,
) -> None:
    """Queue images: a list (.txt, .csv, .jsonl), - for stdin, a folder, s3://bucket/prefix, or single addresses."""
    target: dict[str, object] = {"url": local_address(output), "format": form, "quality": quality, "icc": icc, "key": key}
    reuse = False if fresh else None
    policy: dict[str, object] = {"priority": priority, "attempts": attempts, "batch": batch, "reuse": reuse}
    policy["quality"] = quality_values(check, limits)
    configured = load_settings()
    look = Presets(configured.presets).get(preset) if preset is not None else None
    spec = job_spec(operation, engine, option_values(settings, mask), target, policy, look)
    out = show.make_console(stderr=True)
    with connect(configured) as client:
        if expire_days is not None:
            from imagemill.producer.storage import expire

            expire(configured.s3, spec.output.url, expire_days)
        submission = _submit(client, sources, spec, skip_invalid, out)
        if not as_json:
            click.echo(submission.job)
        if wait:
            _finish(_follow(client, submission.job, out), as_json)
        elif as_json:
            fields = {"total": submission.total, "duplicates": submission.duplicates, "invalid": submission.invalid_count}
            click.echo(json.dumps({"job": submission.job, **fields}))


@main.command()
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def status(connect: Connect, job: str, as_json: bool) -> None:
    """Say how far a job is."""
    with connect(load_settings()) as client:
        found = client.status(job)
        unserved = client.unserved([found])
    if as_json:
        click.echo(json.dumps(_told(found, unserved)))
    else:
        show.make_console(stderr=False).print(show.status_table(found, unserved))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON list.")
@click.pass_obj
def jobs(connect: Connect, as_json: bool) -> None:
    """List the latest jobs, newest first."""
    with connect(load_settings()) as client:
        found = client.jobs()
        unserved = client.unserved(found)
    if as_json:
        click.echo(json.dumps([_told(job, unserved) for job in found]))
    elif found:
        show.make_console(stderr=False).print(show.jobs_table(found, unserved))
    else:
        show.say(show.make_console(stderr=True), "there are no jobs yet")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON list.")
@click.pass_obj
def fleet(connect: Connect, as_json: bool) -> None:
    """List the worker nodes that are alive: what each offers, and what it lacks."""
    with connect(load_settings()) as client:
        nodes, memory = client.nodes(), client.memory()
        unserved = client.unserved(client.jobs())
    out = show.make_console(stderr=True)
    if as_json:
        click.echo(json.dumps([{**node.model_dump(mode="json"), "memory": memory.get(node.node)} for node in nodes]))
    elif nodes:
        show.make_console(stderr=False).print(show.fleet_table(nodes, memory))
    else:
        show.say(out, "no worker is running; `imagemill worker` starts one")
    for node in nodes:
        for reason in node.lacks:
            show.say(out, f"{node.node}: {reason}", "yellow")
    if unserved:
        show.say(out, f"no worker can take {show.counted(len(unserved), 'job')}: {', '.join(sorted(unserved))}", "yellow")


@main.command()
@click.argument("job")
@click.pass_obj
def watch(connect: Connect, job: str) -> None:
    """Show a job's progress, and its failures as they come, until it ends."""
    with connect(load_settings()) as client:
        _finish(_follow(client, job, show.make_console(stderr=True)), as_json=False)


@main.command()
@click.argument("job")
@click.option("--format", "form", type=click.Choice(["jsonl", "csv"]), default="jsonl", show_default=True)
@click.option("--failed", is_flag=True, help="Only what failed.")
@click.option("--flagged", is_flag=True, help="Only what the check flagged or what looks unlike the others, and as what.")
@click.option("--presign", type=int, metavar="SECONDS", help="Add links to results in S3 that anyone can open so long.")
@click.pass_obj
def results(
    connect: Connect, job: str, form: Literal["jsonl", "csv"], failed: bool, flagged: bool, presign: int | None
) -> None:
    """Print what became of each image, one per line."""
    if failed and flagged:
        raise UsageError("--failed and --flagged exclude each other: what failed has no result to flag")
    with connect(load_settings()) as client:
        lines = _lines((row for row in client.results(job) if row.state == "failed" or not failed), client, presign)
        if flagged:
            lines = _flagged(client.results(job), outliers(client.results(job)), client, presign)
        more = [name for name, wanted in (("flags", flagged), ("link", presign is not None)) if wanted]
        _write(lines, (*COLUMNS, "notes", *more), form)


@main.command()
@click.argument("job")
@click.option("--wait", is_flag=True, help="Show progress until all images are done.")
@click.pass_obj
def retry(connect: Connect, job: str, wait: bool) -> None:
    """Queue the failed images of a job again, and only those."""
    out = show.make_console(stderr=True)
    with connect(load_settings()) as client:
        count = client.retry(job)
        if count:
            show.say(out, f"{show.counted(count, 'image')} queued again; follow with `imagemill watch {job}`")
        else:
            show.say(out, f"nothing to retry: job {job} {show.outcome(client.status(job))}")
        if wait:
            _finish(_follow(client, job, out), as_json=False)


@main.command()
@click.argument("job")
@click.pass_obj
def cancel(connect: Connect, job: str) -> None:
    """Stop what has not started; what is being worked on is finished."""
    with connect(load_settings()) as client:
        show.say(show.make_console(stderr=True), f"job {job} {show.outcome(client.cancel(job))}")


@main.command()
@click.argument("job")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Where to write it; default JOB.html.")
@click.option("--most", type=click.IntRange(min=0), default=200, show_default=True, help="Images shown.")
@click.pass_obj
def report(connect: Connect, job: str, out: Path | None, most: int) -> None:
    """Write a job as one HTML page: before and after, failures, figures.

    Links to images in S3 work for seven days.
    """
    from imagemill.producer.report import JobPage, render
    from imagemill.producer.storage import picture_links

    configured = load_settings()
    path = out or Path(f"{job}.html")
    with connect(configured) as client:
        drift = outliers(client.results(job))
        page = JobPage(client.status(job), client.spec(job), client.results(job), drift)
        text = render([page], picture=picture_links(configured.s3, _complain), most=most, title=f"imagemill {job}")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}") from error
    click.echo(str(path))


@main.command()
@click.option("--images", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A folder of your own photos.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-output"), show_default=True)
@click.option(
    "--count", type=click.IntRange(min=1), help="Photos per job; by default all that are built in, or 24 of --images."
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "opencv", "rembg"]),
    default="auto",
    show_default=True,
    help="What cuts out; auto is both if the model u2netp (4.6 MB) can be downloaded, otherwise opencv.",
)
@click.option("--offline", is_flag=True, help="Download nothing: use u2netp only if it is already here.")
@click.option("--keep", is_flag=True, help="Keep Redis, the worker and the photo server running until Ctrl-C.")
def demo(out: Path, **options: Any) -> None:
    """Try every operation on this machine; everything it needs is started and stopped.

    The jobs process real photos and a few deliberately bad URLs; results and report.html are written to --out.
    """
    from imagemill.producer.demo import Options, run

    sys.exit(run(out, Options(**options), show.make_console(stderr=True)))


main.add_command(presets)


def _submit(client: Client, sources: Sequence[str], spec: Job, skip_invalid: bool, out: Console) -> Submission:
    rows = read_sources(sources, s3=client.s3)
    try:
        with out.status("reading the list"):
            submission = client.submit(rows, spec, skip_invalid=skip_invalid)
    except InvalidSource as error:
        if not error.rows:
            raise
        show.bad_rows(out, error.rows, len(error.rows))
        hint = "mend the rows, or leave them out with --skip-invalid"
        raise InvalidSource(f"{error.message.partition(': ')[0]}; {hint}", error.rows) from error
    if submission.invalid:
        show.bad_rows(out, submission.invalid, submission.invalid_count)
    text = f"job {submission.job}: {show.counted(submission.total, 'image')} queued"
    if submission.duplicates:
        text += f", {show.counted(submission.duplicates, 'duplicate')} among them"
    if submission.invalid_count:
        text += f", {show.counted(submission.invalid_count, 'row')} left out"
    show.say(out, text)
    if not submission.served:
        queue = queue_name(spec.operation, spec.lane, spec.policy.priority)
        model = spec.lane.partition(".")[2]
        start = "`imagemill worker --cpu`"
        if model:
            start = f"`IMAGEMILL_WORKER__ENGINES='[\"{spec.engine}\"]' imagemill worker` after `imagemill models pull {model}`"
        show.say(out, f"warning: no worker listens to {queue}; start one with {start}", "yellow")
    return submission


def _follow(client: Client, job: str, out: Console) -> JobStatus:
    try:
        followed = show.follow(client.watch(job), out)
    except KeyboardInterrupt:
        show.say(out, f"the job goes on; follow it with `imagemill watch {job}`, stop it with `imagemill cancel {job}`")
        sys.exit(INTERRUPTED)
    last = followed.status
    show.say(out, f"job {job} {show.outcome(last)}")
    if last.failed:
        again = f", `imagemill retry {job}` tries those again" if followed.retryable else ""
        show.say(out, f"`imagemill results {job} --failed` tells why{again}")
    if followed.flagged:
        count = show.counted(followed.flagged, "image")
        show.say(out, f"the check flagged {count}: `imagemill results {job} --flagged` tells which, and as what")
    return last


def _finish(last: JobStatus, as_json: bool) -> None:
    """Exit with 0 if every image is done, else with 1."""
    if as_json:
        click.echo(last.model_dump_json(include={"job", "state", "total", "done", "failed", "seconds"}))
    sys.exit(0 if last.state == "done" and not last.failed else 1)


def _told(status: JobStatus, unserved: set[str]) -> dict[str, Any]:
    return {**status.model_dump(mode="json"), "served": status.job not in unserved}


def _complain(text: str) -> None:
    show.say(show.make_console(stderr=True), text, "yellow")


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
    """Lines of what is flagged, with `flags`: `blurred`, `drift:lightness`, ..."""
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


if __name__ == "__main__":
    main(prog_name="imagemill")
