"""Several hosts, each a network namespace: one is cut off and returns, and Redis fails over meanwhile.

The store's host has Redis and S3, a standby the replica; two hosts with the same hostname have one node each, and the clock
of one is an hour fast. The caller's thread is on the producer's host.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from imagemill.producer.client import Client
from imagemill.producer.sources import SourceRow
from imagemill.shared.connection import connect
from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.fleet import Fleet
from imagemill.shared.s3 import ensure_bucket, make_client, split
from imagemill.shared.settings import load_settings
from tests.conftest import client_for, environment_for, photo
from tests.faults.jobs import check_done
from tests.integration.jobs import spec
from tests.services.hosts import Hosts
from tests.services.redis import configured_redis
from tests.services.s3 import S3Server, changed_environment
from tests.workers import ROOT, wait_until

REDIS = ["bind 0.0.0.0", "port PORT", "requirepass hush", "masterauth hush", "appendonly yes"]
BUCKET = "hosts"
# Not libfaketime: Python's time.sleep fails with it.
AN_HOUR_FAST = """
import time
from datetime import timedelta
from botocore import compat
right, right_date = time.time, compat.get_current_datetime
time.time = lambda: right() + 3600
compat.get_current_datetime = lambda *args, **more: right_date(*args, **more) + timedelta(hours=1)
"""


class SeveralHosts:
    """Everything is up on entry. `lease` is in seconds."""

    def __init__(self, folder: Path, *, lease: float = 3.0) -> None:
        self.folder, self._lease = folder, lease
        self.logs = [folder / "near.log", folder / "far.log"]

    def __enter__(self) -> SeveralHosts:
        self._exit = ExitStack()
        try:
            self.hosts = self._exit.enter_context(Hosts("store", "standby", "near", "far", "producer"))
            url = self._start_redis()
            with self.hosts.at("store"):
                s3 = self._exit.enter_context(S3Server(self.hosts.address("store")))
            self._exit.enter_context(self.hosts.at("producer"))
            self._exit.enter_context(changed_environment(s3.environment))
            self.s3: Any = make_client(load_settings(s3={"endpoint_url": s3.endpoint_url}).s3)
            ensure_bucket(self.s3, BUCKET, True, "us-east-1")
            self.client: Client = self._exit.enter_context(client_for(url))
            self.fleet = Fleet(url)
            self._exit.callback(self.fleet.close)
            self._start_nodes(url, {"IMAGEMILL_S3__ENDPOINT_URL": s3.endpoint_url, **s3.environment})
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _start_redis(self) -> str:
        """A primary, a replica and three Sentinels; returns the URL."""
        hosts, folder = self.hosts, self.folder
        ends = {name: f"replica-announce-ip {hosts.address(name)}" for name in ("store", "standby")}
        with hosts.at("store"):
            port = self._exit.enter_context(configured_redis(folder / "primary", *REDIS, ends["store"]))
            with connect(f"redis://:hush@127.0.0.1:{port}") as admin:
                self._primary: int = admin.info("server")["process_id"]
        follow = f"replicaof {hosts.address('store')} {port}"
        with hosts.at("standby"):
            self._exit.enter_context(configured_redis(folder / "replica", *REDIS, ends["standby"], follow))
        sentinels = []
        for name in ("store", "standby", "producer"):
            lines = [
                "bind 0.0.0.0",
                "port PORT",
                "protected-mode no",
                f"sentinel monitor main {hosts.address('store')} {port} 2",
                "sentinel auth-pass main hush",
                "sentinel down-after-milliseconds main 1500",
                "sentinel failover-timeout main 6000",
            ]
            with hosts.at(name):
                its = self._exit.enter_context(configured_redis(folder / f"sentinel-{name}", *lines, sentinel=True))
            sentinels.append(f"{hosts.address(name)}:{its}")
        return f"redis+sentinel://:hush@{','.join(sentinels)}/main"

    def _start_nodes(self, url: str, settings: dict[str, str]) -> None:
        settings |= {"IMAGEMILL_WORKER__LEASE_SECONDS": str(self._lease), "IMAGEMILL_TEST_SECONDS": "0.1"}
        environment = environment_for(url, self.folder, IMAGEMILL_WORKER__OPERATIONS='["stylize"]') | settings
        command = [sys.executable, str(ROOT / "tests" / "fake_worker.py"), "Invert", "worker", "--cpu", "--concurrency", "1"]
        clock = self.folder / "clock"
        clock.mkdir()
        (clock / "sitecustomize.py").write_text(AN_HOUR_FAST)
        fast = environment | {"PYTHONPATH": f"{clock}{os.pathsep}{environment['PYTHONPATH']}"}
        for count, (name, its, log) in enumerate(zip(("near", "far"), (environment, fast), self.logs, strict=True), 1):
            node = self.hosts.start(name, command, log, its, hostname="box")
            self._exit.callback(node.wait)
            self._exit.callback(node.kill)
            wait_until(lambda: self.ready() == count, f"the node on {name} is ready; log: {log}", 40)  # noqa: B023

    def ready(self) -> int:
        """How many nodes are ready."""
        return sum(node.ready for node in self.fleet.nodes())

    def lose_primary(self) -> None:
        """Kill Redis; its replica takes over once the Sentinels agree."""
        os.kill(self._primary, signal.SIGKILL)

    def submit(self, count: int, first: int = 0) -> str:
        """Submit a job of photos that are in the store, and whose results go there."""
        urls = [f"s3://{BUCKET}/sources/{number}.png" for number in range(first, first + count)]
        for number, url in enumerate(urls):
            self.s3.put_object(Bucket=BUCKET, Key=split(url)[1], Body=photo(number))
        rows = [SourceRow(f"row {number}", {"source": url}) for number, url in enumerate(urls)]
        return self.client.submit(rows, spec("stylize", f"s3://{BUCKET}/out")).job

    def wait_done(self, job: str, count: int) -> None:
        """Wait until this many images are done, even while Redis fails over."""
        self._until(lambda: self.client.status(job).done >= count, f"{count} images done")

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        def reached() -> bool:
            time.sleep(0.1)
            with suppress(BrokerUnavailable):
                return condition()
            return False

        wait_until(reached, what)

    def check(self, job: str, count: int) -> set[str]:
        """Every image is done, right, and stored once; returns the names of the nodes that took part."""
        self._until(lambda: self.client.status(job).over, "the job is over")
        check_done(self.client, job, count, self._read)
        rows = list(self.client.results(job))
        found = self.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"out/{job}/")
        stored = [f"s3://{BUCKET}/{entry['Key']}" for page in found for entry in page.get("Contents", [])]
        assert sorted(stored) == sorted([*(row.output or "" for row in rows), self.client.status(job).manifest or ""])
        return {row.result.node for row in rows if row.result}

    def _read(self, url: str) -> bytes:
        bucket, name = split(url)
        return bytes(self.s3.get_object(Bucket=bucket, Key=name)["Body"].read())


def cut_off_and_fail_over(site: SeveralHosts, seconds: float, count: int) -> str:
    """A host is cut off for `seconds`, while Redis fails over; then it returns, and both work on. Tells what happened."""
    assert {node.node for node in site.fleet.nodes()} == {"cpu@box", "cpu-2@box"}
    job = site.submit(count)
    site.wait_done(job, 20)
    begun = time.monotonic()
    site.hosts.cut_off("far")
    before = site.client.status(job).done
    site.lose_primary()
    site.wait_done(job, before + 10)
    again = time.monotonic() - begun
    time.sleep(max(0.0, seconds - again))  # nothing happens that could be awaited
    site.hosts.join("far")
    second = site.submit(count, first=count)
    both = site.check(job, count) | site.check(second, count)
    assert both == {"cpu@box", "cpu-2@box"}, both
    last = site.check(site.submit(40, first=2 * count), 40)
    assert last == {"cpu@box", "cpu-2@box"}, f"only {last} work after the fault"
    return f"{2 * count + 40} images done by {len(both)} nodes; work went on {again:.1f} s after Redis was lost"
