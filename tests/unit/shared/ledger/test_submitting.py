"""Submitting jobs, on a real Redis."""

from __future__ import annotations

import zlib
from typing import Any

import pytest

from imagemill.shared.errors import JobNotFound, NameTaken
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.ledger.scripts import pack, unpack
from imagemill.shared.ledger.submitting import SUBMITTING_SECONDS, SubmitLedger
from imagemill.shared.messages import Item
from tests.unit.shared.ledger.jobs import ask, counts, indexes, item, keys, make_job, nothing_left, run, spec, take, work

pytestmark = pytest.mark.integration


def test_unsealed_job_is_invisible_and_expires_within_an_hour(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    producer.open_job("job-unsealed", spec())
    producer.add_packs("job-unsealed", [(0, [item(0)])])
    assert ask(worker) == "none"
    assert worker.tend() == ([], {})
    assert worker.jobs() == []
    assert not producer.cancel("job-unsealed")
    assert not producer.pause("job-unsealed")
    assert not producer.prioritize("job-unsealed", "high")
    assert producer.retry("job-unsealed") == 0
    assert counts(worker, "job-unsealed") == ("submitting", 0, 0)
    assert all(0 < raw.ttl(key) <= SUBMITTING_SECONDS for key in keys(raw, "job-unsealed"))
    producer.discard("job-unsealed")
    assert raw.keys("*job-unsealed*") == []


def test_seal_fails_when_the_unsealed_job_has_expired(producer: SubmitLedger, raw: Any) -> None:
    producer.open_job("job-slow", spec())
    producer.add_packs("job-slow", [(0, [item(0), item(1, 0)])])
    raw.delete("imagemill:job:job-slow")  # as after an hour
    with pytest.raises(JobNotFound):
        producer.seal("job-slow", size=2, total=2, duplicates={0: 1})
    assert all(raw.ttl(key) > 0 for key in keys(raw, "job-slow"))
    producer.discard("job-slow")
    assert raw.keys("*job-slow*") == []


def test_job_is_sealed_once(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 2)
    take(worker)
    assert not producer.seal(job, size=2, total=2, duplicates={})
    with pytest.raises(NameTaken):
        producer.seal(job, size=3, total=3, duplicates={})
    assert ask(worker) == "none"


def test_packs_that_were_compressed_differently_are_the_same(producer: SubmitLedger, raw: Any) -> None:
    items = [item(number) for number in range(32)]
    producer.open_job("job-again", spec())
    producer.add_packs("job-again", [(0, items)])
    raw.hset("imagemill:job:job-again:packs", "0", zlib.compress(zlib.decompress(pack(items)), 1))
    producer.add_packs("job-again", [(0, items), (1, [item(32)])])
    producer.seal("job-again", size=33, total=33, duplicates={})
    assert [row.index for row in producer.rows("job-again")] == list(range(33))


def test_unpack_restores_packed_items() -> None:
    items = [item(0), Item.model_validate({"index": 1, "source": "s3://b/ü.png", "boxes": "1,2,3,4", "name": "画"}), item(2, 0)]
    assert unpack(pack(items)) == items


@pytest.mark.parametrize(("images", "gaps"), [(1, ()), (32, ()), (33, ()), (100, range(20, 70)), (70, (0, 31, 32, 69))])
def test_every_image_is_handed_out_once(producer: SubmitLedger, worker: WorkLedger, raw: Any, images: int, gaps: Any) -> None:
    job = make_job(producer, images, gaps=gaps)
    assert run(worker) == [(job, index) for index in range(images) if index not in gaps]
    assert counts(worker, job) == ("done", images - len(gaps), 0)
    assert nothing_left(raw)


def test_duplicates_count_with_their_originals_and_are_not_handed_out(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 3, duplicates=[0, 0, 2])
    share = take(worker)
    assert indexes(share) == [0, 1, 2]
    work(worker, share, bad={2})
    assert counts(worker, job) == ("finishing", 4, 2)
    assert worker.status(job).duplicates == 3


def test_child_does_not_get_shares_of_duplicates_alone(producer: SubmitLedger, worker: WorkLedger) -> None:
    job, next_job = make_job(producer, 2, duplicates=[0] * 70), make_job(producer, 1)
    assert take(worker, room=2).job == job
    share = take(worker, room=8)
    assert (share.job, indexes(share)) == (next_job, [0])


def test_job_without_images_is_over_at_once(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 0)
    assert run(worker) == []
    assert worker.status(job).over
    assert nothing_left(raw)
