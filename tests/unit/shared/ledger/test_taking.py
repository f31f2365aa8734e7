"""Taking shares: whose turn it is, and how much a child gets."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import Request, WorkLedger
from imagemill.shared.ledger.submitting import SubmitLedger
from imagemill.shared.messages import Node
from tests.unit.shared.ledger.jobs import (
    CHILD,
    LANE,
    OTHER,
    OTHER_LANE,
    ask,
    counts,
    indexes,
    make_job,
    nothing_left,
    run,
    take,
    work,
)

pytestmark = pytest.mark.integration


def report(fleet: Fleet, worker: WorkLedger, rates: dict[str, float], lane: str = LANE) -> None:
    """Nodes with one child each, which compute this many images per second."""
    for child in rates:
        node = child.partition("/")[0]
        fleet.report_node(Node(node=node, host="a", pid=1, device="cpu", lanes=(lane,), children=1, ready=True))
        worker.report_rate(lane, child, rates[child])
    worker.tend()


# --- the order ---------------------------------------------------------------------------------


def test_priorities_come_before_owners_and_owners_before_the_order_of_submission(
    producer: SubmitLedger, worker: WorkLedger
) -> None:
    jobs = {
        name: make_job(producer, 2, priority=priority, owner=owner)
        for name, priority, owner in (
            ("low", "low", "ann"),
            ("ann 1", "normal", "ann"),
            ("ann 2", "normal", "ann"),
            ("bob 1", "normal", "bob"),
            ("bob 2", "normal", "bob"),
            ("high", "high", "bob"),
        )
    }
    names = {job: name for name, job in jobs.items()}
    order = [name for name, _ in itertools.groupby(names[job] for job, _ in run(worker))]
    assert order == ["high", "ann 1", "bob 1", "ann 2", "bob 2", "low"]


def test_jobs_without_an_owner_take_turns(producer: SubmitLedger, worker: WorkLedger) -> None:
    large, small = make_job(producer, 100), make_job(producer, 4)
    assert [take(worker, room=2).job for _ in range(4)] == [large, small, large, small]


def test_owners_share_by_weight(producer: SubmitLedger, worker: WorkLedger) -> None:
    worker.set_weights({"ann": 3, "gone": 9})
    worker.set_weights({"ann": 3})
    for owner in ("ann", "bob", "eve"):
        make_job(producer, 1000, owner=owner)
    served = Counter(worker.spec(take(worker, room=10).job).policy.owner for _ in range(50))
    assert served == {"ann": 30, "bob": 10, "eve": 10}


def test_share_of_an_owner_does_not_grow_with_the_number_of_jobs(producer: SubmitLedger, worker: WorkLedger) -> None:
    for owner in ("ann", *["bob"] * 12):
        make_job(producer, 100, owner=owner)
    served = Counter(worker.spec(take(worker, room=8).job).policy.owner for _ in range(20))
    assert served == {"ann": 10, "bob": 10}


def test_owner_who_returns_has_saved_up_no_turns(producer: SubmitLedger, worker: WorkLedger) -> None:
    make_job(producer, 1, owner="ann")
    make_job(producer, 500, owner="bob")
    for _ in range(11):
        take(worker, room=20)
    make_job(producer, 500, owner="ann")
    served = Counter(worker.spec(take(worker, room=20).job).policy.owner for _ in range(10))
    assert served["ann"] <= 6


def test_owner_who_submits_small_jobs_does_not_hold_up_others(producer: SubmitLedger, worker: WorkLedger) -> None:
    make_job(producer, 500, owner="bob")
    served = Counter[str | None]()
    for _ in range(20):
        make_job(producer, 10, owner="ann")
        worker.tend()
        served[worker.spec(take(worker, room=10).job).policy.owner] += 1
    assert served == {"ann": 10, "bob": 10}


def test_images_given_back_do_not_count_as_a_turn(producer: SubmitLedger, worker: WorkLedger) -> None:
    ann, bob = (make_job(producer, 500, owner=owner) for owner in ("ann", "bob"))
    share = take(worker, room=100)
    assert share.job == ann
    assert take(worker, room=10).job == bob
    worker.give_back(share, CHILD, returned=indexes(share))
    assert [take(worker, room=5).job for _ in range(4)] == [ann, ann, ann, bob]


def test_fast_lane_does_not_make_an_owner_wait_in_a_slow_one(producer: SubmitLedger, worker: WorkLedger) -> None:
    """The images of another lane count for at most a minute of this one."""
    make_job(producer, 3000, owner="fast")
    first = make_job(producer, 1000, owner="slow", lane=OTHER_LANE)
    take(worker, room=10, lanes=[OTHER_LANE])
    for _ in range(20):
        take(worker, room=100)
    newcomer = make_job(producer, 100, lane=OTHER_LANE)
    assert {take(worker, room=10, lanes=[OTHER_LANE]).job for _ in range(2)} == {first, newcomer}
    both = [take(worker, room=10, lanes=[OTHER_LANE, LANE]).job for _ in range(40)]
    assert len(set(both)) == 3


def test_owner_with_much_done_in_a_fast_lane_gets_a_turn_in_a_slow_one(producer: SubmitLedger, worker: WorkLedger) -> None:
    make_job(producer, 1000, owner="ann")
    make_job(producer, 1000, owner="bob", lane=OTHER_LANE)
    for _ in range(10):
        take(worker, room=100)
    make_job(producer, 100, owner="ann", lane=OTHER_LANE)
    owners = [worker.spec(take(worker, room=10, lanes=[OTHER_LANE]).job).policy.owner for _ in range(15)]
    assert "ann" in owners


def test_owners_take_turns_between_lanes(producer: SubmitLedger, worker: WorkLedger) -> None:
    jobs = [make_job(producer, 100, owner=owner, lane=lane) for owner, lane in (("ann", LANE), ("bob", OTHER_LANE))]
    jobs.append(make_job(producer, 100, owner="ann", lane=OTHER_LANE))
    owners = Counter(worker.spec(take(worker, room=4, lanes=[LANE, OTHER_LANE]).job).policy.owner for _ in range(20))
    assert owners == {"ann": 10, "bob": 10}


def test_child_gets_only_lanes_with_room(producer: SubmitLedger, worker: WorkLedger) -> None:
    make_job(producer, 10, priority="high")
    other = make_job(producer, 10, lane=OTHER_LANE)
    share = worker.take(Request(CHILD, [LANE, OTHER_LANE], {LANE: 0, OTHER_LANE: 3}))
    assert not isinstance(share, str)
    assert share.job == other
    assert worker.take(Request(CHILD, [LANE], {})) == "none"


# --- the size of shares ------------------------------------------------------------------------


def test_only_child_gets_what_it_has_room_for(producer: SubmitLedger, worker: WorkLedger) -> None:
    make_job(producer, 100)
    assert indexes(take(worker, room=40)) == list(range(40))
    assert indexes(take(worker, room=1)) == [40]
    assert indexes(take(worker, room=99)) == list(range(41, 100))
    assert ask(worker) == "none"


def test_child_gets_half_of_its_part_of_what_is_left(producer: SubmitLedger, worker: WorkLedger, fleet: Fleet) -> None:
    rates = {CHILD: 3.0, OTHER: 1.0}
    report(fleet, worker, rates)
    make_job(producer, 160)
    sizes = [len(take(worker, child, room=500, rate={LANE: rates[child]}).items) for child in (CHILD, OTHER, CHILD, OTHER)]
    assert sizes == [60, 13, 33, 7]


def test_child_of_unknown_speed_counts_as_average(producer: SubmitLedger, worker: WorkLedger, fleet: Fleet) -> None:
    report(fleet, worker, {CHILD: 3.0, OTHER: 1.0})
    make_job(producer, 100)
    assert len(take(worker, "cpu@c/1", room=500).items) == 25


def test_images_already_held_count_towards_the_part(producer: SubmitLedger, worker: WorkLedger, fleet: Fleet) -> None:
    report(fleet, worker, {CHILD: 1.0, OTHER: 1.0})
    job = make_job(producer, 40)
    first = take(worker, room=500, rate={LANE: 1.0})
    assert len(first.items) == 10
    assert ask(worker, room=500, rate={LANE: 1.0}, held={job: 10}, empty=False) == "none"
    assert len(take(worker, room=500, rate={LANE: 1.0}, held={job: 4}, empty=False).items) == 5


def test_siblings_on_the_only_device_need_no_parts(producer: SubmitLedger, worker: WorkLedger, fleet: Fleet) -> None:
    rates = {CHILD: 1.0, OTHER: 1.0}
    report(fleet, worker, rates)
    make_job(producer, 40)
    sizes = [len(take(worker, child, room=16, rate={LANE: 1.0}, siblings=2).items) for child in (CHILD, OTHER, OTHER)]
    assert sizes == [16, 16, 8]


def test_siblings_get_parts_alongside_another_device(producer: SubmitLedger, worker: WorkLedger, fleet: Fleet) -> None:
    report(fleet, worker, {CHILD: 1.0, OTHER: 1.0, "gpu0@c/1": 2.0})
    make_job(producer, 160)
    assert len(take(worker, CHILD, room=500, rate={LANE: 1.0}, siblings=2).items) == 20


def test_all_children_work_until_the_last_image(producer: SubmitLedger, worker: WorkLedger, fleet: Fleet) -> None:
    report(fleet, worker, {f"cpu@{n}/1": 1.0 for n in range(8)})
    make_job(producer, 5)
    shares = [take(worker, f"cpu@{n}/1", room=500, rate={LANE: 1.0}) for n in range(5)]
    assert [indexes(share) for share in shares] == [[0], [1], [2], [3], [4]]


def test_child_that_has_its_part_gets_another_job(producer: SubmitLedger, worker: WorkLedger, fleet: Fleet) -> None:
    report(fleet, worker, {CHILD: 1.0, OTHER: 1.0})
    urgent, normal = make_job(producer, 8, priority="high"), make_job(producer, 8)
    assert take(worker, room=500).job == urgent
    assert take(worker, room=500, held={urgent: 2}, empty=False).job == normal


# --- many jobs and odd ones ----------------------------------------------------------------------


def test_take_needs_as_many_commands_for_a_large_ledger(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    def commands() -> int:
        """How many commands one call runs in Redis."""
        raw.config_resetstat()
        share = take(worker, room=32)
        stats = raw.info("commandstats")
        worker.give_back(share, CHILD, returned=indexes(share))
        return sum(int(stat["calls"]) for stat in stats.values())

    make_job(producer, 64, owner="ann")
    small = commands()
    for number in range(300):
        make_job(producer, 64, owner=f"owner-{number % 100}")
    large = make_job(producer, 1, owner="ann")
    raw.hset(f"imagemill:job:{large}", mapping={"size": 1_000_000, "open": 1_000_000})
    assert commands() <= small + 5


def test_deleted_job_does_not_stop_others(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    gone, job = make_job(producer, 2), make_job(producer, 2)
    raw.delete(f"imagemill:job:{gone}", f"imagemill:job:{gone}:packs")
    share = take(worker, empty=False)
    assert share.job == job
    work(worker, share)
    run(worker)
    assert counts(worker, job)[0] == "done"
    assert nothing_left(raw)
