"""`imagemill doctor`: checks Redis, workers, S3, disk, engines, models and GPU, and suggests fixes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Literal

import click
import redis
from rich.console import Console

from imagemill.shared import s3
from imagemill.shared.broker import make_app, queues
from imagemill.shared.connection import connect, explain
from imagemill.shared.dead import DeadLetters
from imagemill.shared.engines import ENGINES
from imagemill.shared.errors import ConfigurationError, ImagemillError, ServiceUnavailable
from imagemill.shared.fleet import Fleet
from imagemill.shared.queues import CANARY_TASK, node_queue
from imagemill.shared.settings import Settings, load_settings
from imagemill.worker.hardware.device import Device
from imagemill.worker.models.catalogue import CONVERTED, WEIGHTS, Weights
from imagemill.worker.models.files import is_current, path_of, state
from imagemill.worker.node.offer import lanes, missing, models_of, shortcomings
from imagemill.worker.node.supervisor import find_gpus
from imagemill.worker.operations.registry import create

LEAST_DISK = 2 * 2**30
"""Free bytes that the temporary folder should have, for manifests and pending uploads."""
MOST_APART = 60
"""Seconds by which clocks may differ."""
START_REDIS = "start Redis, or set IMAGEMILL_REDIS_URL to its address"
SET_S3 = "set IMAGEMILL_S3__ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; not needed for file:// outputs"
COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


@dataclass(frozen=True)
class Finding:
    """The result of one check, and how to fix the problem if there is one."""

    check: str
    state: Literal["ok", "warning", "failed"]
    found: str
    fix: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per finding.")
@click.option(
    "--worker", "canary", is_flag=True, help="Only run a canary task on each node of this host; exit 0 if all succeed."
)
@click.option(
    "--wait", default=90.0, show_default=True, help="Seconds to wait for a canary; a busy child finishes its shift first."
)
def doctor(as_json: bool, canary: bool, wait: float) -> None:
    """Check Redis, workers, S3, disk, engines, models and GPU, and suggest fixes."""
    settings = load_settings()
    checks = (check_redis, check_dead_letters, check_workers, check_s3, check_disk, check_engines, check_models, check_gpu)
    findings = check_canary(settings, wait) if canary else chain.from_iterable(check(settings) for check in checks)
    console = Console()
    status = 0
    for finding in findings:
        if as_json:
            click.echo(json.dumps(asdict(finding)))
        else:
            console.print(f"[{COLOURS[finding.state]}]{finding.state:<8}[/] [bold]{finding.check}[/]: ", end="")
            console.print(finding.found + (f"\n         fix: {finding.fix}" if finding.fix else ""), markup=False)
        if finding.state == "failed":
            status = max(status, 3 if finding.check in ("redis", "s3", "worker") else 2)
    sys.exit(status)


def check_redis(settings: Settings) -> Iterator[Finding]:
    """Does Redis respond, save its data to disk, and refuse writes rather than evict data when full?"""
    url = settings.redis_url.get_secret_value()
    try:
        with connect(url) as client:
            info: Any = client.info()
            seconds, _ = client.time()
    except redis.RedisError as error:
        yield Finding("redis", "failed", explain(error), START_REDIS)
        return
    yield Finding("redis", "ok", f"version {info['redis_version']}, {info['used_memory_human']} used")
    apart = abs(time.time() - seconds)
    if apart > MOST_APART:
        found = f"this host's clock and that of Redis are {apart:.0f} s apart; S3 refuses requests at 900 s"
        yield Finding("redis", "warning", found, "synchronise the clocks of all hosts")
    if not info.get("aof_enabled"):
        found = "no append-only file: all jobs are lost on a restart"
        yield Finding("redis", "warning", found, "start Redis with --appendonly yes")
    if info.get("maxmemory_policy") != "noeviction":
        yield Finding("redis", "warning", "may evict jobs when full", "start Redis with --maxmemory-policy noeviction")


def check_dead_letters(settings: Settings) -> Iterator[Finding]:
    """Was anything in Redis unreadable?"""
    try:
        count = DeadLetters.of(settings).count()
    except ServiceUnavailable:
        return  # reported by check_redis
    if count:
        found = f"entries that could not be read and were set aside: {count}"
        yield Finding("redis", "warning", found, "imagemill jobs --dead shows them; look for what else writes to this Redis")


def check_workers(settings: Settings) -> Iterator[Finding]:
    """Does a node work in every lane?"""
    try:
        nodes = Fleet.of(settings).nodes()
    except ServiceUnavailable:
        return  # reported by check_redis
    for node in nodes:
        found = f"{node.node}: {node.children} children, {'ready' if node.ready else 'loading'}"
        yield Finding("workers", "ok" if node.ready else "warning", found)
        for reason in node.lacks:
            yield Finding("workers", "warning", f"{node.node} lacks {reason}")
    served = {lane for node in nodes for lane in node.lanes}
    unserved = [lane for lane in lanes(settings) if lane not in served]
    if unserved:
        fix = "start a node: imagemill worker --cpu, --gpu N or --gpus all"
        yield Finding("workers", "warning", f"{len(unserved)} lanes have no node ({unserved[0]}, ...)", fix)


def check_s3(settings: Settings) -> Iterator[Finding]:
    """Does S3 respond, and accept the configured keys?"""
    endpoint = settings.s3.endpoint_url or "AWS"
    try:
        buckets = s3.make_client(settings.s3).list_buckets().get("Buckets", [])
    except Exception as error:  # noqa: BLE001
        problem = error if isinstance(error, ConfigurationError) else s3.translate(error, endpoint)
        # Only a warning when access is denied: keys restricted to one bucket are good practice, not a fault.
        unusable = problem.retryable or isinstance(problem, ConfigurationError)
        yield Finding("s3", "failed" if unusable else "warning", problem.message, SET_S3)
    else:
        yield Finding("s3", "ok", f"{endpoint} responds; {len(buckets)} buckets")


def check_disk(_settings: Settings) -> Iterator[Finding]:
    """Is there enough space for temporary files?"""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    fix = "free some space, or set TMPDIR to a folder on a larger disk" if free < LEAST_DISK else ""
    yield Finding("disk", "warning" if fix else "ok", f"{folder} has {free / 2**30:.1f} GiB free", fix)


def check_engines(settings: Settings) -> Iterator[Finding]:
    """Can every configured engine be imported, and use its execution provider?"""
    for row in ENGINES:
        operation, engine = row.operation, row.name
        if operation not in settings.worker.operations or engine not in settings.worker.engines:
            continue
        try:
            if create(operation, engine).spec.runtime == "onnxruntime":
                from imagemill.worker.operations.remove_background.onnx_model import check_there  # needs onnxruntime

                check_there(Device.of(settings, 1))
        except ImagemillError as error:
            yield Finding("models", "failed", error.message)
        else:
            found = "installed" if models_of(engine) else "installed, needs no models"
            yield Finding("models", "ok", f"{operation} ({engine}): {found}")


def check_models(settings: Settings) -> Iterator[Finding]:
    """Do the configured engines have their models' files?"""
    for problem, fix in shortcomings(settings):
        yield Finding("models", "failed", problem, fix)
    missing_models = missing(settings)
    for engine in settings.worker.engines:
        absent = missing_models.get(engine, [])
        present = [model for model in models_of(engine) if model not in absent]
        if not present:
            continue
        yield Finding("models", "ok", f"{engine}: {', '.join(present)}")
        if absent:
            yield Finding("models", "ok", f"{engine}: not installed: {', '.join(absent)}", "imagemill models pull NAME")
        for weights in (weights for weights in WEIGHTS if weights.engine == engine and weights.name in present):
            yield from _check_file(weights, settings)


def _check_file(weights: Weights, settings: Settings) -> Iterator[Finding]:
    name, folder = weights.name, settings.weights.folder.expanduser()
    if state(folder, weights) == "damaged":
        yield Finding("models", "warning", f"{name} is not the published file", f"imagemill models pull {name}")
    if settings.onnx.int8 and weights.engine not in CONVERTED and not is_current(path_of(folder, weights), "int8"):
        fix = f"imagemill models quantize {name} --images FOLDER, or unset IMAGEMILL_ONNX__INT8"
        yield Finding("models", "warning", f"{name} has no 8-bit version, so it runs in 32 bits", fix)


def check_gpu(_settings: Settings) -> Iterator[Finding]:
    """Which GPUs does this host have?"""
    gpus = find_gpus()
    if gpus:
        yield Finding("gpu", "ok", f"{len(gpus)} GPUs")
    elif os.path.exists("/proc/driver/nvidia"):  # noqa: PTH110
        yield Finding("gpu", "warning", "the driver is loaded, but nvidia-smi lists no GPU", "run nvidia-smi")
    else:
        yield Finding("gpu", "ok", "no GPU; the opencv engines don't need one")


def check_canary(settings: Settings, wait: float) -> Iterator[Finding]:
    """Does each node of this host run a task?"""
    fleet = Fleet.of(settings)
    try:
        nodes = [node for node in fleet.nodes() if node.host == socket.gethostname()]
        if not nodes:
            yield Finding("worker", "failed", "no node is running on this host", "look at the worker's log")
        app = make_app(settings)
        for node in nodes:
            token = uuid.uuid4().hex
            (own,) = queues([node_queue(node.node)])
            app.send_task(CANARY_TASK, args=[token], queue=own, expires=wait)
            if fleet.await_canary(token, wait):
                yield Finding("worker", "ok", f"{node.node} ran a task")
            else:
                yield Finding("worker", "failed", f"{node.node} did not run a task within {wait:g} s", "restart the node")
    except ServiceUnavailable as error:
        yield Finding("worker", "failed", error.message, START_REDIS)
