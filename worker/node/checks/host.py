"""Checks of this host: its disks and shared memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from imagemill.shared.errors import ImagemillError
from imagemill.shared.settings import Settings
from imagemill.shared.urls import path_of
from imagemill.worker.node.checks.finding import Finding

LEAST_DISK = 2 * 2**30
"""Free bytes that a folder should have, for manifests, pending uploads, models and results."""
LEAST_FILES = 10_000
"""Files that it should have room for."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
LEAST_SHARED = 8 * 2**20
"""Free bytes that it should have.

A node and its children use it for semaphores and a few counters only, a page of 4 KiB each: 48 KiB with 8 children. Images
and models are not kept there, because every child works alone, so Docker's 64 MB are ample. Without any space a node can't
start.
"""


def check_disk(settings: Settings) -> Iterator[Finding]:
    """Is there space for temporary files, models and results?"""
    folders = {Path(tempfile.gettempdir()): "set TMPDIR to a folder on a larger disk"}
    weights = settings.weights.folder.expanduser()
    if os.access(_existing(weights), os.W_OK):  # otherwise somebody else puts the models there
        folders[weights] = "set IMAGEMILL_WEIGHTS__FOLDER to one"
    folders |= dict.fromkeys(settings.files.write_roots, "write elsewhere: IMAGEMILL_FILES__WRITE_ROOTS")
    for folder, otherwise in folders.items():
        if folder in settings.files.write_roots and not os.access(folder, os.W_OK):
            what = "can't be written to by this user" if folder.is_dir() else "is not a folder"
            yield Finding("disk", "failed", f"{folder} {what}", f"mkdir -p {folder} && chown $(id -u) {folder}")
            continue
        disk = os.statvfs(_existing(folder))
        free, few = disk.f_bavail * disk.f_frsize, disk.f_files > 0 and disk.f_favail < LEAST_FILES
        left = f"{_size(free)} free" + (f" and room for {disk.f_favail} files" if few else "")
        low = free < LEAST_DISK or few
        fix = f"free some space, or {otherwise}; du -xh {_existing(folder)} | sort -h | tail shows what is large" if low else ""
        yield Finding("disk", "warning" if fix else "ok", f"{folder} has {left}", fix)


def check_folders(settings: Settings, outputs: Iterable[str]) -> Iterator[Finding]:
    """Can results be written to the folders among the outputs given by the operator?"""
    from imagemill.worker.transfer.store import FolderStore  # needs packages of the extra `worker`

    for url in (url for url in outputs if urlsplit(url).scheme == "file"):
        try:
            FolderStore(url, settings.files).check_now()
        except ImagemillError as error:
            fix = f"list it or one of its parents: IMAGEMILL_FILES__WRITE_ROOTS='[\"{path_of(url)}\"]'"
            yield Finding("disk", "failed", error.message, fix)
        else:
            yield Finding("disk", "ok", f"{url} is a folder that results may be written to")


def check_shared_memory(_settings: Settings) -> Iterator[Finding]:
    """Is there room for the semaphores of a node and its children?"""
    if not SHARED_MEMORY.is_dir():
        return  # not Linux
    disk: Any = os.statvfs(SHARED_MEMORY)
    free = disk.f_bavail * disk.f_frsize
    if not os.access(SHARED_MEMORY, os.W_OK):
        found = f"{SHARED_MEMORY} can't be written to, and nodes keep their semaphores there"
        yield Finding("memory", "failed", found, f"mount -t tmpfs -o size=64m,mode=1777 tmpfs {SHARED_MEMORY}")
    elif free < LEAST_SHARED:
        found = f"{SHARED_MEMORY} has {_size(free)} free, and nodes keep their semaphores there"
        fix = "docker run --shm-size 64m, in compose shm_size: 64m; or delete what others left there: ls -l /dev/shm"
        yield Finding("memory", "warning", found, fix)
    else:
        yield Finding("memory", "ok", f"{SHARED_MEMORY} has {_size(free)} free")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
