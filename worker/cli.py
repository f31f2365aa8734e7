"""The `imagemill worker` command."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from celery.utils.nodenames import host_format

from imagemill.shared.errors import ConfigurationError, ImagemillError, UsageError
from imagemill.shared.log_fields import describe_process
from imagemill.shared.options.base import OPERATIONS, nearest
from imagemill.shared.settings import Settings, load_settings
from imagemill.worker.hardware.device import share_of_cores, visible_gpu
from imagemill.worker.main import Worker
from imagemill.worker.node import logs
from imagemill.worker.node.host_gpus import HostReport
from imagemill.worker.node.offer import children_per_gpu
from imagemill.worker.node.parting import die_with_supervisor
from imagemill.worker.node.supervisor import Supervisor, find_gpus

log = logging.getLogger(__name__)


@click.command()
@click.option("--gpu", metavar="N", type=click.IntRange(min=0), help="Run one node on this GPU.")
@click.option("--gpus", type=click.Choice(["all"]), help="Run one node on each GPU of this host, and restart nodes that die.")
@click.option("--cpu", is_flag=True, help="Run one node on the CPU.")
@click.option(
    "--concurrency",
    metavar="N",
    type=click.IntRange(min=1),
    help="Child processes of each node; default: one per core, or on a GPU 2, or 1 if the node offers stylize with diffusion.",
)
@click.option("--operations", metavar="LIST", help="Operations to offer, separated by commas; default: all.")
@click.option(
    "--name", metavar="NAME", help="The node's name; default: gpuN@host or cpu@host. If it is in use, a number is added."
)
@click.option(
    "--metrics",
    metavar="PORT",
    type=click.IntRange(1, 65535),
    help="Serve metrics to Prometheus on this port; with --gpus, GPU N gets PORT + N.",
)
@click.option("--metrics-host", metavar="HOST", help="Address for --metrics; default: 127.0.0.1.")
def worker(
    gpu: int | None,
    gpus: str | None,
    cpu: bool,
    concurrency: int | None,
    operations: str | None,
    name: str | None,
    metrics: int | None,
    metrics_host: str | None,
) -> None:
    """Run a worker node: one GPU, all GPUs of this host, or the CPU."""
    logs.early()
    with _told_in_the_log():
        _check(gpu, gpus, cpu, name)
        settings = _settings(gpu, concurrency, operations, metrics, metrics_host)
        logs.set_up(as_json=settings.log_json, level=settings.log_level)
        sys.exit(_run(settings, gpus, concurrency, operations, name))


@contextmanager
def _told_in_the_log() -> Iterator[None]:
    """Where lines are JSON, an error that ends the command is one too."""
    try:
        yield
    except ImagemillError as error:
        if not logs.as_json():
            raise
        log.critical("the node can't start", extra={"action": "start", "code": error.code, "reason": error.message})
        sys.exit(error.exit_code)


def _check(gpu: int | None, gpus: str | None, cpu: bool, name: str | None) -> None:
    if sum((gpu is not None, gpus is not None, cpu)) != 1:
        raise UsageError("choose a device: --gpu N, --gpus all or --cpu")
    if name is not None and gpus:
        raise UsageError("--name requires a single node; --gpus all names its nodes gpu0, gpu1 and so on")


def _run(settings: Settings, gpus: str | None, concurrency: int | None, operations: str | None, name: str | None) -> int:
    gpu = settings.worker.gpu
    if gpus:
        if not find_gpus() and not settings.worker.expect_gpus:  # if some are expected, they may come
            raise ConfigurationError("no GPU found; check the driver with `nvidia-smi -L`, or use --cpu")
        with HostReport(settings) as report:
            return Supervisor(lambda n: _arguments(n, operations, settings), report.count).run()
    die_with_supervisor()
    if gpu is None:
        node, children = name or "cpu", concurrency or share_of_cores(1)
    else:
        visible_gpu(gpu, os.environ.get("CUDA_VISIBLE_DEVICES"))  # fails now rather than in the child
        node, children = name or f"gpu{gpu}", children_per_gpu(settings)
    full = host_format(node if "@" in node else f"{node}@%h")
    describe_process(node=full, gpu=gpu)
    return Worker(settings).run(name=full, concurrency=children)


def _arguments(gpu: int, operations: str | None, settings: Settings) -> list[str]:
    """The arguments of one of the nodes of `--gpus all`."""
    arguments = ["worker", "--gpu", str(gpu)]
    if settings.worker.children_per_gpu is not None:
        arguments += ["--concurrency", str(settings.worker.children_per_gpu)]
    if operations:
        arguments += ["--operations", operations]
    if settings.worker.metrics_port is not None:
        arguments += ["--metrics", str(settings.worker.metrics_port + gpu), "--metrics-host", settings.worker.metrics_host]
    return arguments


def _settings(
    gpu: int | None, concurrency: int | None, operations: str | None, metrics: int | None, metrics_host: str | None
) -> Settings:
    settings = load_settings()
    changes: dict[str, Any] = {"gpu": gpu}  # --cpu sets None, which overrides IMAGEMILL_WORKER__GPU
    if concurrency is not None:
        changes["children_per_gpu"] = concurrency
    if metrics is not None:
        changes["metrics_port"] = metrics
    if metrics_host is not None:
        changes["metrics_host"] = metrics_host
    if operations is not None:
        names = [part.strip() for part in operations.split(",") if part.strip()]
        if not names:
            raise UsageError(f"--operations is empty (valid: {', '.join(OPERATIONS)})")
        for name in names:
            if name not in OPERATIONS:
                raise UsageError(f"unknown operation {name!r}{nearest(name, list(OPERATIONS))}")
        changes["operations"] = tuple(names)
    return settings.model_copy(update={"worker": settings.worker.model_copy(update=changes)})
