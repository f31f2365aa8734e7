"""Leases and results: every image is at one child, and has one result."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import redis

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.ledger.leasing import ManifestDue, Record, Recorded, Renewal, Share, WorkLedger
from imagemill.shared.ledger.scripts import key
from imagemill.shared.ledger.submitting import SubmitLedger
from tests.ledgers import Ledger
from tests.unit.shared.ledger.jobs import (
    CHILD,
    LANE,
    OTHER,
    ask,
    counts,
    die,
    done,
    failed,
    indexes,
    make_job,
    nothing_left,
    run,
    take,
    work,
    write_manifest,
)
from tests.workers import wait_until

pytestmark = pytest.mark.integration


def renew(worker: WorkLedger, *leases: Share | ManifestDue, child: str = CHILD) -> list[str]:
    return list(worker.renew(child, [LANE], leases).verdicts)


# --- giving back ---------------------------------------------------------------------------------


def test_images_given_back_are_the_next_to_be_handed_out_and_in_order(producer: SubmitLedger, worker: WorkLedger) -> None:
    make_job(producer, 200)
    share = take(worker, room=80)
    assert worker.give_back(share, CHILD, kept=[0, 50], returned=[1, *range(33, 36), 40, 70])
    assert indexes(take(worker, OTHER, room=3)) == [1, 33, 34]
    assert indexes(take(worker, OTHER, room=4)) == [35, 40, 70, 80]


def test_images_from_packs_in_mixed_order_are_handed_out_once(producer: SubmitLedger, worker: WorkLedger) -> None:
    make_job(producer, 64)
    share = take(worker, room=64)
    for returned in ([1], [40], [2], [41]):
        share_left = sorted(share.indexes - set(returned))
        assert worker.give_back(share, CHILD, kept=share_left, returned=returned)
        share = Share(share.job, share.number, frozenset(share_left), share.items)
    assert sorted(indexes(take(worker, OTHER))) == [1, 2, 40, 41]


def test_images_given_back_twice_are_handed_out_once(producer: SubmitLedger, worker: WorkLedger) -> None:
    """The answer to the first call was lost, and the child asks again."""
    make_job(producer, 6)
    share = take(worker)
    for _ in range(2):
        assert worker.give_back(share, CHILD, kept=[0, 5], returned=[1, 2, 3])
    worker.record(share.job, done(4))
    assert indexes(take(worker, OTHER)) == [1, 2, 3]
    assert ask(worker, OTHER) == "none"


def test_share_ends_when_nothing_is_kept(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 4, owner="ann")
    share = take(worker)
    assert raw.hget("imagemill:running", "ann") == "4"
    worker.record(job, done(0))
    assert worker.give_back(share, CHILD, kept=[1], returned=[2, 3])
    assert raw.hget("imagemill:running", "ann") == "1"
    assert worker.give_back(share, CHILD, returned=[1])
    assert not worker.give_back(share, CHILD, returned=[1])
    assert raw.hget("imagemill:running", "ann") is None
    assert renew(worker, share) == ["lost"]
    assert [index for _, index in run(worker)] == [1, 2, 3]
    assert nothing_left(raw)


def test_returned_images_that_have_a_result_stay_done(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    """A child returns all that it doesn't keep, so that a record that Redis has forgotten is made again."""
    job = make_job(producer, 4)
    share = take(worker)
    for index in (0, 1, 3):
        worker.record(job, done(index))
    raw.hdel(f"imagemill:job:{job}:results", "1")
    assert worker.give_back(share, CHILD, kept=[2], returned=[0, 1, 3])
    assert indexes(take(worker, OTHER)) == [1]


def test_number_of_a_share_does_not_return_when_redis_forgets_it(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 4)
    before = raw.hgetall(f"imagemill:job:{job}")
    share = take(worker, room=1)
    raw.delete(f"imagemill:job:{job}", f"imagemill:job:{job}:shares")
    raw.hset(f"imagemill:job:{job}", mapping=before)
    again = take(worker, room=1)
    assert (indexes(again), renew(worker, share, again)) == ([0], ["lost", "ok"])


def test_only_its_child_can_give_a_share_back_or_renew_it(producer: SubmitLedger, worker: WorkLedger) -> None:
    make_job(producer, 2)
    share = take(worker)
    assert not worker.give_back(share, OTHER, returned=[0, 1])
    assert renew(worker, share, child=OTHER) == ["lost"]
    assert ask(worker, OTHER) == "none"
    assert renew(worker, share) == ["ok"]


# --- renewing ------------------------------------------------------------------------------------


def test_share_is_lost_unless_renewed(redis_server: EmbeddedRedis, producer: SubmitLedger, worker: WorkLedger) -> None:
    make_job(producer, 2)
    brief = WorkLedger(redis_server.url, lease_seconds=0.05)
    silent, kept = take(brief, room=1), take(brief, room=1)
    assert renew(worker, kept) == ["ok"]
    wait_until(lambda: len(worker.tend()[0]) == 1, "the lease has expired", 20)
    assert renew(worker, silent, kept) == ["lost", "ok"]
    brief.close()


def test_share_yields_to_a_higher_priority(producer: SubmitLedger, worker: WorkLedger) -> None:
    make_job(producer, 10, owner="ann")
    shares = [take(worker, room=2), take(worker, room=2)]
    assert worker.renew(CHILD, [LANE], shares).verdicts == ["ok", "ok"]
    urgent = make_job(producer, 10, owner="ann", priority="high")
    renewal = worker.renew(CHILD, [LANE], shares)
    assert (renewal.urgent, renewal.verdicts) == (urgent, ["yield", "yield"])
    assert worker.renew(CHILD, [], shares).verdicts == ["ok", "ok"]  # a child that can't work on it
    assert take(worker, room=10).job == urgent
    assert worker.renew(CHILD, [LANE], shares).verdicts == ["ok", "ok"]


@pytest.mark.parametrize("owner", ["ann", "bob"])
def test_job_that_the_child_can_not_work_on_keeps_none_behind_it_waiting(
    owner: str, producer: SubmitLedger, worker: WorkLedger
) -> None:
    low = make_job(producer, 10, owner="ann", priority="low")
    share = take(worker, room=2)
    stuck = make_job(producer, 10, owner="ann", priority="high")
    assert worker.renew(CHILD, [LANE], [share], [stuck]) == Renewal(low, LANE, ["ok"])
    behind = make_job(producer, 10, owner=owner, priority="high")
    assert worker.renew(CHILD, [LANE], [share], [stuck]) == Renewal(behind, LANE, ["yield"])


def test_share_yields_to_an_owner_who_has_nothing_at_work(producer: SubmitLedger, worker: WorkLedger) -> None:
    make_job(producer, 10, owner="ann")
    share = take(worker, room=8)
    newcomer = make_job(producer, 10, owner="bob")
    renewal = worker.renew(CHILD, [LANE], [share])
    assert (renewal.urgent, renewal.verdicts) == (newcomer, ["yield"])
    assert take(worker, room=2).job == newcomer
    assert worker.renew(CHILD, [LANE], [share]).verdicts == ["ok"]


def test_share_does_not_yield_to_the_same_owner_or_a_lower_priority(producer: SubmitLedger, worker: WorkLedger) -> None:
    make_job(producer, 2, owner="ann")
    share = take(worker)
    assert worker.renew(CHILD, [LANE], [share]).urgent is None
    for owner, priority in (("bob", "low"), ("ann", "normal")):
        job = make_job(producer, 2, owner=owner, priority=priority)
        renewal = worker.renew(CHILD, [LANE], [share])
        assert (renewal.urgent, renewal.verdicts) == (job, ["ok"])


@pytest.mark.parametrize("order", ["pause", "cancel"])
def test_paused_or_cancelled_job_stops(producer: SubmitLedger, worker: WorkLedger, order: str) -> None:
    job = make_job(producer, 2)
    share = take(worker, room=1)
    assert getattr(producer, order)(job)
    assert renew(worker, share) == ["stop"]
    assert ask(worker) == "none"


def test_leases_of_a_deleted_job_are_lost(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    gone = make_job(producer, 1)
    share = take(worker)
    raw.delete(f"imagemill:job:{gone}")
    make_job(producer, 1)
    kept = take(worker)
    assert renew(worker, share, ManifestDue(gone, 1), kept) == ["lost", "lost", "ok"]


# --- recording ------------------------------------------------------------------------------------


def test_result_is_recorded_once_by_concurrent_threads(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 2, duplicates=[0, 0])
    take(worker)
    start, answers = threading.Barrier(8), []

    def record(thread: int) -> None:
        start.wait()
        answers.extend([worker.record(job, done(0) if (thread + n) % 2 else failed(0)) for n in range(5)])

    threads = [threading.Thread(target=record, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False] * 39 + [True]
    status = worker.status(job)
    assert sorted((status.done, status.failed)) == [0, 3]
    assert len(worker.follow(job)[1]) == 1


def test_results_of_several_jobs_are_recorded_at_once(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    one, two, over = make_job(producer, 3, duplicates=[1]), make_job(producer, 2), make_job(producer, 1)
    producer.pause(two)
    producer.cancel(over)
    results = [(one, done(0)), (two, failed(1)), (one, failed(1)), (over, done(0)), (one, failed(0)), (two, done(0))]
    before = raw.info("commandstats")["cmdstat_evalsha"]["calls"]
    answers = worker.record_all([Record.of(job, result) for job, result in results])
    assert raw.info("commandstats")["cmdstat_evalsha"]["calls"] == before + 1
    assert [answer.first for answer in answers] == [True, True, True, False, False, True]
    assert [answer.stop for answer in answers] == [False, True, False, True, False, True]
    assert counts(worker, one) == ("queued", 1, 2)
    assert counts(worker, two) == ("finishing", 1, 1)
    assert [result.index for result in worker.follow(one)[1]] == [0, 1]


def test_damaged_job_does_not_keep_others_from_being_recorded(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    bad, good = make_job(producer, 1), make_job(producer, 1)
    raw.set(key(bad, "results"), "damaged")
    answers = worker.record_all([Record.of(bad, done(0)), Record.of(good, done(0))])
    assert answers[1] == Recorded(first=True, stop=False)
    assert counts(worker, good) == ("finishing", 1, 0)
    assert sum(counts(worker, bad)[1:]) == 1


def test_full_redis_records_nothing(own_redis: EmbeddedRedis) -> None:
    ledger = Ledger(own_redis.url)
    job = make_job(ledger, 2)
    with redis.Redis.from_url(own_redis.url) as client:
        client.config_set("maxmemory", "1")
        with pytest.raises(BrokerUnavailable, match="memory"):
            ledger.record_all([Record.of(job, done(0)), Record.of(job, done(1))])
        client.config_set("maxmemory", "0")
    assert counts(ledger, job) == ("queued", 0, 0)
    ledger.close()


def test_image_recorded_by_a_worker_thought_to_be_dead_is_not_handed_out_again(
    producer: SubmitLedger, worker: WorkLedger, raw: Any
) -> None:
    job = make_job(producer, 3)
    share = take(worker, room=3)
    assert worker.give_back(share, CHILD, returned=[0, 1, 2])
    assert worker.record(job, done(1))
    again = take(worker, room=3)
    assert again.indexes == {0, 1, 2}
    assert [item.index for item in again.items] == [0, 2]


def test_result_counts_even_after_the_lease_was_lost(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 1)
    share = take(worker)
    assert die(worker, raw, share) == 1
    assert worker.record(job, done(0))
    assert counts(worker, job) == ("finishing", 1, 0)
    assert not worker.give_back(share, CHILD)
    write_manifest(worker, job)
    assert nothing_left(raw)


def test_nothing_is_recorded_after_the_end(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 2)
    share = take(worker, room=1)
    producer.cancel(job)
    assert worker.give_back(share, CHILD, returned=[0])
    assert not worker.record(job, done(0))
    assert counts(worker, job) == ("cancelled", 0, 0)
    assert [row.result for row in worker.rows(job)] == [None, None]


def test_job_is_over_when_its_manifest_is_written(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 4, duplicates=[2])
    work(worker, take(worker, room=2), bad={1})
    assert counts(worker, job) == ("running", 1, 1)
    work(worker, take(worker))
    status = worker.status(job)
    assert (status.state, status.over, status.manifest, status.ended) == ("finishing", False, None, None)
    write_manifest(worker, job)
    status = worker.status(job)
    assert (status.state, status.total, status.done, status.failed, status.duplicates) == ("done", 5, 4, 1, 1)
    assert status.manifest == "s3://results/x/manifest.jsonl"
    assert status.ended is not None
    assert status.seconds == pytest.approx(status.ended - status.created, abs=0.001)


def test_job_in_which_every_image_failed_has_failed(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 3, duplicates=[1])
    run(worker, bad=range(3))
    assert counts(worker, job) == ("failed", 0, 4)
    assert worker.status(job).over
