"""What Prometheus reads from nodes and from the exporter is what happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from imagemill.shared.messages import Policy
from tests.conftest import client_for, environment_for, photo
from tests.integration.jobs import spec
from tests.services.images import ImageServer, answers
from tests.services.s3 import free_ports
from tests.workers import ROOT, WorkerProcess, wait_until

pytestmark = pytest.mark.integration

LANE = "stylize.opencv"


class Scraped:
    """The samples of one scrape."""

    def __init__(self, url: str) -> None:
        with urllib.request.urlopen(url, timeout=10) as answer:
            self.text = answer.read().decode()
        families = text_string_to_metric_families(self.text)
        self.samples = [sample for family in families for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        return sum(sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items())

    def by(self, name: str, label: str) -> dict[str, float]:
        """The sums of a metric's samples by one of its labels."""
        sums: Counter[str] = Counter()
        for sample in self.samples:
            if sample.name == name:
                sums[sample.labels[label]] += sample.value
        return dict(sums)


class MeteredNode(WorkerProcess):
    """A node that serves metrics; `command` may be changed before it starts."""

    def __init__(self, environment: dict[str, str], folder: Path, **options: object) -> None:
        super().__init__(environment, folder, **options)  # type: ignore[arg-type]
        (self.port,) = free_ports(1)
        self.command = [*self.command, "--metrics", str(self.port)]

    def wait_ready(self, seconds: float = 120.0) -> WorkerProcess:
        super().wait_ready(seconds)
        children = psutil.Process(self.process.pid).children()
        (self.server,) = (child for child in children if "imagemill.worker.node.metrics_server" in child.cmdline())
        return self

    def pool(self) -> list[int]:
        """The processes that work on images."""
        return [child for child in self.children() if child != self.server.pid]

    def scrape(self) -> Scraped:
        """What the node tells Prometheus."""
        return Scraped(f"http://127.0.0.1:{self.port}/metrics")


@pytest.fixture
def environment(own_redis: EmbeddedRedis, tmp_path: Path) -> dict[str, str]:
    return environment_for(own_redis.url, tmp_path, IMAGEMILL_WORKER__OPERATIONS='["stylize"]', IMAGEMILL_WORKER__REUSE="true")


@pytest.fixture
def client(own_redis: EmbeddedRedis) -> Iterator[Client]:
    with client_for(own_redis.url) as opened:
        yield opened


@pytest.fixture
def exported(environment: dict[str, str]) -> Iterator[Callable[[], Scraped]]:
    """A running `imagemill exporter`, as a function that scrapes it."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "imagemill.producer.cli", "exporter", "--port", str(port)]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert f"127.0.0.1:{port}" in process.stderr.readline()
        yield lambda: Scraped(f"http://127.0.0.1:{port}/metrics")
        process.terminate()
        assert process.wait(30) == 0


def rows_of(images: ImageServer, *names: str) -> list[SourceRow]:
    return [SourceRow(name, {"source": images.url(name), "name": name.strip("/").partition(".")[0]}) for name in names]


def test_node_counts_what_the_results_say(
    environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path
) -> None:
    images.routes |= {f"/{n}.png": photo(n) for n in range(5)} | {"/none.png": answers(404), "/bad.png": b"no image"}
    with MeteredNode(environment, tmp_path, concurrency=2) as node:
        node.wait_ready()
        names = [f"/{n}.png" for n in range(5)]
        jobs = [client.submit(rows_of(images, *names, "/none.png", "/bad.png"), spec("stylize", tmp_path)).job]
        client.wait(jobs[0], 60)
        jobs.append(client.submit(rows_of(images, *names), spec("stylize", tmp_path)).job)  # the same images again
        client.wait(jobs[1], 60)
        scraped = node.scrape()
        (name,) = (one.node for one in client.nodes())
    rows = [row for job in jobs for row in client.results(job)]
    failed = Counter(row.code for row in rows if row.state == "failed")
    assert scraped.by("imagemill_images_total", "result") == {"computed": 5, "failed": 2, "reused": 5}
    assert scraped.by("imagemill_images_failed_total", "code") == failed
    assert scraped.sum("imagemill_received_bytes_total") == 2 * sum(len(photo(n)) for n in range(5)) + len(b"no image")
    assert scraped.sum("imagemill_stored_bytes_total") == sum(path.stat().st_size for path in tmp_path.rglob("*.png"))
    assert scraped.sum("imagemill_stage_seconds_count", operation="stylize", stage="run") == 5
    assert scraped.sum("imagemill_batch_size_sum") == 5
    assert {sample.labels.get("node") for sample in scraped.samples} == {name}
    assert (
        0
        < scraped.sum("imagemill_disk_free_bytes", folder="temporary")
        < scraped.sum("imagemill_disk_size_bytes", folder="temporary")
    )


def test_counts_outlive_a_child_and_end_with_the_node(
    environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path
) -> None:
    images.routes |= {f"/{n}.png": photo(n) for n in range(6)}
    with MeteredNode(environment, tmp_path) as node:
        node.wait_ready()
        client.wait(client.submit(rows_of(images, "/0.png", "/1.png", "/2.png"), spec("stylize", tmp_path)).job, 60)
        (child,) = node.pool()
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: node.pool() not in ([], [child]), "the child was replaced")
        client.wait(client.submit(rows_of(images, "/3.png", "/4.png", "/5.png"), spec("stylize", tmp_path)).job, 60)
        assert node.scrape().sum("imagemill_images_total", result="computed") == 6
        server = node.server
        folder = Path(server.environ()["PROMETHEUS_MULTIPROC_DIR"])
        assert any(folder.iterdir())
        node.kill()
        wait_until(lambda: not server.is_running(), "the server has ended with its node")
    assert not folder.exists()


def test_node_works_without_metrics_if_their_port_is_taken(
    environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path
) -> None:
    images.routes["/a.png"] = photo(1)
    with MeteredNode(environment, tmp_path) as node:
        node.stop()
        node.command = [*node.command[:-1], str(images.port)]
        node.start()
        node.wait_ready()
        assert client.wait(client.submit(rows_of(images, "/a.png"), spec("stylize", tmp_path)).job, 60).done == 1
        wait_until(lambda: "metrics not served" in node.log.read_text(), "the log says so")


def test_exporter_tells_what_waits_who_serves_it_and_how_fast(
    exported: Callable[[], Scraped], environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path
) -> None:
    images.routes |= {f"/{n}.png": photo(n) for n in range(3)} | {"/slow.png": images.hang}
    policy = Policy(owner="shop", priority="high")
    job = spec("stylize", tmp_path).model_copy(update={"policy": policy})
    submitted = client.submit(rows_of(images, "/0.png", "/1.png", "/2.png", "/slow.png"), job).job
    waiting = exported()
    place = {"lane": LANE, "priority": "high", "owner": "shop"}
    assert waiting.sum("imagemill_images_waiting", **place) == 4
    assert waiting.sum("imagemill_oldest_waiting_seconds", **place) > 0
    assert waiting.by("imagemill_lane_nodes", "lane") == {LANE: 0}  # nobody serves it
    with WorkerProcess(environment, tmp_path) as node:
        node.wait_ready()
        wait_until(lambda: client.status(submitted).done == 3 and images.stalled.is_set(), "all but one are done")
        running = exported()
        images.released.set()
        client.wait(submitted, 60)
    assert running.sum("imagemill_images_waiting", **place) == 0
    assert running.sum("imagemill_images_running", **place) == 1
    assert running.sum("imagemill_lane_nodes", lane=LANE) == 1
    assert running.sum("imagemill_node_ready", device="cpu") == 1
    assert exported().sum("imagemill_images_running") == 0


def test_owners_beyond_the_busiest_share_a_label_and_unnamed_ones_have_none(
    exported: Callable[[], Scraped], client: Client, images: ImageServer, tmp_path: Path
) -> None:
    def submit(owner: str | None, count: int) -> None:
        job = spec("stylize", tmp_path).model_copy(update={"policy": Policy(owner=owner)})
        client.submit(rows_of(images, *(f"/{n}.png" for n in range(count))), job)

    for number in range(20):
        submit(f"owner{number}", 2)
    submit("small", 1)
    for _ in range(3):
        submit(None, 1)
    waiting = exported().by("imagemill_images_waiting", "owner")
    assert len(waiting) == 22
    assert (waiting["other"], waiting[""], waiting["owner7"]) == (1, 3, 2)


def test_exporter_outlives_redis_and_whatever_its_keys_hold(
    exported: Callable[[], Scraped], client: Client, images: ImageServer, tmp_path: Path, own_redis: EmbeddedRedis
) -> None:
    job = client.submit(rows_of(images, "/a.png"), spec("stylize", tmp_path)).job
    with redis.Redis.from_url(own_redis.url) as raw:
        raw.sadd("imagemill:lanes", "no lane")
        raw.set("imagemill:turns:no lane:high", "a string")
        raw.zadd("imagemill:leased", {"no share": 1, f"{job}:x": 2})
        raw.hset("imagemill:nodes", "broken", "{")
        raw.hset(f"imagemill:rates:{LANE}", mapping={"cpu@a/0": "fast", b"\xff": "1"})
        raw.hset(f"imagemill:job:{job}", "done", "many")
    assert exported().sum("imagemill_images_waiting", lane=LANE) == 1
    own_redis.kill()
    down = exported()
    assert down.sum("imagemill_redis_up") == 0
    assert down.sum("imagemill_images_waiting") == 0
    own_redis.start()
    assert exported().sum("imagemill_redis_up") == 1


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_no_fault(
    exported: Callable[[], Scraped], environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path
) -> None:
    images.routes["/a.png"] = photo(1)
    with MeteredNode(environment, tmp_path) as node:
        node.wait_ready()
        client.wait(client.submit(rows_of(images, "/a.png"), spec("stylize", tmp_path)).job, 60)
        texts = [node.scrape().text, exported().text]
    for text in texts:
        checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
