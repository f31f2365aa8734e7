"""What one node does every second, and when a child process has died."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.fleet import NODE_SECONDS, Fleet
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.ledger.submitting import SubmitLedger
from imagemill.shared.messages import Node
from tests.unit.shared.ledger.jobs import (
    CHILD,
    LANE,
    OTHER,
    OTHER_LANE,
    ask,
    counts,
    fall_silent,
    indexes,
    make_job,
    run,
    take,
    work,
)

pytestmark = pytest.mark.integration


def report(fleet: Fleet, name: str, children: int = 1, ready: bool = True) -> None:
    fleet.report_node(Node(node=name, host="a", pid=1, device="cpu", lanes=(LANE,), children=children, ready=ready))


def measured(raw: Any, lane: str = LANE) -> tuple[int, float]:
    """The number of children of a lane, and their speed."""
    return int(raw.hget("imagemill:children", lane)), float(raw.hget("imagemill:speed", lane))


def test_lanes_with_work_and_an_empty_queue_need_a_wake_up(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    assert worker.tend() == ([], {})
    make_job(producer, 2)
    make_job(producer, 2, lane=OTHER_LANE)
    raw.lpush(f"imagemill.{OTHER_LANE}", "a message")
    assert worker.tend() == ([], {LANE: 0})
    raw.delete(f"imagemill.{OTHER_LANE}")
    assert sorted(worker.tend()[1]) == [OTHER_LANE, LANE]
    share = take(worker)
    assert worker.tend() == ([], {OTHER_LANE: 0})  # all of it is running
    work(worker, share)
    assert LANE in worker.tend()[1]  # for the manifest
    due = ask(worker)
    assert worker.tend() == ([], {OTHER_LANE: 0})  # it is being written
    raw.zadd(f"imagemill:manifests:{LANE}", {due.job: 1})
    assert LANE in worker.tend()[1]  # its lease has expired
    run(worker, lanes=[LANE, OTHER_LANE])
    assert worker.tend() == ([], {})


def test_shares_of_silent_children_are_handed_out_again(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    make_job(producer, 3, owner="ann")
    share, kept = take(worker, room=2), take(worker, OTHER)
    assert worker.tend() == ([], {})
    assert fall_silent(worker, raw, share) == 1
    assert worker.tend() == ([], {LANE: 0})
    assert raw.hgetall("imagemill:running") == {"ann": "1"}
    assert worker.renew(OTHER, [LANE], [kept]).verdicts == ["ok"]


def test_shares_of_a_dead_child_are_handed_out_at_once(producer: SubmitLedger, worker: WorkLedger) -> None:
    make_job(producer, 2)
    make_job(producer, 3)
    take(worker, room=2)
    kept = take(worker, OTHER, room=1)
    take(worker, room=2)
    assert len(worker.bury(CHILD)) == 2
    assert len(worker.bury(CHILD)) == 0
    assert worker.renew(OTHER, [LANE], [kept]).verdicts == ["ok"]
    assert sorted(index for _, index in run(worker)) == [0, 1, 1, 2]


def test_children_and_their_speed_are_counted(producer: SubmitLedger, worker: WorkLedger, fleet: Fleet, raw: Any) -> None:
    make_job(producer, 1)
    worker.tend()
    assert measured(raw) == (0, 0)
    report(fleet, "cpu@a", children=3)
    report(fleet, "cpu@b")
    report(fleet, "cpu@c", children=5, ready=False)
    worker.report_rate(LANE, "cpu@a/1", 3.0)
    worker.report_rate(LANE, "cpu@a/2", 1.0)
    worker.report_rate(OTHER_LANE, "cpu@a/1", 100.0)
    worker.tend()
    assert measured(raw) == (4, 8.0)  # the other two are thought to be as fast as these
    assert fleet.rates(LANE) == {"cpu@a/1": 3.0, "cpu@a/2": 1.0}


def test_silent_node_and_its_rates_are_forgotten(producer: SubmitLedger, worker: WorkLedger, fleet: Fleet, raw: Any) -> None:
    make_job(producer, 1)
    for name in ("cpu@a", "cpu@b"):
        report(fleet, name)
        worker.report_rate(LANE, f"{name}/1", 2.0)
    worker.tend()
    assert measured(raw) == (2, 4.0)
    raw.zincrby(f"imagemill:nodes:{LANE}", -1000 * NODE_SECONDS, "cpu@a")
    worker.tend()
    assert measured(raw) == (1, 2.0)
    assert fleet.rates(LANE) == {"cpu@b/1": 2.0}


def test_children_of_an_idle_lane_are_counted_when_a_job_arrives(
    producer: SubmitLedger, worker: WorkLedger, fleet: Fleet
) -> None:
    """Nobody has to wait for the next second, or one child would get all of a small job."""
    report(fleet, "cpu@a", children=5)
    worker.tend()
    make_job(producer, 50)
    assert len(take(worker, room=500).items) == 5


def test_clocks_of_owners_who_have_left_are_forgotten(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    for owner in (f"owner-{number}" for number in range(50)):
        make_job(producer, 2, owner=owner)
    make_job(producer, 2)
    run(worker)
    make_job(producer, 20, owner="here")
    take(worker, room=5)
    worker.tend()
    assert raw.zcard("imagemill:clocks:normal") == 51  # jobs without an owner leave no clock
    take(worker, room=5)
    make_job(producer, 10, priority="high", owner="owner-0")
    take(worker, room=5)
    for _ in range(3):
        worker.tend()
    assert raw.zrange("imagemill:clocks:normal", 0, -1) == ["here"]
    assert raw.zrange("imagemill:clocks:high", 0, -1) == ["owner-0"]


def test_only_one_node_leads(redis_server: EmbeddedRedis, worker: WorkLedger, raw: Any) -> None:
    with closing(WorkLedger(redis_server.url)) as other:
        assert worker.lead("cpu@a", 5.0)
        assert not other.lead("cpu@b", 5.0)
        assert 0 < raw.pttl("imagemill:tender") <= 5000
        raw.delete("imagemill:tender")  # as after 5 s
        assert other.lead("cpu@b", 5.0)


def test_many_lost_images_are_handed_out_in_several_steps(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    """One long script would keep all other clients waiting."""
    make_job(producer, 16_000)
    for _ in range(4):
        take(worker, room=4000)
    for member in raw.zrange("imagemill:leased", 0, -1):
        raw.zadd("imagemill:leased", {member: 1})
    assert [len(worker.tend()[0]) for _ in range(3)] == [3, 1, 0]


def test_leases_of_deleted_jobs_do_not_stop_others(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    gone, job = make_job(producer, 1), make_job(producer, 1)
    lost, share = take(worker), take(worker)
    raw.delete(*raw.keys(f"imagemill:job:{gone}*"))
    raw.zadd("imagemill:leased", {f"{gone}:{lost.number}": 1})
    assert fall_silent(worker, raw, share) == 1
    assert raw.zcard("imagemill:leased") == 0
    assert (take(worker).job, indexes(share)) == (job, [0])


def test_outage_of_redis_does_not_count_as_the_death_of_workers(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    """After it, every lease has expired, since nobody could renew."""
    job = make_job(producer, 4)
    share = take(worker)
    worker.tend()
    raw.set("imagemill:tended", 1)
    assert fall_silent(worker, raw, share) == 0
    assert worker.renew(CHILD, [LANE], [share]).verdicts == ["ok"]
    assert fall_silent(worker, raw, share) == 1, "from now on, silence counts again"
    run(worker)
    assert counts(worker, job) == ("done", 4, 0)
