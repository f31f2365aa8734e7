"""What the ledger tells about waiting jobs: counts, and who is next."""

from __future__ import annotations

import pytest

from imagemill.producer.client import Client
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import Share
from tests.ledgers import Ledger
from tests.unit.producer.jobs import GOOD, LANE, NUMBERED, Invoke, asked, node, plain, submitted, work


def counts(ledger: Ledger, job: str) -> tuple[int, int]:
    status = ledger.status(job)
    assert status.waiting + status.running == (0 if status.over else status.total - status.done - status.failed)
    return status.waiting, status.running


def taken(ledger: Ledger, images: int = 8) -> Share:
    share = asked(ledger, images=images)
    assert isinstance(share, Share)
    return share


def test_waiting_and_running_images_are_those_without_a_result(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill, NUMBERED)
    assert counts(ledger, job) == (30, 0)
    share = taken(ledger)
    assert counts(ledger, job) == (22, 8)
    for item in share.items[:3]:
        ledger.record(job, plain(item))
    assert counts(ledger, job) == (22, 5)
    ledger.give_back(share, "w/0", returned=[item.index for item in share.items[3:]])
    assert counts(ledger, job) == (27, 0)


def test_images_of_a_dead_worker_wait_again(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill, NUMBERED)
    taken(ledger)
    ledger.bury("w/0")
    assert counts(ledger, job) == (30, 0)


def test_duplicates_and_skipped_rows_are_not_counted_twice(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill, "nonsense\n" + GOOD + GOOD, "--skip-invalid")
    assert counts(ledger, job) == (6, 0)
    share = taken(ledger, 3)
    counts(ledger, job)
    ledger.record(job, plain(share.items[0]))
    ledger.give_back(share, "w/0", returned=[item.index for item in share.items[1:]])
    assert counts(ledger, job)[1] == 0
    work(ledger, job)
    assert counts(ledger, job) == (0, 0)


def test_cancelled_job_has_no_waiting_images(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill, NUMBERED)
    taken(ledger)
    ledger.cancel(job)
    status = ledger.status(job)
    assert (status.waiting, status.running, status.why) == (0, 8, "being cancelled")


def test_line_follows_priorities_clocks_and_submission(imagemill: Invoke, ledger: Ledger) -> None:
    ledger.set_weights({"bob": 2})
    ann, again, bob = (submitted(imagemill, NUMBERED, "--owner", owner) for owner in ("ann", "ann", "bob"))
    low, high = submitted(imagemill, GOOD, "--priority", "low"), submitted(imagemill, GOOD, "--priority", "high")
    assert [job.job for job in ledger.lineup(LANE).jobs] == [high, ann, again, bob, low]
    work_on_high = taken(ledger)
    assert work_on_high.job == high
    assert taken(ledger).job == ann
    line = ledger.lineup(LANE).jobs
    assert [job.job for job in line] == [bob, ann, again, low], "ann has had her turn"
    assert [(job.owner, job.weight, job.images) for job in line] == [
        *(("bob", 2, 30), ("ann", 1, 22), ("ann", 1, 30), (f"~{low}", 1, 3))
    ]


def test_forecast_needs_a_node_and_a_measured_speed(imagemill: Invoke, ledger: Ledger, fleet: Fleet, client: Client) -> None:
    job = submitted(imagemill, NUMBERED)
    (status,) = client.explain([client.status(job)])
    assert (status.why, status.position, status.ends) == (f"no node offers {LANE}", 0, None)
    fleet.report_node(node(LANE))
    (status,) = client.explain([client.status(job)])
    assert (status.why, status.ends) == ("next in line", None)
    ledger.report_rate(LANE, "cpu@x/0", 5)
    ledger.report_rate(LANE, "cpu@x/1", 10)
    ledger.tend()
    (status,) = client.explain([client.status(job)])
    assert status.starts is not None
    assert status.ends is not None
    assert status.ends - status.starts == pytest.approx(2)
    assert client.rates(client.nodes()) == {"cpu@x": {LANE: 15.0}}
