"""The lease is kept while a chunk is worked on, and the work stops when there is a reason to."""

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
    monkeypatch.setattr(module, "EVERY", 0.01)


@pytest.fixture
def ledger(redis_server: EmbeddedRedis) -> Iterator[Ledger]:
    ledger = Ledger(redis_server.url, lease_seconds=2)
    yield ledger
    ledger.close()


def leased(ledger: Ledger) -> Lease:
    """The lease of a new job's only chunk."""
    job = f"lease-{uuid.uuid4().hex[:12]}"
    ledger.open_job(job, Job.model_validate({"operation": "stylize", "output": {"url": "s3://results/x"}}))
    ledger.add_chunks(job, [(0, [Item(index=0, source="https://example.com/a.png")])])
    ledger.seal(job, chunks=1, total=1, duplicates={})
    lease = ledger.acquire(job, 0, task="first", token="first/1")
    assert isinstance(lease, Lease)
    return lease


class Watched:
    """What a keeper is given, and what it does with it."""

    def __init__(self, ledger: Ledger, lease: Lease, lease_seconds: float = 60) -> None:
        self.stop, self.stopping = threading.Event(), threading.Event()
        self.told = 0
        self.keeper = LeaseKeeper(
            ledger, lease, lease_seconds=lease_seconds, stop=self.stop, stopping=self.stopping.is_set, tell=self.tell
        )

    def tell(self) -> None:
        self.told += 1

    def turns(self, more: int) -> None:
        """Return when it has renewed the lease that many times more."""
        enough = self.told + more
        wait_until(lambda: self.told >= enough, f"{more} renewals")


def test_while_nothing_happens_the_lease_is_kept_and_progress_is_told(ledger: Ledger) -> None:
    lease = leased(ledger)
    watched = Watched(ledger, lease)
    with watched.keeper:
        end = time.monotonic() + 2.5  # longer than the ledger's lease
        wait_until(lambda: time.monotonic() > end, "the lease would have ended")
        assert ledger.acquire(lease.job, 0, task="second", token="second/1") == "held"
    assert watched.told > 2
    assert (watched.stop.is_set(), watched.keeper.reason) == (False, None)
    assert not any(thread.name == "lease" for thread in threading.enumerate())


def test_a_cancelled_job_stops(ledger: Ledger) -> None:
    lease = leased(ledger)
    watched = Watched(ledger, lease)
    with watched.keeper:
        watched.turns(2)
        assert not watched.stop.is_set()
        ledger.cancel(lease.job)
        assert watched.stop.wait(60)
    assert watched.keeper.reason == "cancelled"


def test_a_chunk_that_another_worker_has_stops(ledger: Ledger) -> None:
    lease = leased(ledger)
    watched = Watched(ledger, lease)
    with watched.keeper:
        watched.turns(2)
        # The same task once more: its message came back, so this process is taken for dead.
        assert isinstance(ledger.acquire(lease.job, 0, task="first", token="first/2"), Lease)
        assert watched.stop.wait(60)
    assert watched.keeper.reason == "lost"


def test_a_stopping_node_stops_and_keeps_the_lease_while_the_current_images_end(ledger: Ledger) -> None:
    lease = leased(ledger)
    watched = Watched(ledger, lease)
    with watched.keeper:
        watched.stopping.set()
        assert watched.stop.wait(60)
        assert watched.keeper.reason == "stopping"
        watched.turns(3)
        assert ledger.acquire(lease.job, 0, task="second", token="second/1") == "held"
        ledger.cancel(lease.job)
        wait_until(lambda: watched.keeper.reason == "cancelled", "a better reason comes first")


def outages(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.message == "lease not renewed" for record in caplog.records)


class Clock:
    """Stands for the module `time`, in a keeper whose hours pass in no time."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_redis_may_be_away_for_less_than_the_lease_and_no_longer(
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
        watched.turns(2)
        own_redis.stop()
        told = watched.told
        fails_twice()
        clock.now = 119
        fails_twice()
        assert watched.told <= told + 1, "progress is told where Redis answers"
        own_redis.start()
        watched.turns(3)
        assert (watched.stop.is_set(), watched.keeper.reason) == (False, None)
        own_redis.kill()
        clock.now = 138
        fails_twice()
        assert not watched.stop.is_set()
        clock.now = 140
        assert watched.stop.wait(60), "by now the chunk may be another's"
    assert watched.keeper.reason == "lost"
    ledger.close()
