"""A store that fails for a while delays images, but fails none and has none computed twice; a full disk is a clear error."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from imagemill.producer.client import Client
from imagemill.shared import s3
from imagemill.shared.settings import S3Settings
from tests.faults.jobs import check_complete, check_done, submit
from tests.services.images import ImageServer
from tests.services.proxy import Proxy
from tests.services.s3 import S3Server, changed_environment
from tests.services.s3_proxy import S3Proxy
from tests.services.small_disk import small_disk
from tests.workers import WorkerProcess, wait_until

pytestmark = pytest.mark.integration

COUNT = 12
CUT_BYTES = 40_000
"""What a connection carries before it is reset; a result has about 15,000 bytes."""


class Bucket:
    """A bucket of the S3 server."""

    def __init__(self, server: S3Server) -> None:
        self.server, self.name = server, f"faults-{secrets.token_hex(4)}"
        self.url, self.port = f"s3://{self.name}/out", urlsplit(server.endpoint_url).port or 0
        with changed_environment(server.environment):
            self._client: Any = s3.make_client(S3Settings(endpoint_url=server.endpoint_url))
        self._client.create_bucket(Bucket=self.name)

    def read(self, url: str) -> bytes:
        bucket, key = s3.split(url)
        return bytes(self._client.get_object(Bucket=bucket, Key=key)["Body"].read())


@pytest.fixture
def bucket(s3_server: S3Server) -> Bucket:
    return Bucket(s3_server)


@pytest.fixture
def runs(environment: dict[str, str], tmp_path: Path) -> Path:
    """The file with a line for each image that the engine begins."""
    environment["IMAGEMILL_TEST_RUNS"] = str(tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def start(environment: dict[str, str], bucket: Bucket, tmp_path: Path) -> Iterator[Callable[[str], WorkerProcess]]:
    """Starts a node that reaches the bucket at an endpoint."""
    nodes = []

    def begin(endpoint: str) -> WorkerProcess:
        more = {**bucket.server.environment, "IMAGEMILL_S3__ENDPOINT_URL": endpoint}
        nodes.append(WorkerProcess({**environment, **more}, tmp_path, fake="Invert").__enter__())
        return nodes[-1].wait_ready()

    yield begin
    for node in nodes:
        node.__exit__()


def check_once(client: Client, job: str, bucket: Bucket, runs: Path) -> None:
    """All images are done, and none was computed twice."""
    check_done(client, job, COUNT, bucket.read)
    begun = Counter(line.split()[0] for line in runs.read_text().splitlines())
    assert max(begun.values()) == 1
    assert [row.attempts for row in client.results(job)] == [1] * COUNT


def test_results_wait_for_a_store_that_is_down(
    client: Client, images: ImageServer, bucket: Bucket, runs: Path, start: Callable[[str], WorkerProcess]
) -> None:
    with Proxy(bucket.port) as proxy:
        start(proxy.url())
        proxy.set("refuse")
        job = submit(client, images, bucket.url, COUNT)
        wait_until(lambda: "no connection to the S3 server" in (client.status(job).why or ""), "the status says why")
        proxy.set("pass")
        check_once(client, job, bucket, runs)
    assert client.status(job).why is None


def test_store_that_is_busy_half_of_the_time_costs_nothing(
    client: Client, images: ImageServer, bucket: Bucket, runs: Path, start: Callable[[str], WorkerProcess]
) -> None:
    with S3Proxy(bucket.server.endpoint_url, busy=True) as proxy:
        start(proxy.url)
        check_once(client, submit(client, images, bucket.url, COUNT), bucket, runs)
        assert proxy.refused >= COUNT


def test_store_connections_reset_mid_upload_lose_nothing(
    client: Client,
    images: ImageServer,
    bucket: Bucket,
    runs: Path,
    environment: dict[str, str],
    start: Callable[[str], WorkerProcess],
) -> None:
    environment["IMAGEMILL_WORKER__STORE_THREADS"] = "1"  # so that each connection carries several results
    with Proxy(bucket.port) as proxy:
        proxy.cut_up = CUT_BYTES
        start(proxy.url())
        check_once(client, submit(client, images, bucket.url, COUNT), bucket, runs)
        assert proxy.cuts > 0


def test_full_disk_is_a_clear_error_and_a_retry_completes_the_job(
    client: Client, images: ImageServer, environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with small_disk(out, 1 << 20), WorkerProcess(environment, tmp_path, fake="Invert") as node:
        filler = out / "filler"
        filler.write_bytes(bytes(924 << 10))
        node.wait_ready()
        job = submit(client, images, tmp_path, COUNT)
        status = client.wait(job, timeout=60)
        failed = [row for row in client.results(job) if row.state == "failed"]
        assert 0 < len(failed) < COUNT
        assert {row.code for row in failed} == {"storage_full"}
        assert all((row.message or "").endswith("can't be written: no space left on device") for row in failed)
        assert len([path for path in out.rglob("*") if path.is_file()]) == 1 + status.done, "partial files are left"
        filler.unlink()
        assert client.retry(job) == len(failed)
        check_complete(client, job, COUNT, tmp_path)
