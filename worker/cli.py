"""The `imagemill worker` command."""

from __future__ import annotations

import sys
from typing import Any

import click

from imagemill.shared.errors import ConfigurationError, UsageError
from imagemill.shared.options.base import OPERATIONS, nearest
from imagemill.shared.settings import Settings, load_settings
from imagemill.worker.hardware.device import share_of_cores
from imagemill.worker.main import Worker
from imagemill.worker.node import logs
from imagemill.worker.node.supervisor import Supervisor, find_gpus


@click.command()
@click.option("--gpu", metavar="N", type=click.IntRange(min=0), help="Run one node on this GPU.")
@click.option("--gpus", type=click.Choice(["all"]), help="Run one node per GPU of this host, and restart what dies.")
@click.option("--cpu", is_flag=True, help="Run one node on the CPU.")
@click.option("--concurrency", metavar="N", type=click.IntRange(min=1), help="Children of a CPU node; default: one per core.")
@click.option("--operations", metavar="LIST", help="Operations to offer, joined by commas; default: all.")
@click.option("--name", metavar="NAME", help="The node's name; default: gpuN@host or cpu@host.")
def worker(
    gpu: int | None, gpus: str | None, cpu: bool, concurrency: int | None, operations: str | None, name: str | None
) -> None:
    """Run a worker node: one GPU, all GPUs of this host, or the CPU."""
    if sum((gpu is not None, gpus is not None, cpu)) != 1:
        raise UsageError("say where to run: --gpu N, --gpus all or --cpu")
    if concurrency is not None and not cpu:
        raise UsageError("--concurrency goes with --cpu; a GPU's node has one child")
    if name is not None and gpus:
        raise UsageError("--name goes with one node; those of --gpus all are gpu0, gpu1 and so on")
    settings = _settings(gpu, operations)
    if gpus:
        logs.set_up(as_json=settings.log_json)
        found = find_gpus()
        if not found:
            raise ConfigurationError("no GPU was found: is the driver installed? (`nvidia-smi -L` lists them)")
        extra = ["--operations", operations] if operations else []
        sys.exit(Supervisor({f"gpu{n}": ["worker", "--gpu", str(n), *extra] for n in found}).run())
    where = "cpu" if gpu is None else f"gpu{gpu}"
    node = name or f"{where}@%h"
    sys.exit(
        Worker(settings).run(
            name=node if "@" in node else f"{node}@%h", concurrency=1 if gpu is not None else concurrency or share_of_cores(1)
        )
    )


def _settings(gpu: int | None, operations: str | None) -> Settings:
    settings = load_settings()
    changes: dict[str, Any] = {"gpu": gpu}  # None too: --cpu is the CPU, whatever the environment says
    if operations is not None:
        wanted = [part.strip() for part in operations.split(",") if part.strip()]
        if not wanted:
            raise UsageError(f"--operations names none (valid: {', '.join(OPERATIONS)})")
        for one in wanted:
            if one not in OPERATIONS:
                raise UsageError(f"there is no operation {one!r}{nearest(one, list(OPERATIONS))}")
        changes["operations"] = tuple(wanted)
    return settings.model_copy(update={"worker": settings.worker.model_copy(update=changes)})
