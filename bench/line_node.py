"""What bench/line.py runs: a node with a stand-in for a GPU, the jobs, and py-spy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from bench import stand_in
from bench.nodes import KEYS
from bench.servers import Servers
from bench.stand_in import Batch
from imagemill.producer.client import Client
from imagemill.producer.sources import SourceRow
from imagemill.shared.connection import connect
from imagemill.shared.engines import ENGINES
from imagemill.shared.ledger.scripts import key
from imagemill.shared.messages import Job, Output
from imagemill.shared.settings import load_settings
from tests.workers import WorkerProcess, clean_environment

if stand_in.GPU_ROW not in ENGINES:
    ENGINES.append(stand_in.GPU_ROW)  # the producer checks a job's options

SPEC = Job(operation="stylize", output=Output(url="s3://results/line"), options=stand_in.StandInGpuOptions())
POLL_SECONDS = 0.25
SAMPLES = 250
"""Times per second that py-spy looks who holds the lock."""


class Node:
    """A node whose device takes batches of up to `batch` images at `rate` images per second at most.

    It has as many children as a node with a GPU and such an engine has by default.
    """

    def __init__(self, folder: Path, redis_url: str, servers: Servers, *, rate: int, batch: int) -> None:
        self.folder = folder
        self.worker = WorkerProcess(
            clean_environment(
                IMAGEMILL_REDIS_URL=redis_url,
                IMAGEMILL_S3__ENDPOINT_URL=servers.s3,
                IMAGEMILL_FETCH__ALLOW_NETWORKS='["127.0.0.0/8"]',
                IMAGEMILL_WORKER__ENGINES='["stand-in-gpu"]',
                IMAGEMILL_WORKER__OPERATIONS='["stylize"]',
                IMAGEMILL_LOG_JSON="true",
                STAND_IN_SECONDS=str(batch / rate),
                STAND_IN_BATCH=str(batch),
                STAND_IN_FOLDER=str(folder),
                **KEYS,
            ),
            folder,
            concurrency=stand_in.GPU_ROW.children,
        )
        self.worker.command = [sys.executable, "-m", "bench.stand_in", *self.worker.command[3:]]

    def settle(self) -> int:
        """Bytes of memory of the idle children, whose peaks are counted from now on."""
        self.children = self.worker.children()
        for child in self.children:
            Path(f"/proc/{child}/clear_refs").write_text("5")  # proc(5): resets VmHWM, the peak resident set size
        return sum(int(psutil.Process(child).memory_info().rss) for child in self.children)

    def peak(self) -> int:
        """The most bytes of memory that the children have used, added up."""
        lines = [line for child in self.children for line in Path(f"/proc/{child}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

    def waits(self, since: float, patience: float) -> dict[str, float]:
        """Seconds that the device waited, by cause, and was busy, as far as the node tells.

        A shift that ends after `since`, in seconds since the epoch, is awaited for as many seconds as `patience`.
        """
        end, shifts = time.monotonic() + patience, list[dict[str, Any]]()
        while not any(datetime.fromisoformat(shift["time"]).timestamp() > since for shift in shifts):
            if time.monotonic() > end:
                break
            time.sleep(POLL_SECONDS)
            lines = self.worker.log.read_text().splitlines()
            shifts = [json.loads(line) for line in lines if '"shift over"' in line]
        total = Counter[str]()
        for shift in shifts:
            total.update(shift.get("waits", {}))
            total["busy"] += shift.get("busy", 0)
        return dict(+total)


class Jobs:
    """Submits the jobs of a case and waits for them."""

    def __init__(self, redis_url: str) -> None:
        self._client, self._redis = Client(load_settings(redis_url=redis_url)), connect(redis_url)
        self._jobs: list[str] = []
        other = Job(operation="remove-background", output=SPEC.output)  # which this node does not offer
        warm_up = self._client.submit([SourceRow("list", {"source": "http://127.0.0.1/"})], other)  # imports Celery
        self._client.cancel(warm_up.job)

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._redis.close()

    def submit(self, urls: list[str]) -> None:
        """Submit a job."""
        rows = (SourceRow("list", {"source": url}) for url in urls)
        self._jobs.append(self._client.submit(rows, SPEC).job)

    def await_images(self, until: float) -> bool:
        """Wait until all images are recorded; at this time on the monotonic clock, cancel the jobs and return True."""
        for job in self._jobs:
            while True:
                status = self._client.status(job)
                assert not status.failed, f"{status.failed} images failed"
                if status.done == status.total:
                    break
                if time.monotonic() > until:
                    for other in self._jobs:
                        self._client.cancel(other)
                    return True
                time.sleep(POLL_SECONDS)
        return False

    def recorded(self) -> list[float]:
        """When each image was recorded, in order, in seconds since the epoch."""
        entries = [entry for job in self._jobs for entry in self._redis.xrange(key(job, "events"))]
        return sorted(int(place.split(b"-")[0]) / 1000 for place, fields in entries if b"i" in fields)


class Spy:
    """py-spy, which looks whether a thread of process `pid` holds the lock: in the second third of so many `seconds`."""

    def __init__(self, pid: int, seconds: float) -> None:
        self._program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        self._seconds = max(1, round(seconds / 3))
        self._pid, self._began = pid, time.monotonic() + seconds / 3
        if self._program is None:
            print("lock skipped: it needs py-spy (pip install py-spy)", file=sys.stderr)
            return
        self._folder = tempfile.TemporaryDirectory()
        record = [self._program, "record", "--gil", "--nonblocking", "--format", "raw", "--rate", str(SAMPLES)]
        record += ["--pid", str(pid), "--duration", str(self._seconds), "--output", f"{self._folder.name}/stacks"]
        wait = f"import os, time; time.sleep({seconds / 3}); os.execv({self._program!r}, {record!r})"
        self._process = subprocess.Popen([sys.executable, "-c", wait], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def lock(self, batches: Sequence[Batch]) -> float | None:
        """Milliseconds that threads of the process held the lock per image that it computed meanwhile; None without py-spy."""
        if self._program is None:
            return None
        assert self._process.wait() == 0, "py-spy failed"
        lines = Path(self._folder.name, "stacks").read_text().splitlines()
        self._folder.cleanup()
        held = sum(int(line.rsplit(" ", 1)[1]) for line in lines) / SAMPLES
        images = sum(
            batch.images for batch in batches if batch.child == self._pid and 0 <= batch.ended - self._began <= self._seconds
        )
        return 1000 * held / images
