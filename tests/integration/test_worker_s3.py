"""A real worker that reads from and writes to a real S3 server."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared import s3
from imagemill.shared.settings import S3Settings
from tests.conftest import environment_for, photo
from tests.integration.jobs import cli, opened
from tests.services.images import ImageServer
from tests.services.s3 import S3Server, changed_environment
from tests.workers import WorkerProcess

pytestmark = pytest.mark.integration


def test_worker_reads_from_s3_and_stores_results_manifest_and_links_there(
    own_redis: EmbeddedRedis, s3_server: S3Server, images: ImageServer, tmp_path: Path
) -> None:
    images.routes["/a.png"] = photo(1)
    with changed_environment(s3_server.environment):
        storage = s3.make_client(S3Settings(endpoint_url=s3_server.endpoint_url))
    storage.create_bucket(Bucket="sources")
    storage.put_object(Bucket="sources", Key="in/b.png", Body=photo(2))
    environment = environment_for(
        own_redis.url,
        tmp_path,
        **s3_server.environment,
        IMAGEMILL_S3__ENDPOINT_URL=s3_server.endpoint_url,
        IMAGEMILL_S3__CREATE_BUCKET="true",
        IMAGEMILL_S3__READ_BUCKETS='["sources/in"]',
        IMAGEMILL_WORKER__OPERATIONS='["stylize"]',
    )
    sources = tmp_path / "list.txt"
    sources.write_text(f"{images.url('/a.png')}\ns3://sources/in/b.png\ns3://sources/in/none.png\ns3://sources/c.png\n")
    submit = ["submit", str(sources), "--operation", "stylize", "--output", "s3://results/jobs", "--wait", "--json"]
    with WorkerProcess(environment, tmp_path) as node:
        node.wait_ready()
        submission = cli(environment, *submit)
    assert submission.returncode == 1
    summary = json.loads(submission.stdout)
    assert {"state": "done", "total": 4, "done": 2, "failed": 2}.items() <= summary.items()
    lines = cli(environment, "results", summary["job"], "--format", "jsonl", "--presign", "600").stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["code"] for row in rows] == [None, None, "not_found", "forbidden_address"]
    for row in rows[:2]:
        bucket, key = s3.split(row["output"])
        stored = storage.get_object(Bucket=bucket, Key=key)
        assert stored["ContentType"] == "image/png"
        body = stored["Body"].read()
        assert opened(body).size == (96, 72)
        with urllib.request.urlopen(row["link"], timeout=10) as response:
            assert response.read() == body
    manifest = storage.get_object(Bucket="results", Key=f"jobs/{summary['job']}/manifest.jsonl")["Body"].read()
    assert [json.loads(line)["state"] for line in manifest.splitlines()] == ["done", "done", "failed", "failed"]
