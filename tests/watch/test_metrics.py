"""What Prometheus reads from nodes and from the exporter is what happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import redis

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.messages import Policy
from tests.conftest import photo
from tests.integration.jobs import spec
from tests.services.images import Handler, ImageServer, answers
from tests.watch.metering import Exporter, MeteredNode, rows_of
from tests.workers import WorkerProcess, wait_until

pytestmark = pytest.mark.integration

LANE = "stylize.opencv"


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
    assert scraped.by("imagemill_model_info", "operation") == {"stylize": 1}
    ours = [sample for sample in scraped.samples if sample.name.startswith("imagemill_")]
    assert {sample.labels["node"] for sample in ours} == {name}
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
        for number in (signal.SIGINT, signal.SIGTERM):  # as from Ctrl-C, which a node's processes all get
            server.send_signal(number)
        assert node.scrape().sum("imagemill_images_total", result="computed") == 6
        node.kill()
        wait_until(lambda: not server.is_running(), "the server has ended with its node")
    assert not folder.exists()


def test_retries_are_counted(environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path) -> None:
    good, refusals = photo(1), iter([503, 503])

    def flaky(handler: Handler) -> None:
        status = next(refusals, 200)
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(good) if status == 200 else 0))
        handler.end_headers()
        if status == 200:
            handler.wfile.write(good)

    images.routes["/flaky.png"] = flaky
    with MeteredNode(environment, tmp_path) as node:
        node.wait_ready()
        job = client.submit(rows_of(images, "/flaky.png"), spec("stylize", tmp_path)).job
        client.wait(job, 60)
        (row,) = client.results(job)
        assert row.attempts == 3
        assert node.scrape().sum("imagemill_image_retries_total", operation="stylize") == 2


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


def test_exporter_shows_what_waits_who_serves_it_and_how_fast(
    exported: Exporter, environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path
) -> None:
    images.routes |= {f"/{n}.png": photo(n) for n in range(3)} | {"/slow.png": images.hang}
    policy = Policy(owner="shop", priority="high")
    job = spec("stylize", tmp_path).model_copy(update={"policy": policy})
    submitted = client.submit(rows_of(images, "/0.png", "/1.png", "/2.png", "/slow.png"), job).job
    waiting = exported()
    place = {"lane": LANE, "priority": "high", "owner": "shop"}
    assert waiting.sum("imagemill_images_waiting", **place) == 4
    assert waiting.sum("imagemill_oldest_waiting_seconds", **place) > 0
    assert f'imagemill_lane_nodes{{lane="{LANE}"}} 0.0' in waiting.text  # nobody serves it
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
    exported: Exporter, client: Client, images: ImageServer, tmp_path: Path
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


def test_exporter_survives_an_outage_of_redis_and_whatever_its_keys_hold(
    exported: Exporter, client: Client, images: ImageServer, tmp_path: Path, own_redis: EmbeddedRedis
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
    exported: Exporter, environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path
) -> None:
    images.routes["/a.png"] = photo(1)
    with MeteredNode(environment, tmp_path) as node:
        node.wait_ready()
        client.wait(client.submit(rows_of(images, "/a.png"), spec("stylize", tmp_path)).job, 60)
        texts = [node.scrape().text, exported().text]
    for text in texts:
        checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
