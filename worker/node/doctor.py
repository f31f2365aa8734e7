"""`imagemill doctor`: what is wrong with Redis, S3, the disk, the engines or the GPU, and how to mend it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import click
import redis
from rich.console import Console

from imagemill.shared import s3
from imagemill.shared.broker import make_app, queues
from imagemill.shared.errors import ConfigurationError, ImagemillError, ServiceUnavailable, sentence
from imagemill.shared.fleet import Fleet
from imagemill.shared.queues import CANARY_TASK, node_queue, offered, worker_queues
from imagemill.shared.settings import Settings, load_settings
from imagemill.worker.hardware.device import Device
from imagemill.worker.models.catalogue import CONVERTED, WEIGHTS
from imagemill.worker.models.files import model_file, path_of, state, variant
from imagemill.worker.node.offer import lanes, missing, models_of, shortcomings
from imagemill.worker.node.supervisor import find_gpus
from imagemill.worker.operations.registry import create

LEAST_DISK = 2 * 2**30
"""Bytes that the temporary folder should have free: a manifest, and uploads on their way."""


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, how it is, and how to mend it where it isn't well."""

    check: str
    state: Literal["ok", "warning", "failed"]
    found: str
    mend: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object per finding.")
@click.option("--worker", "canary", is_flag=True, help="Only ask this host's nodes to run a canary task; exit 0 if all did.")
@click.option(
    "--wait", default=90.0, show_default=True, help="Seconds that a canary may take; a busy child finishes its chunk first."
)
def doctor(as_json: bool, canary: bool, wait: float) -> None:
    """Check Redis, S3, disk, engines and GPU, and say how to mend what is wrong."""
    settings = load_settings()
    checks = (check_canary(settings, wait),) if canary else tuple(check(settings) for check in CHECKS)
    console = Console()
    worst = 0
    for finding in (finding for check in checks for finding in check):
        if as_json:
            click.echo(json.dumps(asdict(finding)))
        else:
            colour = {"ok": "green", "warning": "yellow", "failed": "red"}[finding.state]
            console.print(f"[{colour}]{finding.state:<8}[/] [bold]{finding.check}[/]: ", end="")
            console.print(finding.found, markup=False)
            if finding.mend:
                console.print(f"         mend: {finding.mend}", markup=False)
        if finding.state == "failed":
            worst = max(worst, 3 if finding.check in ("redis", "s3", "worker") else 2)
    sys.exit(worst)


def check_redis(settings: Settings) -> Iterator[Finding]:
    """Does Redis answer, keep what it is told, and refuse rather than forget when it is full?"""
    url = settings.redis_url.get_secret_value()
    try:
        with redis.Redis.from_url(url, socket_connect_timeout=5, socket_timeout=5) as client:
            info: Any = client.info()
    except redis.RedisError as error:
        yield Finding("redis", "failed", sentence(error), "start Redis, or set IMAGEMILL_REDIS_URL to where it is")
        return
    yield Finding("redis", "ok", f"version {info['redis_version']}, {info['used_memory_human']} used")
    if not info.get("aof_enabled"):
        yield Finding("redis", "warning", "no append-only file: a restart forgets all jobs", "start it with --appendonly yes")
    if info.get("maxmemory_policy") != "noeviction":
        yield Finding("redis", "warning", "it may evict jobs when it is full", "start it with --maxmemory-policy noeviction")


def check_workers(settings: Settings) -> Iterator[Finding]:
    """Is every queue listened to?"""
    try:
        nodes = Fleet.of(settings).nodes()
    except ServiceUnavailable:
        return  # said by check_redis
    for node in nodes:
        state: Literal["ok", "warning"] = "ok" if node.ready else "warning"
        yield Finding("workers", state, f"{node.node}: {node.children} children, {'ready' if node.ready else 'loading'}")
    heard = {queue for node in nodes for queue in node.queues}
    silent = [queue for queue in worker_queues(settings.worker.operations, lanes(settings)) if queue not in heard]
    if silent:
        mend = "start a node: imagemill worker --cpu, --gpu N or --gpus all"
        yield Finding("workers", "warning", f"no node listens to {len(silent)} of the queues ({silent[0]}, ...)", mend)


def check_s3(settings: Settings) -> Iterator[Finding]:
    """Does S3 answer, and take our keys?"""
    where = settings.s3.endpoint_url or "AWS"
    try:
        buckets = s3.make_client(settings.s3).list_buckets().get("Buckets", [])
    except Exception as error:  # noqa: BLE001
        refused = error if isinstance(error, ConfigurationError) else s3.translate(error, where)
        mend = "set IMAGEMILL_S3__ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; not needed for file:// outputs"
        # Keys that may only write to their own bucket are a good practice, not a fault.
        hopeless = refused.retryable or isinstance(refused, ConfigurationError)
        yield Finding("s3", "failed" if hopeless else "warning", refused.message, mend)
    else:
        yield Finding("s3", "ok", f"{where} answers; {len(buckets)} buckets")


def check_disk(_settings: Settings) -> Iterator[Finding]:
    """Is there room for temporary files?"""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < LEAST_DISK:
        mend = "free some space, or set TMPDIR to a larger disk"
        yield Finding("disk", "warning", f"{folder} has {free / 2**30:.1f} GiB free", mend)
    else:
        yield Finding("disk", "ok", f"{folder} has {free / 2**30:.0f} GiB free")


def check_engines(settings: Settings) -> Iterator[Finding]:
    """Can every engine that this host should offer be imported, and use what it is to run on?"""
    for operation, engine in offered(settings.worker.operations, settings.worker.engines):
        try:
            if create(operation, engine).spec.runtime == "onnxruntime":
                from imagemill.worker.operations.remove_background.onnx_model import check_there  # importable now

                check_there(Device.of(settings, 1))
        except ImagemillError as error:
            yield Finding("models", "failed", error.message)
        else:
            needs = "installed" if models_of(engine) else "needs no weights"
            yield Finding("models", "ok", f"{operation} ({engine}): {needs}")


def check_models(settings: Settings) -> Iterator[Finding]:
    """Are the models' files here that the engines need?"""
    for found, mend in shortcomings(settings):
        yield Finding("models", "failed", found, mend)
    absent = missing(settings)
    for engine in settings.worker.engines:
        here = [model for model in models_of(engine) if model not in absent.get(engine, [])]
        if not here:
            continue
        yield Finding("models", "ok", f"{engine}: {', '.join(here)}")
        if engine in absent:
            names = ", ".join(absent[engine])
            yield Finding("models", "ok", f"{engine}: not here, so not listened for: {names}", "imagemill models pull NAME")
        for weights in (weights for weights in WEIGHTS if weights.name in here):
            if state(weights, settings.weights) == "damaged":
                mend = f"imagemill models pull {weights.name}"
                yield Finding("models", "warning", f"{weights.name} is not the published file", mend)
        in_8_bits = settings.onnx.int8 and engine not in CONVERTED
        for weights in (weights for weights in WEIGHTS if in_8_bits and weights.name in here):
            original = path_of(weights, settings.weights)
            if model_file(original.parents[1], engine, weights.name, int8=True) != variant(original, "int8"):
                mend = f"imagemill models quantize {weights.name} --images FOLDER, or leave out IMAGEMILL_ONNX__INT8"
                yield Finding("models", "warning", f"{weights.name} is not here in 8 bits, and runs in 32", mend)


def check_gpu(_settings: Settings) -> Iterator[Finding]:
    """Which GPUs are there?"""
    gpus = find_gpus()
    if gpus:
        yield Finding("gpu", "ok", f"{len(gpus)} GPUs")
    elif os.path.exists("/proc/driver/nvidia"):  # noqa: PTH110
        yield Finding("gpu", "warning", "a driver is loaded, but nvidia-smi lists no GPU", "see what `nvidia-smi` says")
    else:
        yield Finding("gpu", "ok", "none; the opencv engines need none")


def check_canary(settings: Settings, wait: float) -> Iterator[Finding]:
    """Does a child of each node on this host run a task and answer?"""
    fleet = Fleet.of(settings)
    try:
        here = [node for node in fleet.nodes() if node.host == socket.gethostname()]
        if not here:
            yield Finding("worker", "failed", "no node of this host reports itself", "look at the worker's log")
        app = make_app(settings)
        for node in here:
            token = uuid.uuid4().hex
            (own,) = queues([node_queue(node.node)])
            app.send_task(CANARY_TASK, args=[token], queue=own, expires=wait)
            if fleet.await_canary(token, wait):
                yield Finding("worker", "ok", f"{node.node} ran a task")
            else:
                yield Finding("worker", "failed", f"{node.node} ran no task within {wait:g} s", "restart the node")
    except ServiceUnavailable as error:
        yield Finding("worker", "failed", error.message, "start Redis, or set IMAGEMILL_REDIS_URL to where it is")


CHECKS: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
    check_redis,
    check_workers,
    check_s3,
    check_disk,
    check_engines,
    check_models,
    check_gpu,
)
