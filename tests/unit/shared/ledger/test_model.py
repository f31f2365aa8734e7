"""The ledger checked against a model: a few chunks and workers, and everything that can happen to them, in any order."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.ledger.leasing import Lease
from imagemill.shared.messages import MANIFEST, Item, ItemResult
from tests.ledgers import Ledger
from tests.unit.shared.ledger.jobs import QUEUE, spec

pytestmark = pytest.mark.integration

WORKERS = st.integers(0, 2)
CHUNKS = st.integers(MANIFEST, 3)
JOBS, TASKS = itertools.count(), itertools.count()


@dataclass
class Held:
    """A lease in the model: the newest delivery of a chunk."""

    token: str
    ended: bool = False


@dataclass
class Model:
    """The expected state of a job."""

    chunks: dict[int, list[int]]
    shared: dict[int, int]
    state: str = "queued"
    cancelled: bool = False
    waiting: set[int] = field(default_factory=set)
    held: dict[int, Held] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    lost: dict[int, int] = field(default_factory=dict)
    results: dict[int, str] = field(default_factory=dict)

    def count(self, state: str) -> int:
        return sum(1 + self.shared.get(index, 0) for index, known in self.results.items() if known == state)

    def lose(self, number: int) -> None:
        self.lost[number] = self.lost.get(number, 0) + 1

    def close(self, number: int) -> bool:
        """Mark a chunk as finished; returns whether it was the job's last."""
        self.finished.add(number)
        if self.finished == set(self.chunks):
            self.state = "finishing"
            self.waiting.add(MANIFEST)
        return self.state == "finishing"


class Ledgers(RuleBasedStateMachine):
    """Workers take, record, finish, release, fall silent and return; users cancel and retry; the reaper reaps."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(self.url)
        self.raw = redis.Redis.from_url(self.url, decode_responses=True)
        self.workers: dict[int, Lease] = {}

    @initialize(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3), repeated=st.lists(st.integers(0, 8), max_size=2))
    def submit(self, sizes: list[int], repeated: list[int]) -> None:
        self.raw.flushall()
        self.job = f"job-{next(JOBS):06d}"
        indexes = itertools.count()
        chunks = [[Item(index=next(indexes), source="https://a.example/a.png") for _ in range(size)] for size in sizes]
        shared: dict[int, int] = {}
        for place in repeated:
            first = place % sum(sizes)
            shared[first] = shared.get(first, 0) + 1
            chunks[-1].append(Item(index=next(indexes), source="https://a.example/a.png", duplicate_of=first))
        self.total = sum(len(chunk) for chunk in chunks)
        self.ledger.open_job(self.job, spec())
        self.ledger.add_chunks(self.job, enumerate(chunks))
        self.ledger.seal(self.job, chunks=len(chunks), total=self.total, duplicates=shared)
        own = {n: [item.index for item in chunk if item.duplicate_of is None] for n, chunk in enumerate(chunks)}
        self.model = Model(own, shared, waiting=set(own))

    # --- workers --------------------------------------------------------------------

    @rule(worker=WORKERS, number=CHUNKS, again=st.booleans())
    def acquire(self, worker: int, number: int, again: bool) -> None:
        """A message arrives: from the task that already has the chunk, or from another."""
        model, held = self.model, self.model.held.get(number)
        task = held.token.partition("/")[0] if held and again else f"t{next(TASKS)}"
        token = f"{task}/{next(TASKS)}"
        answer = self.ledger.acquire(self.job, number, task=task, token=token)
        open_chunk = number in model.chunks and number not in model.finished and model.state in ("queued", "running")
        if not (open_chunk or (number == MANIFEST and model.state == "finishing")):
            assert answer == "gone"
            return
        if held and not held.ended and not again:
            assert answer == "held"
            return
        if held:
            model.lose(number)
        model.held[number] = Held(token)
        model.waiting.discard(number)
        if model.state == "queued":
            model.state = "running"
        assert isinstance(answer, Lease)
        assert answer.lost == model.lost.get(number, 0)
        assert [item.index for item in answer.items if item.duplicate_of is None] == model.chunks.get(number, [])
        self.workers[worker] = answer  # the worker crashed and forgets its previous chunk

    @precondition(lambda self: self.workers)
    @rule(worker=WORKERS, failing=st.booleans())
    def record(self, worker: int, failing: bool) -> None:
        """A worker, even one that has lost its lease, records the image it believes to be next."""
        lease = self.workers.get(worker)
        if lease is None or lease.number == MANIFEST:
            return
        own = self.model.chunks[lease.number]
        index = next((index for index in own if index not in self.model.results), own[0] if own else None)
        if index is not None:
            self.record_image(index, "failed" if failing else "done")

    def record_image(self, index: int, state: Any) -> None:
        new = self.ledger.record(self.job, ItemResult(index=index, state=state))
        assert new == (index not in self.model.results)
        self.model.results.setdefault(index, state)

    @precondition(lambda self: self.workers)
    @rule(worker=WORKERS, failing=st.booleans())
    def finish(self, worker: int, failing: bool) -> None:
        """A worker records the rest of its chunk, unless the job was cancelled, and completes it."""
        lease = self.workers.pop(worker, None)
        if lease is None:
            return
        answer = self.ledger.renew(lease)
        holds = self.has(lease)
        expected = "cancelled" if self.model.cancelled and lease.number != MANIFEST else "ok"
        assert answer == (expected if holds else "lost")
        if holds:
            self.model.held[lease.number].ended = False
        if answer == "ok":
            for index in self.model.chunks.get(lease.number, []):
                self.record_image(index, "failed" if failing else "done")
        self.complete(lease)

    def complete(self, lease: Lease) -> None:
        holds = self.has(lease)
        answer = self.ledger.complete(lease)
        if not holds:
            assert answer == "lost"
            return
        del self.model.held[lease.number]
        if lease.number == MANIFEST:
            assert answer == "ok"
            self.model.state = "cancelled" if self.model.cancelled else "done"
        else:
            assert answer == ("finishing" if self.model.close(lease.number) else "ok")

    @precondition(lambda self: self.workers)
    @rule(worker=WORKERS)
    def release(self, worker: int) -> None:
        lease = self.workers.pop(worker, None)
        if lease is None:
            return
        assert self.ledger.release(lease) == self.has(lease)
        if self.has(lease):
            del self.model.held[lease.number]
            self.model.waiting.add(lease.number)

    def has(self, lease: Lease) -> bool:
        held = self.model.held.get(lease.number)
        return held is not None and held.token == lease.token

    # --- failures ---------------------------------------------------------------

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def fall_silent(self, data: st.DataObject) -> None:
        """A lease expires; its worker may be dead or only slow."""
        self.end_lease(data.draw(st.sampled_from(sorted(self.model.held))))

    def end_lease(self, number: int) -> None:
        self.model.held[number].ended = True
        self.raw.zadd("imagemill:leased", {f"{self.job}:{number}": 1})

    @rule()
    def reap(self) -> None:
        self.reaped()

    def reaped(self) -> set[int]:
        """The chunks that the reaper republishes: all that wait, since no queue holds them."""
        for number, held in list(self.model.held.items()):
            if held.ended:
                del self.model.held[number]
                self.model.lose(number)
                self.model.waiting.add(number)
        self.raw.delete("imagemill:reaper")
        republished = {chunk.number for chunk in self.ledger.reap("cpu@a", patience=0.0)}
        assert republished == self.model.waiting
        return republished

    @precondition(lambda self: self.model.state not in ("done", "cancelled"))
    @rule(failing=st.booleans())
    def run_to_the_end(self, failing: bool) -> None:
        """From any state, one worker and the reaper can end the job."""
        self.workers.clear()
        for _ in range(3 * len(self.model.chunks) + 3):
            for number in list(self.model.held):
                self.end_lease(number)
            for number in self.reaped():
                self.acquire(0, number, again=False)
                self.finish(0, failing)
            if self.ledger.status(self.job).over:
                break
        status = self.ledger.status(self.job)
        assert status.state == ("cancelled" if self.model.cancelled else "done")
        assert status.state == "cancelled" or status.done + status.failed == status.total
        assert self.model.waiting == set(self.model.held) == set()

    # --- users ----------------------------------------------------------------------

    @rule()
    def cancel(self) -> None:
        answer = self.ledger.cancel(self.job)
        if self.model.state not in ("queued", "running"):
            assert answer == "over"
            return
        self.model.cancelled = True
        for number in sorted(self.model.waiting):
            self.model.close(number)
        self.model.waiting &= {MANIFEST}
        assert answer == ("stopped" if self.model.state == "finishing" else "stopping")

    @rule()
    def retry(self) -> None:
        model = self.model
        expected = {}
        if model.state in ("done", "cancelled"):
            for number, own in model.chunks.items():
                again = [index for index in own if model.results.get(index) != "done"]
                if again:
                    expected[number] = len(again)
                    model.results = {index: state for index, state in model.results.items() if index not in again}
                    model.lost.pop(number, None)
                    model.lost.pop(MANIFEST, None)
                    model.finished.discard(number)
                    model.waiting.add(number)
                    model.state, model.cancelled = "queued", False
        assert {chunk.number: chunk.images for chunk in self.ledger.retry(self.job)} == expected

    # --- invariants --------------------------------------------------------------

    @invariant()
    def status_matches_the_model(self) -> None:
        model, status = self.model, self.ledger.status(self.job)
        assert (status.state, status.done, status.failed) == (model.state, model.count("done"), model.count("failed"))
        assert status.done + status.failed <= status.total == self.total
        results = {row.index: row.result.state for row in self.ledger.rows(self.job) if row.duplicate_of is None and row.result}
        assert results == model.results

    @invariant()
    def every_chunk_is_finished_waiting_or_held_once(self) -> None:
        model = self.model
        waiting = self.raw.zrange(f"imagemill:waiting:{QUEUE}", 0, -1) + self.raw.zrange(
            f"imagemill:waiting:{QUEUE}.high", 0, -1
        )
        leased, tokens = self.raw.zrange("imagemill:leased", 0, -1), self.raw.hgetall(f"imagemill:job:{self.job}:leases")
        assert sorted(waiting) == sorted(f"{self.job}:{number}" for number in model.waiting)
        assert sorted(leased) == sorted(f"{self.job}:{number}" for number in model.held)
        assert tokens == {str(number): held.token for number, held in model.held.items()}
        due = {MANIFEST} if model.state == "finishing" else set(model.chunks) - model.finished
        assert model.waiting ^ set(model.held) == model.waiting | set(model.held) == due

    def teardown(self) -> None:
        try:
            if hasattr(self, "model"):
                self.run_to_the_end(failing=False)
        finally:
            self.ledger.close()
            self.raw.close()


def test_no_image_is_lost_or_counted_twice(redis_server: EmbeddedRedis) -> None:
    machine = type("Machine", (Ledgers,), {"url": redis_server.url})
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine, settings=settings(max_examples=70, stateful_step_count=30, deadline=None, suppress_health_check=checks)
    )
