"""Jobs whose keys have exactly the rights of deploy/minio/policy.json."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from imagemill.producer.cli import main
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared import s3
from imagemill.shared.settings import S3Settings
from imagemill.worker.transfer.multipart import PART
from imagemill.worker.transfer.network import Network
from imagemill.worker.transfer.s3_requests import S3Requests
from imagemill.worker.transfer.store import S3Store
from tests.conftest import environment_for, photo
from tests.services.s3 import S3Server, changed_environment
from tests.services.s3_policy import Policy
from tests.services.s3_proxy import S3Proxy
from tests.stores import BlockingStore
from tests.workers import ROOT, WorkerProcess

pytestmark = pytest.mark.integration

BUCKET = "rights"


def broken() -> Iterator[bytes]:
    yield b"x" * PART
    raise RuntimeError("no more lines")


def cli(environment: dict[str, str], *arguments: str) -> Result:
    """`imagemill ARGUMENT...` in this process, which takes less time than one of its own."""
    return CliRunner().invoke(main, arguments, env=environment)


def test_jobs_need_no_more_than_the_policy_allows_and_use_all_of_it(
    own_redis: EmbeddedRedis, s3_server: S3Server, network: Network, tmp_path: Path
) -> None:
    with changed_environment(s3_server.environment):
        storage = s3.make_client(S3Settings(endpoint_url=s3_server.endpoint_url))
    storage.create_bucket(Bucket=BUCKET)
    for number in (1, 2):
        storage.put_object(Bucket=BUCKET, Key=f"in/{number}.png", Body=photo(number))
    policy = Policy(ROOT / "deploy" / "minio" / "policy.json", BUCKET)
    with S3Proxy(s3_server.endpoint_url, policy=policy) as proxy:
        environment = environment_for(
            own_redis.url,
            tmp_path,
            **s3_server.environment,
            IMAGEMILL_S3__ENDPOINT_URL=proxy.url,
            IMAGEMILL_WORKER__OPERATIONS='["stylize"]',
            IMAGEMILL_WORKER__REUSE="true",
        )
        with WorkerProcess(environment, tmp_path) as node:
            node.wait_ready()
            for name in ("first", "again"):  # the second job's results are copies of the first's
                submit = ["submit", f"s3://{BUCKET}/in/", "--operation", "stylize", "--name", name, "--wait"]
                submission = cli(environment, *submit, "--output", f"s3://{BUCKET}/{name}")
                assert submission.exit_code == 0, submission.output
        rows = [json.loads(line) for line in cli(environment, "results", "again", "--presign", "60").stdout.splitlines()]
        assert [(row["state"], "cached" in row["notes"]) for row in rows] == [("done", True)] * 2
        with urllib.request.urlopen(rows[0]["link"], timeout=10) as link:
            assert link.status == 200
        report = cli(environment, "report", "first", "--out", str(tmp_path / "report.html"))
        assert report.exit_code == 0, report.output
        assert policy.refused == set()

        with changed_environment(s3_server.environment):
            settings = S3Settings(endpoint_url=proxy.url)
            store = BlockingStore(S3Store(f"s3://{BUCKET}/out", S3Requests(settings, network), settings), network.call)
            store.put_stream("manifest.jsonl", (b"x" * PART, b"y"), "application/x-ndjson")  # as a large manifest is stored
            with pytest.raises(RuntimeError, match="no more lines"):
                store.put_stream("manifest.jsonl", broken(), "application/x-ndjson")
        assert policy.refused == set()

        doctor = cli(environment, "doctor", "--output", f"s3://{BUCKET}/out").stdout
        assert f"s3://{BUCKET}/out can be written to" in " ".join(doctor.split())
        assert "can't be written" not in doctor
    assert policy.used == policy.actions
    assert policy.refused == {"s3:ListAllMyBuckets"}  # doctor counts the buckets if it may
    keys = {entry["Key"] for entry in storage.list_objects_v2(Bucket=BUCKET)["Contents"]}
    assert {"first/first/manifest.jsonl", "again/again/manifest.jsonl", "out/manifest.jsonl"} <= keys
