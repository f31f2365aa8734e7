"""The ledger on a real Redis: no image is lost and none is counted twice, whatever workers do."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.errors import BrokerUnavailable, JobNotFound
from imagemill.shared.ledger import SUBMITTING_SECONDS, Lease, Ledger, pack, unpack
from imagemill.shared.messages import MANIFEST, Chunk, Item, ItemResult, Job, Output, Policy, Priority
from tests.workers import wait_until

pytestmark = pytest.mark.integration

QUEUE = "imagemill.stylize.opencv"
TTL = 7 * 86_400
NUMBERS = itertools.count()


@pytest.fixture
def raw(redis_server: EmbeddedRedis) -> Iterator[Any]:
    with redis.Redis.from_url(redis_server.url, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture
def ledger(redis_server: EmbeddedRedis, raw: Any) -> Iterator[Ledger]:
    made = Ledger(redis_server.url)
    yield made
    made.close()


def spec(priority: Priority = "normal") -> Job:
    return Job(operation="stylize", output=Output(url="s3://results/x"), policy=Policy(priority=priority))


def item(index: int, duplicate_of: int | None = None) -> Item:
    return Item(index=index, source=f"https://example.com/{index}.jpg", duplicate_of=duplicate_of)


def make_job(ledger: Ledger, *sizes: int, duplicates: tuple[int, ...] = (), priority: Priority = "normal") -> str:
    """A sealed job with chunks of these sizes; each of `duplicates` is the index of a first row, repeated in a last chunk."""
    job = f"job-{next(NUMBERS):06d}"
    indexes = iter(range(10_000))
    chunks = [[item(index) for index in itertools.islice(indexes, size)] for size in sizes]
    if duplicates:
        chunks.append([item(next(indexes), first) for first in duplicates])
    ledger.open_job(job, spec(priority))
    ledger.add_chunks(job, enumerate(chunks))
    total = sum(sizes) + len(duplicates)
    ledger.seal(job, chunks=len(chunks), total=total, duplicates={first: duplicates.count(first) for first in duplicates})
    return job


def take(ledger: Ledger, job: str, number: int = 0, task: str = "t", delivery: int = 1) -> Lease:
    lease = ledger.acquire(job, number, task=task, token=f"{task}/{delivery}")
    assert isinstance(lease, Lease)
    return lease


def done(index: int) -> ItemResult:
    return ItemResult(index=index, state="done", output=f"s3://results/x/{index}.png")


def failed(index: int) -> ItemResult:
    return ItemResult(index=index, state="failed", code="not_found", message="there is no such image")


def work(ledger: Ledger, job: str, number: int, bad: set[int] = frozenset()) -> str:  # type: ignore[assignment]
    """Do a chunk as a worker does, and after the last one the manifest; `bad` images fail."""
    lease = take(ledger, job, number)
    for one in lease.items:
        if one.duplicate_of is None:
            ledger.record(job, failed(one.index) if one.index in bad else done(one.index))
    said = ledger.complete(lease)
    if said == "finishing":
        assert ledger.complete(take(ledger, job, MANIFEST), manifest="s3://results/x/manifest.jsonl") == "ok"
    return said


def reap(ledger: Ledger, raw: Any, patience: float = 30.0) -> list[tuple[str, int]]:
    """What the reaper publishes again, as if its turn had come."""
    raw.delete("imagemill:reaper")
    return [(chunk.job, chunk.number) for chunk in ledger.reap("cpu@a", patience=patience)]


def age(raw: Any, job: str, seconds: float, queue: str = QUEUE) -> None:
    """What waits of a job was published this much earlier."""
    for member in raw.zrange(f"imagemill:waiting:{queue}", 0, -1):
        if member.startswith(f"{job}:"):
            raw.zincrby(f"imagemill:waiting:{queue}", -1000 * seconds, member)


def end_lease(raw: Any, job: str, number: int) -> None:
    raw.zadd("imagemill:leased", {f"{job}:{number}": 1}, xx=True)


def keys(raw: Any, job: str) -> list[str]:
    return sorted(raw.scan_iter(f"imagemill:job:{job}*"))


def counts(ledger: Ledger, job: str) -> tuple[str, int, int]:
    status = ledger.status(job)
    return status.state, status.done, status.failed


# --- submitting -------------------------------------------------------------------------------


def test_nothing_of_a_list_is_visible_before_it_is_sealed_and_it_is_forgotten_within_the_hour(ledger: Ledger, raw: Any) -> None:
    ledger.open_job("job-unsealed", spec())
    ledger.add_chunks("job-unsealed", [(0, [item(0)])])
    assert ledger.acquire("job-unsealed", 0, task="t", token="t/1") == "gone"
    assert reap(ledger, raw, patience=0.0) == []
    assert ledger.jobs() == []
    assert ledger.cancel("job-unsealed") == "over"
    assert ledger.retry("job-unsealed") == []
    assert counts(ledger, "job-unsealed") == ("submitting", 0, 0)
    assert all(0 < raw.ttl(key) <= SUBMITTING_SECONDS for key in keys(raw, "job-unsealed"))
    ledger.discard("job-unsealed")
    assert raw.keys("*job-unsealed*") == []


def test_a_list_that_took_too_long_is_refused_and_leaves_nothing(ledger: Ledger, raw: Any) -> None:
    ledger.open_job("job-slow", spec())
    ledger.add_chunks("job-slow", [(0, [item(0), item(1, 0)])])
    raw.delete("imagemill:job:job-slow")  # as after an hour
    with pytest.raises(JobNotFound, match="submit it again"):
        ledger.seal("job-slow", chunks=1, total=2, duplicates={0: 1})
    assert all(raw.ttl(key) > 0 for key in keys(raw, "job-slow"))
    ledger.discard("job-slow")
    assert raw.keys("*job-slow*") == []


def test_a_job_is_sealed_once(ledger: Ledger) -> None:
    job = make_job(ledger, 2)
    with pytest.raises(JobNotFound):
        ledger.seal(job, chunks=1, total=2, duplicates={})


def test_packed_items_are_the_same_when_unpacked() -> None:
    items = [item(0), Item.model_validate({"index": 1, "source": "s3://b/ü.png", "boxes": "1,2,3,4", "name": "画"}), item(2, 0)]
    assert unpack(pack(items)) == items


# --- leases -----------------------------------------------------------------------------------


def test_a_chunk_is_one_workers_until_it_is_done(ledger: Ledger) -> None:
    job = make_job(ledger, 2, 1)
    assert counts(ledger, job)[0] == "queued"
    lease = take(ledger, job)
    assert ([one.index for one in lease.items], lease.lost) == ([0, 1], 0)
    assert counts(ledger, job)[0] == "running"
    assert ledger.acquire(job, 0, task="u", token="u/1") == "held"
    assert ledger.renew(lease) == "ok"
    assert ledger.complete(lease) == "ok"
    assert ledger.acquire(job, 0, task="u", token="u/1") == "gone"
    assert (ledger.renew(lease), ledger.complete(lease), ledger.release(lease)) == ("lost", "lost", False)


def test_the_same_task_once_more_takes_over_at_once_and_counts_as_lost(ledger: Ledger) -> None:
    job = make_job(ledger, 1)
    first = take(ledger, job, task="abc")
    assert ledger.acquire(job, 0, task="ab", token="ab/1") == "held"  # another task, though its name begins alike
    second = take(ledger, job, task="abc", delivery=2)
    assert second.lost == 1
    assert (ledger.renew(first), ledger.complete(first), ledger.release(first)) == ("lost", "lost", False)
    assert take(ledger, job, task="abc", delivery=3).lost == 2


def test_a_lease_that_nobody_renews_ends_and_its_chunk_is_published_again_once(
    redis_server: EmbeddedRedis, ledger: Ledger, raw: Any
) -> None:
    job = make_job(ledger, 1, 1)
    brief = Ledger(redis_server.url, lease_seconds=0.05)
    silent, kept = take(brief, job, 0), take(ledger, job, 1)
    found: list[tuple[str, int]] = []
    wait_until(lambda: found.extend(reap(ledger, raw)) or found, "the lease has ended", 20)
    assert found == [(job, 0)]
    assert reap(ledger, raw) == []
    assert (ledger.renew(silent), ledger.renew(kept)) == ("lost", "ok")
    assert take(ledger, job, 0, task="u").lost == 1
    brief.close()


def test_an_ended_lease_needs_no_reaper_for_another_worker_to_take_its_chunk(ledger: Ledger, raw: Any) -> None:
    job = make_job(ledger, 1)
    late = take(ledger, job)
    end_lease(raw, job, 0)
    assert take(ledger, job, task="u").lost == 1
    assert ledger.complete(late) == "lost"
    assert reap(ledger, raw) == []


def test_a_released_chunk_waits_again_and_does_not_count_as_lost(ledger: Ledger, raw: Any) -> None:
    job = make_job(ledger, 2)
    lease = take(ledger, job)
    ledger.record(job, done(0))
    assert ledger.release(lease)
    assert not ledger.release(lease)
    assert reap(ledger, raw, patience=0.0) == [(job, 0)]
    again = take(ledger, job, task="u")
    assert again.lost == 0
    assert ledger.recorded(job, [one.index for one in again.items]) == {0}


def test_a_chunk_that_the_job_does_not_have_is_gone(ledger: Ledger) -> None:
    job = make_job(ledger, 1, 1)
    for number in (2, 99, MANIFEST):
        assert ledger.acquire(job, number, task="t", token="t/1") == "gone"


# --- the reaper -------------------------------------------------------------------------------


def test_chunks_missing_from_an_idle_queue_come_back(ledger: Ledger, raw: Any) -> None:
    job = make_job(ledger, 1, 1, 1)
    take(ledger, job, 1)
    assert reap(ledger, raw) == []  # not before its patience is over
    age(raw, job, 60)
    assert reap(ledger, raw) == [(job, 0), (job, 2)]
    assert reap(ledger, raw) == []


def test_chunks_that_wait_behind_others_do_not_come_back(ledger: Ledger, raw: Any) -> None:
    early, later = make_job(ledger, 1, 1, 1), make_job(ledger, 1, 1)
    age(raw, early, 120)
    age(raw, later, 60)
    raw.lpush(QUEUE, "a message")
    take(ledger, early, 0)
    assert reap(ledger, raw) == []
    take(ledger, early, 1)
    take(ledger, later, 0)  # queues are first in, first out: what was published long before this one is lost
    assert reap(ledger, raw) == [(early, 2)]


@pytest.mark.parametrize("priority", ["normal", "high"])
def test_an_ended_job_makes_nobody_think_that_what_waits_is_lost(ledger: Ledger, raw: Any, priority: Any) -> None:
    queue = QUEUE if priority == "normal" else f"{QUEUE}.high"
    waiting = make_job(ledger, 1, 1, 1, priority=priority)
    age(raw, waiting, 120, queue)
    raw.lpush(queue, "a message")
    quick = make_job(ledger, 1, priority=priority)
    age(raw, quick, 120, queue)
    assert work(ledger, quick, 0) == "finishing"
    assert reap(ledger, raw) == []


def test_a_manifest_is_missed_where_it_was_published(ledger: Ledger, raw: Any) -> None:
    job = make_job(ledger, 1)
    assert ledger.cancel(job) == "stopped"
    age(raw, job, 60, f"{QUEUE}.high")
    raw.lpush(f"{QUEUE}.high", "a message")
    assert reap(ledger, raw) == []
    raw.delete(f"{QUEUE}.high")
    raw.lpush(QUEUE, "a message")
    assert reap(ledger, raw) == [(job, MANIFEST)]


def test_only_one_node_reaps_at_a_time(redis_server: EmbeddedRedis, ledger: Ledger, raw: Any) -> None:
    make_job(ledger, 1)
    other = Ledger(redis_server.url)
    assert len(ledger.reap("cpu@a", patience=0.0)) == 1
    assert other.reap("cpu@b", patience=0.0) == []
    assert 0 < raw.pttl("imagemill:reaper") <= 5000
    raw.delete("imagemill:reaper")
    assert len(other.reap("cpu@b", patience=0.0)) == 1
    other.close()


def test_the_reaper_tells_how_many_images_its_messages_hold(ledger: Ledger, raw: Any) -> None:
    job = make_job(ledger, 3, duplicates=(0, 1))
    assert [chunk.images for chunk in ledger.reap("cpu@a", patience=0.0)] == [3, 0]
    assert ledger.chunk(job, MANIFEST) == Chunk(job=job, number=MANIFEST, images=0)


# --- results ----------------------------------------------------------------------------------


def test_an_image_is_recorded_once_however_many_threads_try(ledger: Ledger) -> None:
    job = make_job(ledger, 2, duplicates=(0, 0))
    take(ledger, job)
    start, answers = threading.Barrier(8), []

    def record(thread: int) -> None:
        start.wait()
        answers.extend([ledger.record(job, done(0) if (thread + n) % 2 else failed(0)) for n in range(5)])

    threads = [threading.Thread(target=record, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False] * 39 + [True]
    status = ledger.status(job)
    assert sorted((status.done, status.failed)) == [0, 3]
    assert len(ledger.follow(job)[1]) == 1
    assert ledger.recorded(job, [0, 1, 7]) == {0}


def test_a_job_goes_from_queued_to_done_and_its_manifest_is_written_once(ledger: Ledger) -> None:
    job = make_job(ledger, 2, 1, duplicates=(2,))
    assert work(ledger, job, 0, bad={1}) == "ok"
    assert counts(ledger, job) == ("running", 1, 1)
    assert work(ledger, job, 1) == "ok"
    lease = take(ledger, job, 2)
    assert ledger.complete(lease) == "finishing"
    status = ledger.status(job)
    assert (status.state, status.over, status.manifest, status.ended) == ("finishing", False, None, None)
    manifest = take(ledger, job, MANIFEST)
    assert ledger.acquire(job, MANIFEST, task="u", token="u/1") == "held"
    assert ledger.complete(manifest, manifest="s3://results/x/m.jsonl") == "ok"
    status = ledger.status(job)
    assert (status.state, status.total, status.done, status.failed, status.duplicates) == ("done", 4, 3, 1, 1)
    assert status.manifest == "s3://results/x/m.jsonl"
    assert status.ended is not None
    assert status.seconds == pytest.approx(status.ended - status.created, abs=0.001)
    assert ledger.acquire(job, MANIFEST, task="u", token="u/1") == "gone"


def test_a_worker_that_lost_its_manifest_does_not_say_where_it_is(ledger: Ledger) -> None:
    job = make_job(ledger, 1)
    assert ledger.complete(take(ledger, job)) == "finishing"
    late = take(ledger, job, MANIFEST)
    take(ledger, job, MANIFEST, delivery=2)
    assert ledger.complete(late, manifest="s3://results/x/m.jsonl") == "lost"
    status = ledger.status(job)
    assert (status.state, status.manifest) == ("finishing", None)


def test_rows_tell_what_became_of_each_image_and_duplicates_share_it(ledger: Ledger, raw: Any) -> None:
    job = make_job(ledger, 3, duplicates=(0, 1, 2))
    ledger.record(job, done(0))
    ledger.record(job, failed(1))
    before = [row.state for row in ledger.rows(job)]
    assert before == ["done", "failed", "pending"] * 2
    assert ledger.cancel(job) == "stopped"
    writing = list(ledger.rows(job))  # as the manifest is written from
    ledger.complete(take(ledger, job, MANIFEST))
    assert list(ledger.rows(job)) == writing
    assert [row.state for row in writing] == ["done", "failed", "cancelled"] * 2
    assert [row.duplicate_of for row in writing] == [None] * 3 + [0, 1, 2]
    assert writing[3].output == writing[0].output == "s3://results/x/0.png"
    assert writing[4].code == "not_found"


def test_results_are_pushed_in_the_order_in_which_they_were_recorded(ledger: Ledger) -> None:
    job = make_job(ledger, 3)
    place, results = ledger.follow(job, wait=0.01)
    assert (place, results) == ("0", [])
    recorder = threading.Timer(0.05, lambda: [ledger.record(job, result) for result in (done(2), failed(0))])
    recorder.start()
    found: list[int] = []
    while len(found) < 2:
        place, results = ledger.follow(job, since=place, wait=60.0)
        found += [result.index for result in results]
    assert found == [2, 0]
    recorder.join()
    assert ledger.follow(job, since=place, wait=0.01) == (place, [])


def test_a_long_wait_for_results_is_not_taken_for_a_dead_redis(redis_server: EmbeddedRedis, raw: Any) -> None:
    ledger = Ledger(f"{redis_server.url}?socket_timeout=0.4")
    job = make_job(ledger, 1)
    assert ledger.follow(job, wait=60.0) == ("0", [])
    ledger.close()


# --- cancel and retry -------------------------------------------------------------------------


def test_cancel_stops_what_waits_and_tells_who_works(ledger: Ledger) -> None:
    job = make_job(ledger, 1, 1, 1)
    assert work(ledger, job, 0) == "ok"
    lease = take(ledger, job, 1)
    assert ledger.cancel(job) == "stopping"
    assert ledger.acquire(job, 2, task="u", token="u/1") == "gone"
    assert ledger.renew(lease) == "cancelled"
    assert ledger.cancel(job) == "stopping"  # once more is no harm
    assert ledger.complete(lease) == "finishing"
    assert ledger.cancel(job) == "over"
    manifest = take(ledger, job, MANIFEST)
    assert ledger.renew(manifest) == "ok"  # it is written for a cancelled job too
    ledger.complete(manifest)
    assert counts(ledger, job) == ("cancelled", 1, 0)
    assert ledger.cancel(job) == "over"


def test_cancelling_what_nobody_works_on_stops_it_at_once(ledger: Ledger, raw: Any) -> None:
    job = make_job(ledger, 1, 1)
    ledger.release(take(ledger, job))
    assert ledger.cancel(job) == "stopped"
    assert counts(ledger, job)[0] == "finishing"
    assert reap(ledger, raw, patience=0.0) == [(job, MANIFEST)]


def test_retry_queues_only_what_failed_or_was_never_done(ledger: Ledger, raw: Any) -> None:
    job = make_job(ledger, 2, 2, 2, 1, duplicates=(1,))
    assert ledger.retry(job) == []
    work(ledger, job, 0, bad={1})
    work(ledger, job, 1)
    lease = take(ledger, job, 2)
    ledger.record(job, done(4))
    assert ledger.cancel(job) == "stopping"
    ledger.complete(lease)
    ledger.complete(take(ledger, job, MANIFEST))
    assert counts(ledger, job) == ("cancelled", 4, 2)
    assert ledger.retry(job) == [Chunk(job=job, number=number, images=1) for number in (0, 2, 3)]
    assert ledger.retry(job) == []
    assert counts(ledger, job) == ("queued", 4, 0)
    assert ledger.status(job).ended is None
    assert [ledger.recorded(job, [index]) != set() for index in range(7)] == [True, False, True, True, True, False, False]
    assert ledger.acquire(job, 1, task="t", token="t/1") == "gone"
    assert ledger.renew(take(ledger, job, 0)) == "ok"  # it is cancelled no longer
    assert sorted(reap(ledger, raw, patience=0.0)) == [(job, 2), (job, 3)]
    ledger.release(Lease(job, 0, "t/1", 0, []))
    assert [work(ledger, job, number) for number in (0, 2, 3)] == ["ok", "ok", "finishing"]
    assert counts(ledger, job) == ("done", 8, 0)
    assert ledger.retry(job) == []


def test_retry_forgets_how_often_an_image_was_tried_and_its_worker_lost(ledger: Ledger) -> None:
    job = make_job(ledger, 1)
    take(ledger, job)
    assert take(ledger, job, delivery=2).lost == 1
    assert [ledger.count_attempt(job, 0) for _ in range(3)] == [1, 2, 3]
    ledger.forget_attempt(job, 0)
    assert ledger.attempts(job, [0, 1]) == {0: 2, 1: 0}
    ledger.count_attempt(job, 0)
    assert ledger.attempts(job, [0, 1]) == {0: 3, 1: 0}
    ledger.record(job, failed(0))
    ledger.complete(Lease(job, 0, "t/2", 1, []))
    ledger.complete(take(ledger, job, MANIFEST))
    ledger.retry(job)
    assert ledger.attempts(job, [0]) == {0: 0}
    assert take(ledger, job).lost == 0


def test_a_manifest_that_was_being_written_does_not_end_a_job_that_is_retried(ledger: Ledger, raw: Any) -> None:
    job = make_job(ledger, 1)
    work(ledger, job, 0, bad={0})
    raw.hset(f"imagemill:job:{job}", "state", "finishing")
    manifest = take(ledger, job, MANIFEST)
    raw.hset(f"imagemill:job:{job}", "state", "done")
    assert len(ledger.retry(job)) == 1
    assert ledger.complete(manifest) == "lost"
    assert work(ledger, job, 0) == "finishing"
    assert counts(ledger, job) == ("done", 1, 0)


# --- forgetting -------------------------------------------------------------------------------


def test_all_of_a_job_expires_whatever_happens_to_it(redis_server: EmbeddedRedis, ledger: Ledger, raw: Any) -> None:
    job = make_job(ledger, 2, 1, 1, duplicates=(0,))
    for key in ("queue", "manifest_queue"):
        assert raw.hget(f"imagemill:job:{job}", key)
    steps: list[Callable[[], Any]] = [
        lambda: take(ledger, job),
        lambda: ledger.count_attempt(job, 0),
        lambda: ledger.record(job, failed(0)),
        lambda: end_lease(raw, job, 0),
        lambda: reap(ledger, raw),
        lambda: ledger.complete(take(ledger, job)),
        lambda: ledger.release(take(ledger, job, 1)),
        lambda: ledger.cancel(job),
        lambda: ledger.complete(take(ledger, job, MANIFEST), manifest="s3://results/x/m.jsonl"),
        lambda: ledger.retry(job),
        lambda: take(ledger, job),
        lambda: ledger.record(job, done(0)),
    ]
    seen = set()
    for step in steps:
        step()
        seen.update(keys(raw, job))
        assert {key: raw.ttl(key) for key in keys(raw, job) if not TTL - 60 < raw.ttl(key) <= TTL} == {}
    parts = ("chunks", "results", "events", "duplicates", "attempts", "leases", "lost", "finished")
    assert seen == {f"imagemill:job:{job}", *(f"imagemill:job:{job}:{part}" for part in parts)}


def test_the_days_of_a_job_are_a_setting(redis_server: EmbeddedRedis, raw: Any) -> None:
    ledger = Ledger(redis_server.url, expire_days=0.5)
    job = make_job(ledger, 1)
    assert {raw.ttl(key) // 60 for key in keys(raw, job)} <= {719, 720}
    raw.zincrby("imagemill:jobs", -43_300_000, job)
    assert ledger.jobs() == []
    ledger.close()


def test_an_expired_job_is_forgotten_everywhere(ledger: Ledger, raw: Any) -> None:
    job, other = make_job(ledger, 1, 1), make_job(ledger, 1)
    lease = take(ledger, job)
    end_lease(raw, job, 0)
    raw.delete(*keys(raw, job))
    assert not ledger.record(job, done(0))
    assert (ledger.renew(lease), ledger.complete(lease), ledger.release(lease)) == ("lost", "lost", False)
    assert ledger.acquire(job, 1, task="t", token="t/1") == "gone"
    assert reap(ledger, raw, patience=0.0) == [(other, 0)]
    assert [status.job for status in ledger.jobs()] == [other]
    assert keys(raw, job) == []
    assert raw.zrange("imagemill:leased", 0, -1) == []
    assert raw.zrange(f"imagemill:waiting:{QUEUE}", 0, -1) == [f"{other}:0"]
    assert raw.zrange("imagemill:jobs", 0, -1) == [other]


def test_an_unknown_job_is_named(ledger: Ledger) -> None:
    calls: list[Callable[[str], Any]] = [
        ledger.status,
        ledger.spec,
        ledger.cancel,
        ledger.retry,
        lambda job: list(ledger.rows(job)),
    ]
    for call in calls:
        with pytest.raises(JobNotFound, match="260730-00000000"):
            call("260730-00000000")
    assert ledger.acquire("260730-00000000", 0, task="t", token="t/1") == "gone"
    assert ledger.follow("260730-00000000", wait=0.01) == ("0", [])


# --- without Redis ----------------------------------------------------------------------------

LEASE = Lease("job-lost", 0, "t/1", 0, [])
CALLS: dict[str, Callable[[Ledger], Any]] = {
    "open_job": lambda ledger: ledger.open_job("job-lost", spec()),
    "add_chunks": lambda ledger: ledger.add_chunks("job-lost", [(0, [item(0)])]),
    "seal": lambda ledger: ledger.seal("job-lost", chunks=1, total=1, duplicates={0: 1}),
    "discard": lambda ledger: ledger.discard("job-lost"),
    "acquire": lambda ledger: ledger.acquire("job-lost", 0, task="t", token="t/1"),
    "renew": lambda ledger: ledger.renew(LEASE),
    "recorded": lambda ledger: ledger.recorded("job-lost", [0]),
    "record": lambda ledger: ledger.record("job-lost", done(0)),
    "complete": lambda ledger: ledger.complete(LEASE, manifest="s3://results/m"),
    "release": lambda ledger: ledger.release(LEASE),
    "count_attempt": lambda ledger: ledger.count_attempt("job-lost", 0),
    "forget_attempt": lambda ledger: ledger.forget_attempt("job-lost", 0),
    "attempts": lambda ledger: ledger.attempts("job-lost", [0]),
    "reap": lambda ledger: ledger.reap("cpu@a"),
    "spec": lambda ledger: ledger.spec("job-lost"),
    "status": lambda ledger: ledger.status("job-lost"),
    "jobs": lambda ledger: ledger.jobs(),
    "rows": lambda ledger: list(ledger.rows("job-lost")),
    "follow": lambda ledger: ledger.follow("job-lost"),
    "cancel": lambda ledger: ledger.cancel("job-lost"),
    "retry": lambda ledger: ledger.retry("job-lost"),
    "chunk": lambda ledger: ledger.chunk("job-lost", 0),
}


def test_every_call_is_tried_without_redis() -> None:
    assert set(CALLS) == {name for name, _ in inspect.getmembers(Ledger, inspect.isfunction) if name[0] != "_"} - {"close"}


@pytest.mark.parametrize("name", CALLS)
def test_without_redis_each_call_says_so(name: str) -> None:
    ledger = Ledger("redis://:secret@127.0.0.1:1/0")
    with pytest.raises(BrokerUnavailable, match=r"^Redis: ") as caught:
        CALLS[name](ledger)
    assert "secret" not in caught.value.message
