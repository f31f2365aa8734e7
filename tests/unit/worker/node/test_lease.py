"""LeaseKeeper renews the lease of the current chunk, and signals when to stop working on it."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.ledger.leasing import Lease
from imagemill.shared.messages import Item, Job
from imagemill.worker.node import lease as module
from imagemill.worker.node.lease import LeaseKeeper
from tests.ledgers import Ledger
from tests.workers import wait_until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEWAL_SECONDS", 0.01)


@pytest.fixture
def ledger(redis_server: EmbeddedRedis) -> Iterator[Ledger]:
    ledger = Ledger(redis_server.url, lease_seconds=2)
    yield ledger
    ledger.close()


def leased(ledger: Ledger) -> Lease:
    """The lease of the only chunk of a new job."""
    job = f"lease-{uuid.uuid4().hex[:12]}"
    ledger.open_job(job, Job.model_validate({"operation": "stylize", "output": {"url": "s3://results/x"}}))
    ledger.add_chunks(job, [(0, [Item(index=0, source="https://example.com/a.png")])])
    ledger.seal(job, chunks=1, total=1, duplicates={})
    lease = ledger.acquire(job, 0, task="first", token="first/1")
    assert isinstance(lease, Lease)
    return lease


class Watched:
    """A LeaseKeeper with its arguments; counts the renewals."""

    def __init__(self, ledger: Ledger, lease: Lease, lease_seconds: float = 60) -> None:
        self.stop, self.stopping = threading.Event(), threading.Event()
        self.renewals = 0
        self.keeper = LeaseKeeper(
            ledger, lease, lease_seconds=lease_seconds, stop=self.stop, stopping=self.stopping.is_set, tell=self.count
        )

    def count(self) -> None:
        self.renewals += 1

    def wait_for_renewals(self, more: int) -> None:
        """Return after `more` further renewals."""
        enough = self.renewals + more
        wait_until(lambda: self.renewals >= enough, f"{more} renewals")


def test_keeper_renews_the_lease_and_reports_progress(ledger: Ledger) -> None:
    lease = leased(ledger)
    watched = Watched(ledger, lease)
    with watched.keeper:
        end = time.monotonic() + 2.5  # longer than the lease
        wait_until(lambda: time.monotonic() > end, "an unrenewed lease would have expired")
        assert ledger.acquire(lease.job, 0, task="second", token="second/1") == "held"
    assert watched.renewals > 2
    assert (watched.stop.is_set(), watched.keeper.reason) == (False, None)
    assert not any(thread.name == "lease" for thread in threading.enumerate())


def test_keeper_stops_when_the_job_is_cancelled(ledger: Ledger) -> None:
    lease = leased(ledger)
    watched = Watched(ledger, lease)
    with watched.keeper:
        watched.wait_for_renewals(2)
        assert not watched.stop.is_set()
        ledger.cancel(lease.job)
        assert watched.stop.wait(60)
    assert watched.keeper.reason == "cancelled"


def test_keeper_stops_when_another_worker_takes_the_lease(ledger: Ledger) -> None:
    lease = leased(ledger)
    watched = Watched(ledger, lease)
    with watched.keeper:
        watched.wait_for_renewals(2)
        # The same task again: Celery redelivered its message, assuming that this process had died.
        assert isinstance(ledger.acquire(lease.job, 0, task="first", token="first/2"), Lease)
        assert watched.stop.wait(60)
    assert watched.keeper.reason == "lost"


def test_keeper_of_a_stopping_node_renews_the_lease_until_its_images_are_done(ledger: Ledger) -> None:
    lease = leased(ledger)
    watched = Watched(ledger, lease)
    with watched.keeper:
        watched.stopping.set()
        assert watched.stop.wait(60)
        assert watched.keeper.reason == "stopping"
        watched.wait_for_renewals(3)
        assert ledger.acquire(lease.job, 0, task="second", token="second/1") == "held"
        ledger.cancel(lease.job)
        wait_until(lambda: watched.keeper.reason == "cancelled", "cancellation overrides stopping")


def outages(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.message == "lease not renewed" for record in caplog.records)


class Clock:
    """Replaces the module `time` in a keeper."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_keeper_survives_outages_of_redis_shorter_than_the_lease(
    own_redis: EmbeddedRedis, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    ledger = Ledger(own_redis.url, lease_seconds=60)
    watched = Watched(ledger, leased(ledger), lease_seconds=20)

    def fails_twice() -> None:
        failed = outages(caplog)
        wait_until(lambda: outages(caplog) >= failed + 2, "two renewals have failed")

    with caplog.at_level(logging.WARNING), watched.keeper:
        clock.now = 100
        watched.wait_for_renewals(2)
        own_redis.stop()
        renewals = watched.renewals
        fails_twice()
        clock.now = 119
        fails_twice()
        assert watched.renewals <= renewals + 1, "no progress is reported while Redis is down"
        own_redis.start()
        watched.wait_for_renewals(3)
        assert (watched.stop.is_set(), watched.keeper.reason) == (False, None)
        own_redis.kill()
        clock.now = 138
        fails_twice()
        assert not watched.stop.is_set()
        clock.now = 140
        assert watched.stop.wait(60), "another worker may have the chunk by now"
    assert watched.keeper.reason == "lost"
    ledger.close()
