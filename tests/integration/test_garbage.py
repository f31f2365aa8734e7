"""Garbage of every shape in every key and queue of a running node: it carries on, and a good job is done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagemill.producer.client import Client
from imagemill.producer.sources import SourceRow
from imagemill.shared.dead import DeadLetters
from imagemill.shared.queues import node_queue
from tests.conftest import client_for, environment_for, photo
from tests.integration.jobs import spec
from tests.services.images import ImageServer
from tests.services.redis import running_redis
from tests.workers import WorkerProcess, wait_until

pytestmark = pytest.mark.integration

LANE = "stylize.opencv"
QUEUE = f"imagemill.{LANE}"
SHARED = (
    *("alarms", "leased", "jobs", "lanes", "latest", "weights", "running", "children", "speed", "nodes", "node-children"),
    *("memory", "tender", "tended", "sequence", "dead", f"manifests:{LANE}", f"nodes:{LANE}", f"rates:{LANE}"),
    *("clocks:normal", f"turns:{LANE}:high", f"turns:{LANE}:normal", f"waiting:{LANE}:normal:ann"),
)
PARTS = ("", *(f":{part}" for part in ("packs", "results", "events", "duplicates", "wait", "shares", "back", "suspects")))
FIELDS = ("spec", "state", "lane", "priority", "owner", "order", "size", "next", "total", "open", "shares", "cpu@x", "0", "ann")
TEXTS = (b"", b"null", b"[]", b"7", b"-1", b"1e400", b"nan", b"text", b"\xff\xfe", b"0-99999999999", b"9" * 400, b"{}")
CONTENT = st.sampled_from(TEXTS) | st.binary(max_size=40)
SCORES = st.sampled_from([float("inf"), float("-inf"), 0.0, 1.0, -5.0, 1e300])


@dataclass
class System:
    """One node, which all examples share."""

    url: str
    raw: Any
    client: Client
    node: WorkerProcess
    source: str
    folder: Path

    @property
    def queue(self) -> str:
        (name,) = (report.node for report in self.client.nodes())
        return node_queue(name)

    def check_job(self) -> None:
        """A good job is done. What nodes offer may be unknown when it is submitted."""
        job = self.client.submit([SourceRow("row 0", {"source": self.source})], spec("stylize", self.folder)).job
        assert self.client.wait(job, timeout=120).state == "done"
        assert [row.state for row in self.client.results(job)] == ["done"]
        assert self.node.process.poll() is None


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("garbage")
    with running_redis(folder / "redis") as server, ImageServer() as images:
        images.routes["/a.png"] = photo(1)
        environment = environment_for(server.url, folder, IMAGEMILL_WORKER__OPERATIONS='["stylize"]')
        with (
            redis.Redis.from_url(server.url) as raw,
            client_for(server.url) as client,
            WorkerProcess(environment, folder, name="cpu", fake="Invert") as node,
        ):
            node.wait_ready()
            yield System(server.url, raw, client, node, images.url("/a.png"), folder)
            assert node.stop() == 0


def write(raw: Any, name: str, kind: str, field: bytes, value: bytes, score: float) -> None:
    """Write into a key, over what is there if that is of another type."""
    if raw.type(name) != kind.encode():
        raw.delete(name)
    if kind == "string":
        raw.set(name, value)
    elif kind == "hash":
        raw.hset(name, field, value)
    elif kind == "list":
        raw.rpush(name, value)
    elif kind == "set":
        raw.sadd(name, value)
    elif kind == "zset":
        raw.zadd(name, {value: score})
    else:
        raw.xadd(name, {field: value})


@pytest.mark.parametrize("name", SHARED)
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["string", "hash", "list", "set", "zset", "stream"]), value=CONTENT, score=SCORES)
def test_good_job_is_done_despite_garbage_in_shared_keys(
    system: System, name: str, kind: str, value: bytes, score: float
) -> None:
    write(system.raw, f"imagemill:{name}", kind, b"ann", value, score)
    system.check_job()


@pytest.mark.parametrize("part", PARTS)
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["string", "hash", "list", "zset"]), field=st.sampled_from(FIELDS), value=CONTENT, score=SCORES)
def test_good_job_is_done_despite_a_damaged_one(
    system: System, part: str, kind: str, field: str, value: bytes, score: float
) -> None:
    rows = [SourceRow(f"row {n}", {"source": system.source}) for n in range(40)]
    bad = system.client.submit(rows, spec("stylize", system.folder)).job
    write(system.raw, f"imagemill:job:{bad}{part}", kind, field.encode(), value, score)
    system.check_job()


@pytest.mark.parametrize("kind", ["string", "hash", "set", "zset"])
def test_node_survives_queues_of_other_types(system: System, kind: str) -> None:
    for name in (QUEUE, system.queue):
        write(system.raw, name, kind, b"field", b"text", 1.0)
    wait_until(lambda: not system.raw.exists(system.queue), "the node's queue is set aside")
    system.check_job()
    letters = DeadLetters(system.url)
    assert QUEUE in {letter.where for letter in letters.entries()}
    letters.close()


def test_job_with_a_damaged_spec_ends_and_a_newer_one_is_left_alone(system: System) -> None:
    rows = [SourceRow("row 0", {"source": system.source})]
    later = spec("stylize", system.folder)
    bad, new = (system.client.submit(rows, paused(later)).job for _ in range(2))
    newer = {**json.loads(system.raw.hget(f"imagemill:job:{new}", "spec")), "version": 2, "more": True}
    system.raw.hset(f"imagemill:job:{new}", "spec", json.dumps(newer))
    system.raw.hset(f"imagemill:job:{bad}", "spec", b"{")
    for job in (bad, new):
        system.raw.zadd("imagemill:alarms", {f"begin {job}": 1})
    system.check_job()
    wait_until(lambda: system.raw.hget(f"imagemill:job:{bad}", "state") == b"failed", "the damaged job has ended")
    assert system.raw.hget(f"imagemill:job:{new}", "state") in (b"queued", b"running")
    system.check_job()
    system.raw.zrem(f"imagemill:waiting:{LANE}:normal:~{new}", new)


def paused(job: Any) -> Any:
    """The job, to begin much later."""
    fields = {**job.model_dump(mode="json")}
    fields["policy"]["not_before"] = "2100-01-01T00:00:00Z"
    return type(job).model_validate(fields)
