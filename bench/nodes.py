"""Real workers as processes of their own, ours and the tutorial's, and how fast each works through photos."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import redis

from bench.servers import Servers
from imagemill.producer.client import Client
from imagemill.producer.sources import SourceRow
from imagemill.producer.submission import CHUNK_SECONDS
from imagemill.shared.fleet import Fleet
from imagemill.shared.messages import Job, Output
from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.shared.queues import queue_name
from imagemill.shared.settings import load_settings
from tests.workers import ROOT, WorkerProcess, clean_environment, wait_until

SPEC = Job(
    operation="remove-background",
    output=Output(url="s3://results/cut", format="png"),
    options=RembgRemoveBackground(model="u2net"),
)
KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench"}


def environment(redis_url: str, servers: Servers, weights: Path, **more: str) -> dict[str, str]:
    """The variables of a node that has the rembg engine alone, u2net in `weights`, and may fetch from the loopback."""
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
    """Submits jobs on one Redis, each in so many `chunks`, and says how long their images took."""

    def __init__(self, redis_url: str, spec: Job = SPEC, chunks: int = 1) -> None:
        settings = load_settings(redis_url=redis_url)
        self._spec, self._chunks = spec, chunks
        self.client, self._fleet, self._redis = Client(settings), Fleet(redis_url), redis.Redis.from_url(redis_url)

    def submit(self, addresses: list[str]) -> str:
        """The job. The rates that the producer cuts its list by are set so that a chunk lasts 20 s."""
        self._redis.delete("imagemill:rates")  # what the nodes have measured
        rate = len(addresses) / self._chunks / CHUNK_SECONDS
        self._fleet.report_rate(queue_name(self._spec.operation, self._spec.lane), "bench", rate)
        rows = (SourceRow(f"row {number}", {"source": address}) for number, address in enumerate(addresses))
        submission = self.client.submit(rows, self._spec)
        assert submission.chunks == self._chunks, submission
        return submission.job

    def await_images(self, job: str) -> dict[str, float]:
        """Return when the last image is recorded; the mean seconds of each stage."""
        found = []
        for status, results in self.client.watch(job):
            found += results
            if status.done + status.failed == status.total:
                break
        failed = [result for result in found if result.state == "failed"]
        assert not failed, f"{len(failed)} images failed: {failed[0].code}: {failed[0].message}"
        stages = {stage for result in found for stage in result.seconds}
        return {stage: sum(result.seconds.get(stage, 0.0) for result in found) / len(found) for stage in sorted(stages)}

    def await_end(self, job: str) -> None:
        """Return when the job is over, its manifest included."""
        assert self.client.wait(job, 60).over


class OurNode:
    """`imagemill worker --cpu --concurrency 1`, or with more children, each of which gets a chunk of every job."""

    def __init__(self, environment: dict[str, str], folder: Path, spec: Job = SPEC, children: int = 1) -> None:
        self._worker = WorkerProcess(environment, folder, name=f"ours-{folder.name}", concurrency=children)
        self.jobs = Jobs(environment["IMAGEMILL_REDIS_URL"], spec, children)
        self.stages: dict[str, float] = {}

    def __enter__(self) -> OurNode:
        self._worker.start()
        self._worker.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.stop()

    def seconds(self, addresses: list[str]) -> float:
        """From before the submission to the last image's record."""
        start = time.perf_counter()
        job = self.jobs.submit(addresses)
        self.stages = self.jobs.await_images(job)
        spent = time.perf_counter() - start
        self.jobs.await_end(job)
        return spent

    def cpu(self) -> float:
        """CPU seconds of the node's processes so far."""
        return cpu_of(self._worker.process.pid)


class TutorialNode:
    """`celery worker --concurrency 1` on bench/tutorial.py."""

    def __init__(self, redis_url: str, servers: Servers, model: Path, folder: Path) -> None:
        home = folder / "rembg"  # as rembg has it: one folder with its files
        home.mkdir()
        (home / "u2net.onnx").symlink_to(model)
        self._environment = clean_environment(
            TUTORIAL_REDIS=redis_url, TUTORIAL_S3=servers.s3, U2NET_HOME=str(home), MODEL_CHECKSUM_DISABLED="1", **KEYS
        )
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
        wait_until(lambda: self._app.control.ping(timeout=0.5), f"the tutorial's worker answers; log: {self._log}")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._app.close()

    def seconds(self, addresses: list[str], **how: bool) -> float:
        """From before the first message to the last result."""
        start = time.perf_counter()
        name = "tutorial.remove_background"
        asked = [self._app.send_task(name, args=[address, f"{next(self._keys)}.png"], kwargs=how) for address in addresses]
        for one in asked:
            one.get(timeout=120)
        return time.perf_counter() - start

    def cpu(self) -> float:
        """CPU seconds of the worker's processes so far."""
        return cpu_of(self._process.pid)


def cpu_of(pid: int) -> float:
    """CPU seconds of a process and its children so far."""
    root = psutil.Process(pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(one.user + one.system for one in times)
