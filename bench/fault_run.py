"""A small imagemill of its own for one fault: Redis, image server, store and nodes; and what must be true afterwards.

with FaultRun(seed=7) as run:
    node = run.node("first")
    job = run.submit(200)
    ...                                # the fault
    run.wait(job, 120)
    run.check(job)                     # raises AssertionError with everything that is wrong

Images are small and all different; the engine inverts them and notes each image that it begins (tests/fakes.py).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from bench import fault_checks
from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.ledger.scripts import key
from imagemill.shared.messages import Job, JobStatus
from imagemill.shared.s3 import ensure_bucket, make_client
from imagemill.shared.settings import load_settings
from tests.conftest import client_for, environment_for, photo
from tests.services.images import Handler, ImageServer, reply
from tests.services.s3 import S3Server, changed_environment
from tests.workers import WorkerProcess, wait_until

LANE = "stylize.opencv"
QUEUE = f"imagemill.{LANE}"
START_SECONDS = 120.0
BUCKET = "faults"


@dataclass(frozen=True)
class Row:
    """One line of the table: `run` causes the fault, checks what must hold, and tells what happened, with counts."""

    name: str
    must_hold: str
    run: Callable[[FaultRun], str]
    s3: bool = False
    """Whether results go to an S3 server instead of a folder."""


class FaultRun:
    """`small` asks a row for a quick run, as in the tests; `settings` are environment variables of all nodes."""

    def __init__(self, seed: int = 0, *, small: bool = False, s3: bool = False, **settings: str) -> None:
        self.seed, self.small, self.rng = seed, small, random.Random(seed)
        self._with_s3, self._settings = s3, settings
        self.s3: S3Server | None = None
        self.nodes: list[WorkerProcess] = []
        self.pictures: dict[str, bytes] = {}
        """Image files by URL, other than those that `submit` makes, so that `check` knows what their results should be."""
        self._next = 1000 * (seed % 1000)

    def __enter__(self) -> FaultRun:
        self._exit = ExitStack()
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="imagemill-faults-"))
            self.redis = self._exit.enter_context(EmbeddedRedis(self.folder / "redis"))
            self.images = self._exit.enter_context(ImageServer())
            self.images.fallback = send_photo
            self.use(self.redis.port)
            self.out = self._open_store()
            self._exit.callback(self._end_nodes)
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._exit.close()
        if kind is None:  # or else the nodes' logs tell more
            shutil.rmtree(self.folder)

    def _open_store(self) -> str:
        if not self._with_s3:
            (self.folder / "out").mkdir()
            return (self.folder / "out").as_uri()
        self.s3 = self._exit.enter_context(S3Server())
        self._settings = {"IMAGEMILL_S3__ENDPOINT_URL": self.s3.endpoint_url, **self.s3.environment, **self._settings}
        self._exit.enter_context(changed_environment(self.s3.environment))
        ensure_bucket(self.s3_client(), BUCKET, True, "us-east-1")
        return f"s3://{BUCKET}/out"

    def use(self, port: int) -> None:
        """Submit and check through this port from now on."""
        self.client: Client = self._exit.enter_context(client_for(f"redis://127.0.0.1:{port}/0"))
        self.raw: Any = self._exit.enter_context(self.client_of(port))

    def client_of(self, port: int) -> redis.Redis:
        """A plain client of the Redis at a port, without retries: a row should see at once whether Redis is there."""
        return redis.Redis(port=port, decode_responses=True, socket_timeout=5, retry=Retry(NoBackoff(), 0))

    def s3_client(self) -> Any:
        """A client of the run's S3 server."""
        assert self.s3 is not None
        return make_client(load_settings(s3={"endpoint_url": self.s3.endpoint_url}).s3)

    def count(self, full: int, small: int) -> int:
        """How many: `small` if the run is."""
        return small if self.small else full

    def pause(self, most: float) -> None:
        """Sleep at random, up to so many seconds, or a quarter of them if the run is small."""
        time.sleep(self.rng.uniform(0, most) / self.count(1, 4))

    # --- nodes ----------------------------------------------------------------------------------

    def node(
        self, name: str, *, fake: str = "Invert", concurrency: int = 1, ready: bool = True, **settings: str
    ) -> WorkerProcess:
        """Start a node; with `ready`, wait until it takes work. `settings` are environment variables."""
        more = {
            "IMAGEMILL_WORKER__OPERATIONS": '["stylize"]',
            "IMAGEMILL_WORKER__LEASE_SECONDS": str(self.count(10, 3)),
            "IMAGEMILL_TEST_RUNS": str(self.runs),
            **self._settings,
            **settings,
        }
        environment = {**environment_for(self.redis.url, self.folder), **more}
        node = WorkerProcess(environment, self.folder, name=name, fake=fake, concurrency=concurrency)
        self.nodes.append(node)
        node.start()
        if ready:
            node.wait_ready(START_SECONDS)
        return node

    def start(self, *names: str, **options: Any) -> list[WorkerProcess]:
        """Start several nodes at once, and wait until all take work."""
        nodes = [self.node(name, ready=False, **options) for name in names]
        return [node.wait_ready(START_SECONDS) for node in nodes]

    def restart(self, node: WorkerProcess, *, ready: bool = True) -> WorkerProcess:
        """Start a node again that has ended."""
        node.start()
        if ready:
            node.wait_ready(START_SECONDS)
        return node

    def destroy(self, node: WorkerProcess) -> None:
        """Kill a node and its children, as if its host had lost power."""
        if node.process.poll() is None:
            os.killpg(node.process.pid, signal.SIGKILL)  # it is a session of its own
            node.process.wait()

    def _end_nodes(self) -> None:
        for node in self.nodes:
            self.destroy(node)
            node.fleet.close()

    # --- jobs -----------------------------------------------------------------------------------

    def submit(self, count: int, **policy: Any) -> str:
        """Submit a job of so many images that no other job has; returns its id."""
        return self.submit_urls([self.images.url(f"/{number}.png") for number in self.numbers(count)], **policy)

    def numbers(self, count: int) -> range:
        """Numbers of photos that no job has had."""
        self._next += count
        return range(self._next - count, self._next)

    def submit_urls(self, urls: Sequence[str], **policy: Any) -> str:
        """Submit a job of these images, which `pictures` has if `submit` didn't make them."""
        policy = {"reuse": False, "quality": {"mode": "off"}, **policy}
        spec = Job.model_validate({"operation": "stylize", "output": {"url": self.out, "format": "png"}, "policy": policy})
        return self.client.submit([SourceRow("list", {"source": url}) for url in urls], spec).job

    def wait(self, job: str, seconds: float) -> JobStatus:
        """Wait until a job is over, also while Redis doesn't respond."""
        return self._await(job, lambda status: status.over, "the end", seconds)

    def wait_done(self, job: str, images: int, seconds: float = 300) -> JobStatus:
        """Wait until so many images of a job are done."""
        return self._await(job, lambda status: status.done >= images, f"{images} images done", seconds)

    def _await(self, job: str, condition: Callable[[JobStatus], bool], what: str, seconds: float) -> JobStatus:
        found: list[JobStatus] = []

        def reached() -> bool:
            with suppress(BrokerUnavailable):
                found[:] = [self.client.status(job)]
                return condition(found[0])
            time.sleep(0.2)
            return False

        try:
            wait_until(reached, f"job {job}: {what}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; its status is {found[0] if found else 'unknown'}") from None
        return found[0]

    def picture(self, url: str) -> bytes:
        """The image file at a URL."""
        return self.pictures[url] if url in self.pictures else photo_of(url)

    # --- what happened --------------------------------------------------------------------------

    @property
    def runs(self) -> Path:
        """Where engines note the images that they begin."""
        return self.folder / "runs"

    def begun(self, url: str) -> int:
        """How many times an engine has begun with an image."""
        return len(fault_checks.begun(self).get(fault_checks.digest_of(self.picture(url)), []))

    def recorded_at(self, job: str) -> list[float]:
        """When each result was recorded, in seconds since the epoch."""
        events = self.raw.xrange(key(job, "events"))
        return [int(place.split("-")[0]) / 1000 for place, fields in events if "i" in fields]

    def back_to_normal(self, job: str, begun: float, ended: float) -> float:
        """Seconds from the end of a fault until results come at 80 % of the rate before it, or the job is over.

        `begun` and `ended` are when the fault did, by `time.time()`.
        """
        return fault_checks.seconds_to_normal(self.recorded_at(job), begun, ended)

    def check(self, *jobs: str, failed: int = 0, again: int | None = 0, late: bool = False) -> str:
        """Raise AssertionError if anything was lost, doubled, left over or wrong in these jobs, which must be over.

        `failed` is how many of their images must have failed. `again` is how many computations may have been begun once more
        before their result was recorded, such as those in a process that was killed; None: any number. `late`: also after it
        was, because Redis had forgotten who had them. Returns the counts.
        """
        return fault_checks.check(self, jobs, failed, again, late)


def send_photo(handler: Handler) -> None:
    """A route for the photos that `submit` makes."""
    reply(handler, 200, photo_of(handler.path))


def photo_of(url: str) -> bytes:
    """The photo at `.../NUMBER.png`."""
    return photo(int(url.rpartition("/")[2].removesuffix(".png")), 48, 36)
