"""Real worker processes, ours and the tutorial's, and how long each takes for a list of photos."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from bench.servers import Servers
from imagemill.producer.client import Client
from imagemill.producer.sources import SourceRow
from imagemill.shared.messages import Job, Output
from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.shared.settings import load_settings
from imagemill.worker.node.parting import STARTER
from tests.workers import ROOT, WorkerProcess, clean_environment, wait_until

SPEC = Job(
    operation="remove-background",
    output=Output(url="s3://results/cut", format="png"),
    options=RembgRemoveBackground(model="u2net"),
)
KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench"}


def environment(redis_url: str, servers: Servers, weights: Path, **more: str) -> dict[str, str]:
    """Environment variables of a node that has only the rembg engine, with u2net in `weights`, and may fetch from loopback."""
    return clean_environment(
        IMAGEMILL_REDIS_URL=redis_url,
        IMAGEMILL_S3__ENDPOINT_URL=servers.s3,
        IMAGEMILL_FETCH__ALLOW_HOSTS='["127.0.0.1"]',
        IMAGEMILL_WEIGHTS__FOLDER=str(weights),
        IMAGEMILL_WORKER__ENGINES='["rembg"]',
        IMAGEMILL_WORKER__OPERATIONS='["remove-background"]',
        **KEYS,
        **more,
    )


class Jobs:
    """Submits jobs on one Redis, and waits for them."""

    def __init__(self, redis_url: str, spec: Job = SPEC) -> None:
        self.spec, self.client = spec, Client(load_settings(redis_url=redis_url))

    def submit(self, urls: list[str]) -> str:
        """Submit a job and return its id."""
        rows = (SourceRow(f"row {number}", {"source": url}) for number, url in enumerate(urls))
        return self.client.submit(rows, self.spec).job

    def await_images(self, job: str) -> dict[str, float]:
        """Wait until the last image is recorded; return the mean seconds of each stage."""
        rows = []
        for status, new in self.client.watch(job):
            rows += new
            if status.done + status.failed == status.total:
                break
        failed = [row for row in rows if row.state == "failed"]
        assert not failed, f"{len(failed)} images failed: {failed[0].code}: {failed[0].message}"
        stages = {stage for row in rows for stage in row.seconds}
        return {stage: sum(row.seconds.get(stage, 0.0) for row in rows) / len(rows) for stage in sorted(stages)}

    def await_end(self, job: str) -> None:
        """Wait until the job is over and its manifest written."""
        assert self.client.wait(job, 60).over


class OurNode:
    """`imagemill worker --cpu` with so many children."""

    def __init__(self, environment: dict[str, str], folder: Path, spec: Job = SPEC, children: int = 1) -> None:
        self._worker = WorkerProcess(environment, folder, name=f"ours-{folder.name}", concurrency=children)
        self.jobs = Jobs(environment["IMAGEMILL_REDIS_URL"], spec)
        self.stages: dict[str, float] = {}

    def __enter__(self) -> OurNode:
        self._worker.start()
        self._worker.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.stop()

    def seconds(self, urls: list[str]) -> float:
        """Time from submission until the last image is recorded."""
        start = time.perf_counter()
        job = self.jobs.submit(urls)
        self.stages = self.jobs.await_images(job)
        spent = time.perf_counter() - start
        self.jobs.await_end(job)
        return spent

    def cpu(self) -> float:
        """CPU seconds that the node's processes have used so far."""
        return cpu_of(self._worker.process.pid)

    def peak_memory(self) -> int:
        """The most bytes of memory that each child has used, added up."""
        lines = [line for child in self._worker.children() for line in Path(f"/proc/{child}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


class TutorialNode:
    """`celery worker --concurrency 1` on bench/tutorial.py."""

    def __init__(self, redis_url: str, servers: Servers, model: Path, folder: Path) -> None:
        home = folder / "rembg"
        home.mkdir()
        (home / "u2net.onnx").symlink_to(model)
        self._environment = clean_environment(
            TUTORIAL_REDIS=redis_url, TUTORIAL_S3=servers.s3, U2NET_HOME=str(home), MODEL_CHECKSUM_DISABLED="1", **KEYS
        )
        self._environment[STARTER] = str(os.getpid())
        self._log, self._keys = folder / "tutorial.log", itertools.count()
        self._redis_url = redis_url

    def __enter__(self) -> TutorialNode:
        command = [sys.executable, "-m", "celery", "-A", "bench.tutorial", "worker", "--concurrency", "1"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--loglevel", "WARNING"], env=self._environment, cwd=ROOT, stdout=log, stderr=log
            )
        from celery import Celery

        self._app: Any = Celery("tutorial", broker=self._redis_url, backend=self._redis_url, set_as_current=False)
        wait_until(lambda: self._app.control.ping(timeout=0.5), f"the tutorial's worker answered; log: {self._log}")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._app.close()

    def seconds(self, urls: list[str], **options: bool) -> float:
        """Time from the first message to the last result."""
        start = time.perf_counter()
        name = "tutorial.remove_background"
        results = [self._app.send_task(name, args=[url, f"{next(self._keys)}.png"], kwargs=options) for url in urls]
        for result in results:
            result.get(timeout=120)
        return time.perf_counter() - start

    def cpu(self) -> float:
        """CPU seconds that the worker's processes have used so far."""
        return cpu_of(self._process.pid)


def cpu_of(pid: int) -> float:
    """CPU seconds that a process and its descendants have used so far."""
    root = psutil.Process(pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(used.user + used.system for used in times)
