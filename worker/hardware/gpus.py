"""The GPUs of this host, as `nvidia-smi` lists them: a node's parent must not create a CUDA context."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.hardware.device import visible_gpu, visible_gpus

LISTED = re.compile(r"^GPU \d+: .*\(UUID: ([^)]+)\)")
SECONDS = 60.0


def listed() -> list[str] | None:
    """The UUIDs of all GPUs of this host; None without a working `nvidia-smi`."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=SECONDS, check=True)  # noqa: S607
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    return [match[1] if (match := LISTED.match(line)) else line.partition(":")[0] for line in lines]


def visible() -> list[str]:
    """The UUIDs of the GPUs that nodes may use: those in CUDA_VISIBLE_DEVICES if set. Those that are missing are left out."""
    return [uuid for uuid in _seats(listed() or []) if uuid]


def _seats(uuids: list[str]) -> Iterator[str | None]:
    """For each index that an operator may give, the GPU's UUID; None if the mask names a GPU that is not there."""
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None:
        yield from uuids
        return
    for name in visible_gpus(mask):
        if name.startswith("MIG-"):  # part of a GPU
            yield name
        elif name.isdecimal():
            yield uuids[int(name)] if int(name) < len(uuids) else None
        else:
            yield next((uuid for uuid in uuids if uuid.startswith(name)), None)


def gpu_of(gpu: int) -> str | None:
    """The UUID of the GPU with this index; None if it is not known."""
    seats = list(_seats(listed() or []))
    return seats[gpu] if gpu < len(seats) else None


def no_such_gpu(gpu: int) -> str | None:
    """Why this process can't have the GPU with this index; None if the GPU may be there."""
    try:
        visible_gpu(gpu, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except ConfigurationError as error:
        return error.message
    uuids, fix = listed(), "check the driver with `nvidia-smi -L`, or use --cpu"
    if uuids is None:
        # A container may have a GPU and no nvidia-smi; /dev/dxg is that of Windows.
        there = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
        return None if there else f"GPU {gpu} does not exist: this host has no NVIDIA driver, or this container no GPU; {fix}"
    seats = list(_seats(uuids))
    if gpu < len(seats) and seats[gpu]:
        return None
    return f"GPU {gpu} does not exist: nvidia-smi lists {len(uuids)} GPUs; {fix}"
