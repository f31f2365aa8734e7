"""The `imagemill` command.

Results and JSON go to stdout; messages and progress go to stderr. Exit codes: 0 all images done, 1 some
failed, 2 wrong usage or configuration, 3 a service is unreachable, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imagemill.producer.following import Connect, retry, watch
from imagemill.producer.lazy_commands import Commands
from imagemill.producer.logs import logs
from imagemill.producer.presets import presets
from imagemill.producer.results import report, results
from imagemill.producer.submit import submit
from imagemill.producer.terminal import counted, dead_table, fleet_table, jobs_table, make_console, outcome, say, status_table
from imagemill.shared.messages import PRIORITIES, DeadLetter, JobStatus, Priority
from imagemill.shared.settings import Settings, load_settings

if TYPE_CHECKING:
    from imagemill.producer.client import Client


def _connect(settings: Settings) -> Client:
    from imagemill.producer.client import Client  # imports redis, which help and presets don't need

    return Client(settings)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="imagemill", prog_name="imagemill")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Retouch images in bulk: image URLs in, retouched images out.

    Settings come from IMAGEMILL_... variables or a .env file, and S3 keys from the AWS variables.
    """
    ctx.obj = ctx.obj or _connect


@main.command()
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def status(connect: Connect, job: str, as_json: bool) -> None:
    """Show a job's progress, place in line and expected end."""
    with connect(load_settings()) as client:
        (found,) = client.explain([client.status(job)])
        unserved = client.unserved([found])
    if as_json:
        click.echo(json.dumps(_as_json(found, unserved)))
    else:
        make_console(stderr=False).print(status_table(found))


@main.command()
@click.option("--dead", is_flag=True, help="Instead, list what could not be read in Redis and was set aside.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.pass_obj
def jobs(connect: Connect, dead: bool, as_json: bool) -> None:
    """List the latest jobs, newest first."""
    with connect(load_settings()) as client:
        letters = client.dead() if dead else []
        found = [] if dead else client.explain(client.jobs())
        unserved = client.unserved(found)
    if dead:
        _show_dead(letters, as_json)
    elif as_json:
        click.echo(json.dumps([_as_json(job, unserved) for job in found]))
    elif found:
        make_console(stderr=False).print(jobs_table(found))
    else:
        say(make_console(stderr=True), "no jobs yet")


def _show_dead(letters: list[DeadLetter], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([letter.model_dump() for letter in letters]))
    elif letters:
        make_console(stderr=False).print(dead_table(letters))
    else:
        say(make_console(stderr=True), "nothing was set aside")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.pass_obj
def fleet(connect: Connect, as_json: bool) -> None:
    """List the running worker nodes.

    Shows what each node offers and lacks, and how fast it is.
    """
    with connect(load_settings()) as client:
        nodes, memory, gpus = client.nodes(), client.memory(), client.gpus()
        rates = client.rates(nodes)
        unserved = client.unserved(client.jobs())
    out = make_console(stderr=True)
    if as_json:
        more = {node.node: {"memory": memory.get(node.node), "rates": rates[node.node]} for node in nodes}
        click.echo(json.dumps([{**node.model_dump(mode="json"), **more[node.node]} for node in nodes]))
    elif nodes:
        make_console(stderr=False).print(fleet_table(nodes, memory, rates))
    else:
        say(out, "no worker is running; `imagemill worker` starts one")
    for host, (expected, present) in gpus.items():
        if expected is not None:
            say(out, f"{host}: {present} of {expected} expected GPUs", "red" if present < expected else "")
    for node in nodes:
        if node.problem:
            say(out, f"{node.node}: {node.problem}", "red")
        for reason in node.lacks:
            say(out, f"{node.node}: {reason}", "yellow")
        for lane, reason in node.faults.items():
            say(out, f"{node.node}: {lane} is out of service: {reason}", "red")
    if unserved:
        say(out, f"no worker can take {counted(len(unserved), 'job')}: {', '.join(sorted(unserved))}", "yellow")


@main.command()
@click.argument("job")
@click.pass_obj
def cancel(connect: Connect, job: str) -> None:
    """Cancel a job; images already being processed may still finish."""
    with connect(load_settings()) as client:
        say(make_console(stderr=True), f"job {job} {outcome(client.cancel(job))}")


@main.command()
@click.argument("job")
@click.pass_obj
def pause(connect: Connect, job: str) -> None:
    """Pause a job; images already being processed will finish."""
    with connect(load_settings()) as client:
        say(make_console(stderr=True), f"job {job} {outcome(client.pause(job))}")


@main.command()
@click.argument("job")
@click.pass_obj
def resume(connect: Connect, job: str) -> None:
    """Continue a paused job."""
    with connect(load_settings()) as client:
        say(make_console(stderr=True), f"job {job} {outcome(client.resume(job))}")


@main.command()
@click.argument("job")
@click.argument("level", metavar="high|normal|low", type=click.Choice(PRIORITIES))
@click.pass_obj
def priority(connect: Connect, job: str, level: Priority) -> None:
    """Move a job to another priority."""
    with connect(load_settings()) as client:
        say(make_console(stderr=True), f"job {job}, now of {level} priority, {outcome(client.prioritize(job, level))}")


@main.command()
@click.option("--images", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A folder of your own photos.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-output"), show_default=True)
@click.option("--count", type=click.IntRange(min=1), help="Photos per job; default: all built-in ones, or 24 from --images.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "opencv", "rembg"]),
    default="auto",
    show_default=True,
    help="Engine for cut-outs; auto uses both if the model u2netp (4.6 MB) can be downloaded, otherwise opencv.",
)
@click.option("--offline", is_flag=True, help="Download nothing; use u2netp only if it is already here.")
@click.option("--keep", is_flag=True, help="Keep Redis, the worker and the photo server running until Ctrl-C.")
def demo(out: Path, **options: Any) -> None:
    """Try every operation on this machine.

    Starts everything it needs, and stops it again at the end.

    The jobs process real photos and a few deliberately bad URLs. Results and report.html go to --out.
    """
    from imagemill.producer.demo import Options, run

    sys.exit(run(out, Options(**options), make_console(stderr=True)))


for command in (submit, watch, results, retry, report, presets, logs):
    main.add_command(command)


def _as_json(status: JobStatus, unserved: set[str]) -> dict[str, Any]:
    return {**status.model_dump(mode="json"), "served": status.job not in unserved}


if __name__ == "__main__":
    main(prog_name="imagemill")
