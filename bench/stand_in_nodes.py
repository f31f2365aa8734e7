"""A fleet of real nodes with stand-in devices (bench/stand_in.py), on a Redis and in folders of its own.

with StandInNodes() as fleet:
    fleet.start([10.0] * 8)          # images per second of each node
    job = fleet.submit(2000)
    fleet.await_end(job)
    fleet.arrivals(job)              # when each result was recorded, in seconds since the submission

Images are 8 x 8 pixels, so that many nodes fit on few cores; `Cores` tells whether they did.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from bench import stand_in
from bench.figures import Measured
from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from imagemill.shared.connection import connect
from imagemill.shared.engines import ENGINES
from imagemill.shared.ledger.scripts import key
from imagemill.shared.messages import Job, JobStatus, Output, Policy
from imagemill.shared.quality import Quality
from imagemill.shared.settings import load_settings
from tests.workers import WorkerProcess, clean_environment, wait_until

if stand_in.ROW not in ENGINES:
    ENGINES.append(stand_in.ROW)  # the producer checks a job's options

START_SECONDS = 120.0
END_SECONDS = 600.0


class StandInNodes:
    """Starts a Redis on entry; on exit, kills its nodes and the Redis. `settings` are environment variables of the nodes."""

    def __init__(self, **settings: str) -> None:
        self._settings = settings
        self.nodes: list[WorkerProcess] = []

    def __enter__(self) -> StandInNodes:
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self._server = EmbeddedRedis(self.folder / "redis")
        url = self._server.start()
        for name in ("devices", "out"):
            (self.folder / name).mkdir()
        self._source = self.folder / "image.png"
        self._source.write_bytes(_tiny_png())
        self.redis: Any = connect(url)
        self.client = Client(load_settings(redis_url=url))
        self._environment = clean_environment(
            IMAGEMILL_REDIS_URL=url,
            IMAGEMILL_FILES__READ_ROOTS=json.dumps([str(self.folder)]),
            IMAGEMILL_FILES__WRITE_ROOTS=json.dumps([str(self.folder)]),
            IMAGEMILL_WORKER__ENGINES='["stand-in"]',
            IMAGEMILL_WORKER__OPERATIONS='["stylize"]',
            IMAGEMILL_WORKER__REUSE="false",
            STAND_IN_FOLDER=str(self.folder / "devices"),
            **self._settings,
        )
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            self.kill(node)
            node.fleet.close()
        self.client.close()
        self.redis.close()
        self._server.kill()
        self._folder.cleanup()

    # --- nodes ----------------------------------------------------------------------------------

    def start(self, speeds: Sequence[float]) -> list[WorkerProcess]:
        """Start a node for each of these speeds, in images per second, and wait until all are ready."""
        started = []
        for speed in speeds:
            environment = {**self._environment, "STAND_IN_SECONDS": str(1 / speed)}
            node = WorkerProcess(environment, self.folder, name=f"node{len(self.nodes)}")
            node.command = [sys.executable, "-m", "bench.stand_in", *node.command[3:]]
            self.nodes.append(node)
            node.start()
            started.append(node)
        for node in started:
            node.wait_ready(START_SECONDS)
        return started

    def kill(self, node: WorkerProcess) -> None:
        """Send SIGKILL to a node and its children, as if its host had lost power."""
        if node.process.poll() is None:
            os.killpg(node.process.pid, signal.SIGKILL)  # it is a session of its own
            node.process.wait()

    def on_devices(self) -> int:
        """How many images are on a device now."""
        return sum(int(note.read_text()) for note in (self.folder / "devices").iterdir() if note.suffix != ".new")

    # --- jobs -----------------------------------------------------------------------------------

    def submit(self, images: int, **policy: Any) -> str:
        """Submit a job of so many images, and return its id."""
        spec = Job(
            operation="stylize",
            options=stand_in.StandInOptions(),
            output=Output(url=(self.folder / "out").as_uri()),
            policy=Policy(reuse=False, quality=Quality(mode="off"), **policy),
        )
        url = self._source.as_uri()  # the same for all; with a name of its own, a row is no duplicate
        rows = (SourceRow("list", {"source": url, "name": str(number)}) for number in range(images))
        return self.client.submit(rows, spec).job

    def await_end(self, *jobs: str) -> None:
        """Wait until these jobs are over; all images must be done."""
        for job in jobs:
            self._await(job, lambda status: status.over, "the end")
            status = self.client.status(job)
            assert status.done == status.total, status

    def await_done(self, job: str, images: int) -> None:
        """Wait until so many images of a job are done."""
        self._await(job, lambda status: status.done >= images, f"{images} images done")

    def _await(self, job: str, condition: Callable[[JobStatus], bool], what: str) -> None:
        # Not with `Client.watch`: to read each result as it comes would take as much CPU as a node.
        wait_until(lambda: condition(self.client.status(job)), f"job {job}: {what}", END_SECONDS)

    def recorded_at(self, job: str) -> list[float]:
        """When each result was recorded, in seconds since the epoch by Redis' clock."""
        events = self.redis.xrange(key(job, "events"))
        return [int(place.split(b"-")[0]) / 1000 for place, fields in events if b"i" in fields]

    def arrivals(self, job: str) -> list[float]:
        """When each result was recorded, in seconds since the submission began."""
        created = self.client.status(job).created
        return [recorded - created for recorded in self.recorded_at(job)]

    def leased(self, job: str) -> int:
        """How many images of a job workers hold."""
        return sum(json.loads(share)["images"] for share in self.redis.hvals(key(job, "shares")))

    def now(self) -> float:
        """Seconds since the epoch by Redis' clock."""
        seconds, micros = self.redis.time()
        return float(seconds + micros / 1e6)

    def scripts_run(self) -> int:
        """How many times any client has called a script of the ledger."""
        return int(self.redis.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])


class Cores:
    """How busy all cores of this machine were since this was made, with all that runs on it."""

    def __init__(self) -> None:
        self._before = psutil.cpu_times()

    def measured(self, row: str) -> Measured:
        """The figure for the table; well below 100 %, the machine was not the limit."""
        spent = [after - before for after, before in zip(psutil.cpu_times(), self._before, strict=True)]
        named = dict(zip(self._before._fields, spent, strict=True))
        total = sum(named[name] for name in ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"))
        return Measured(f"{row}: cores in use", 100 * (1 - (named["idle"] + named["iowait"]) / total), "%")


def _tiny_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 120, 150)).save(file, "PNG")
    return file.getvalue()
