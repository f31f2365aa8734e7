"""`imagemill doctor`: checks Redis, workers, S3, disk, engines, models and GPU, and suggests fixes."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import click
from rich.console import Console

from imagemill.shared.plain_text import harmless
from imagemill.shared.settings import Settings, load_settings
from imagemill.shared.urls import check_output_url
from imagemill.worker.node.checks.broker import check_redis
from imagemill.worker.node.checks.finding import WAIT_SECONDS, Finding, State
from imagemill.worker.node.checks.gpu import check_builds, check_gpu
from imagemill.worker.node.checks.host import check_disk, check_folders, check_shared_memory
from imagemill.worker.node.checks.models import check_engines, check_models
from imagemill.worker.node.checks.store import check_s3, outputs_of_jobs

COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}
OF_WORKERS = (check_disk, check_shared_memory, check_engines, check_models, check_gpu, check_builds)
"""The checks of hosts that nodes run on."""


def _outputs(_context: click.Context, _parameter: click.Parameter, urls: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return tuple(map(check_output_url, urls))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.option(
    "--output",
    "outputs",
    multiple=True,
    metavar="URL",
    callback=_outputs,
    help=(
        "Check that results can be written to s3://BUCKET/PREFIX or file:///FOLDER; repeatable. "
        "Without it, the buckets of the latest jobs are checked."
    ),
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per finding.")
@click.option("--worker", "alive", is_flag=True, help="Only check whether this host's nodes are healthy; exit 0 if all are.")
@click.option("--node", metavar="NAME", help="With --worker: check only this node, such as gpu0 or gpu0@host.")
@click.option("--wait", default=WAIT_SECONDS, show_default=True, help="Seconds an idle node has to run a canary task.")
def doctor(outputs: tuple[str, ...], as_json: bool, alive: bool, node: str | None, wait: float) -> None:
    """Check Redis, workers, S3, disk, engines, models and GPU, and suggest fixes.

    To test an S3 output, it writes an empty object there and deletes it again.
    """
    settings = load_settings()
    findings = _check_nodes(settings, wait, node) if alive or node else check_all(settings, outputs)
    console = Console()
    status = 0
    for finding in findings:
        if as_json:
            click.echo(json.dumps(asdict(finding)))
        else:
            console.print(
                f"[{COLOURS[finding.state]}]{finding.state:<8}[/] [bold]{finding.check}[/]: ", end="", highlight=False
            )
            # The terminal wraps long lines: a line break would spoil a command that is copied.
            text = harmless(finding.found) + (f"\n         fix: {harmless(finding.fix)}" if finding.fix else "")
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        if finding.state == "failed":
            status = max(status, 3 if finding.check in ("redis", "s3", "worker") else 2)
    sys.exit(status)


def check_all(settings: Settings, outputs: tuple[str, ...]) -> Iterator[Finding]:
    """All checks that make sense on this host."""
    reachable = True
    for finding in check_redis(settings):
        reachable = reachable and finding.state != "failed"
        yield finding
    states: dict[str, State] = dict.fromkeys(outputs, "failed")
    if reachable and not states:  # a bucket of an old job may have been deleted since
        states = dict.fromkeys(outputs_of_jobs(settings), "warning")
    yield from check_s3(settings, states)
    if all(importlib.util.find_spec(package) is None for package in ("cv2", "pycurl")):  # as in the tools image
        found = "the worker's packages are not installed here, so disk, engines, models and GPUs are not checked"
        yield Finding("host", "ok", f"{found}; run imagemill doctor on the workers' hosts too")
        return
    from imagemill.worker.node.health import check_expected_gpus  # needs packages of the extra `worker`

    yield from check_folders(settings, outputs)
    for check in (*OF_WORKERS, check_expected_gpus):
        yield from check(settings)


def _check_nodes(settings: Settings, wait: float, node: str | None) -> Iterator[Finding]:
    from imagemill.worker.node.health import check_nodes  # needs packages of the extra `worker`

    yield from check_nodes(settings, wait, node)
