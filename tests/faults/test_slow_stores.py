"""Stores that take longer than a lease."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from imagemill.shared.messages import Job, Output
from tests.conftest import photo
from tests.services.images import ImageServer
from tests.services.slow_s3 import SlowS3
from tests.workers import WorkerProcess, wait_until

pytestmark = pytest.mark.integration

LANE = "stylize.opencv"


def test_manifest_that_takes_longer_than_its_lease_is_written_once(
    environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path, own_redis: EmbeddedRedis
) -> None:
    """With two children, one of which looks for work meanwhile."""
    images.routes["/0.png"] = photo(0)
    with SlowS3("manifest.jsonl") as s3, redis.Redis.from_url(own_redis.url) as raw:
        environment |= {"IMAGEMILL_WORKER__LEASE_SECONDS": "2", "IMAGEMILL_S3__ENDPOINT_URL": s3.url}
        environment |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        with WorkerProcess(environment, tmp_path, fake="Invert", concurrency=2) as node:
            node.wait_ready()
            rows = [SourceRow("row 0", {"source": images.url("/0.png")})]
            job = client.submit(rows, Job(operation="stylize", output=Output(url="s3://results/out"))).job

            def leased_until() -> float:
                return raw.zscore(f"imagemill:manifests:{LANE}", job) or 0.0

            wait_until(s3.waiting.is_set, "the manifest is being uploaded")
            first = leased_until()
            wait_until(lambda: leased_until() > first + 6000, "three leases have passed")
            s3.released.set()
            status = client.wait(job, timeout=60)
        log = node.log.read_text()
    assert (status.state, status.done, status.manifest) == ("done", 1, f"s3://results/out/{job}/manifest.jsonl")
    assert [key for key in s3.puts if key.endswith("manifest.jsonl")] == [f"/results/out/{job}/manifest.jsonl"]
    assert log.count("job over") == 1, log
