"""The `imagemill worker` command."""

from __future__ import annotations

import logging
import os
import sys
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
from imagemill.worker.node.supervisor import Supervisor, find_gpus

log = logging.getLogger(__name__)


@click.command()
@click.option("--gpu", metavar="N", type=click.IntRange(min=0), help="Run one node on this GPU.")
@click.option("--gpus", type=click.Choice(["all"]), help="Run one node per GPU of this host, and restart nodes that die.")
@click.option("--cpu", is_flag=True, help="Run one node on the CPU.")
@click.option(
    "--concurrency", metavar="N", type=click.IntRange(min=1), help="Child processes of a CPU node; default: one per core."
)
@click.option("--operations", metavar="LIST", help="Operations to offer, separated by commas; default: all.")
@click.option(
    "--name", metavar="NAME", help="The node's name; default: gpuN@host or cpu@host. A number is added if it is in use."
)
def worker(
    gpu: int | None, gpus: str | None, cpu: bool, concurrency: int | None, operations: str | None, name: str | None
) -> None:
    """Run a worker node: one GPU, all GPUs of this host, or the CPU."""
    logs.early()
    try:
        sys.exit(_run(gpu, gpus, cpu, concurrency, operations, name))
    except ImagemillError as error:
        if not logs.as_json():
            raise
        log.critical("the node can't start", extra={"action": "start", "code": error.code, "reason": error.message})
        sys.exit(error.exit_code)


def _run(
    gpu: int | None, gpus: str | None, cpu: bool, concurrency: int | None, operations: str | None, name: str | None
) -> int:
    if sum((gpu is not None, gpus is not None, cpu)) != 1:
        raise UsageError("choose a device: --gpu N, --gpus all or --cpu")
    if concurrency is not None and not cpu:
        raise UsageError("--concurrency requires --cpu; a GPU node has one child")
    if name is not None and gpus:
        raise UsageError("--name requires a single node; --gpus all names its nodes gpu0, gpu1 and so on")
    settings = _settings(gpu, operations)
    logs.set_up(as_json=settings.log_json, level=settings.log_level)
    if gpus:
        gpus_found = find_gpus()
        if not gpus_found:
            raise ConfigurationError("no GPU found; check the driver with `nvidia-smi -L`, or use --cpu")
        extra = ["--operations", operations] if operations else []
        return Supervisor({f"gpu{n}": ["worker", "--gpu", str(n), *extra] for n in gpus_found}).run()
    if gpu is None:
        node, children = name or "cpu", concurrency or share_of_cores(1)
    else:
        visible_gpu(gpu, os.environ.get("CUDA_VISIBLE_DEVICES"))  # fails now rather than in the child
        node, children = name or f"gpu{gpu}", 1
    full = host_format(node if "@" in node else f"{node}@%h")
    describe_process(node=full, gpu=gpu)
    return Worker(settings).run(name=full, concurrency=children)


def _settings(gpu: int | None, operations: str | None) -> Settings:
    settings = load_settings()
    changes: dict[str, Any] = {"gpu": gpu}  # --cpu sets None, which overrides IMAGEMILL_WORKER__GPU
    if operations is not None:
        names = [part.strip() for part in operations.split(",") if part.strip()]
        if not names:
            raise UsageError(f"--operations is empty (valid: {', '.join(OPERATIONS)})")
        for name in names:
            if name not in OPERATIONS:
                raise UsageError(f"unknown operation {name!r}{nearest(name, list(OPERATIONS))}")
        changes["operations"] = tuple(names)
    return settings.model_copy(update={"worker": settings.worker.model_copy(update=changes)})
