"""Reports of nodes, on a real Redis."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.fleet import CANARY_SECONDS, FORGET_SECONDS, MEMORY_SECONDS, NODE_SECONDS, Fleet
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.messages import HostGpus, Node
from tests.workers import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("raw")]

LANE = "stylize.opencv"


def node(name: str, **changes: Any) -> Node:
    fields = dict(node=name, host="a", pid=1, device="cpu", lanes=(LANE,), children=2, ready=True)
    return Node.model_validate({**fields, **changes})


def test_nodes_are_sorted_by_name_with_their_latest_reports(fleet: Fleet) -> None:
    assert fleet.nodes() == []
    for report in (node("gpu1@a"), node("gpu0@a", ready=False), node("gpu0@a", ready=True, pid=7)):
        fleet.report_node(report)
    assert [report.model_copy(update={"seen": 0.0}) for report in fleet.nodes()] == [node("gpu0@a", pid=7), node("gpu1@a")]


def test_silent_node_counts_as_dead_by_redis_clock(fleet: Fleet, raw: Any) -> None:
    for name in ("cpu@a", "cpu@b"):
        fleet.report_node(node(name, seen=9e12))  # the host's own clock does not count
    (first, second) = fleet.nodes()
    seconds, _ = raw.time()
    assert abs(first.seen - seconds) < 60
    raw.hset("imagemill:nodes", "cpu@b", second.model_copy(update={"seen": second.seen - NODE_SECONDS}).model_dump_json())
    assert [node.node for node in fleet.nodes()] == ["cpu@a"]
    assert raw.hexists("imagemill:nodes", "cpu@b")
    raw.hset("imagemill:nodes", "cpu@b", second.model_copy(update={"seen": second.seen - 3601}).model_dump_json())
    assert [node.node for node in fleet.nodes()] == ["cpu@a"]
    assert not raw.hexists("imagemill:nodes", "cpu@b")


def test_forgotten_node_disappears_at_once(fleet: Fleet) -> None:
    fleet.report_node(node("cpu@a"))
    fleet.forget_node(node("cpu@a"))
    fleet.forget_node(node("cpu@never"))
    assert fleet.nodes() == []


def test_name_belongs_to_the_process_that_claimed_it(fleet: Fleet, raw: Any) -> None:
    mine, other = node("cpu@a", process="x/1/5"), node("cpu@a", process="y/1/5", pid=2)
    assert fleet.claim_name(mine) is None
    assert fleet.claim_name(mine) is None
    holder = fleet.claim_name(other)
    assert holder is not None
    assert holder.node.process == "x/1/5"
    assert 0 <= holder.silent < 60
    assert not fleet.report_node(other)
    fleet.forget_node(other)
    assert [node.pid for node in fleet.nodes()] == [1]
    assert raw.zcard(f"imagemill:nodes:{LANE}") == 0, "a claim is not ready for work, and a refused report changes nothing"
    assert fleet.report_node(mine)
    fleet.forget_node(other)
    assert raw.zcard(f"imagemill:nodes:{LANE}") == 1
    fleet.forget_node(mine)
    assert fleet.claim_name(other) is None


def test_claim_replaces_only_the_report_that_was_found_dead(fleet: Fleet) -> None:
    dead = node("cpu@a", process="x/1/5")
    fleet.report_node(dead)
    (seen,) = fleet.nodes()
    wait_until(lambda: fleet.report_node(dead) and fleet.nodes()[0].seen > seen.seen, "it lives after all")
    assert fleet.claim_name(node("cpu@a", process="y/1/5"), seen) is not None
    (seen,) = fleet.nodes()
    assert fleet.claim_name(node("cpu@a", process="y/1/5"), seen) is None


def test_name_passes_to_another_node_only_after_silence(fleet: Fleet, raw: Any) -> None:
    fleet.report_node(node("cpu@a", process="x/1/5"))
    (first,) = fleet.nodes()
    raw.hset("imagemill:nodes", "cpu@a", first.model_copy(update={"seen": first.seen - NODE_SECONDS}).model_dump_json())
    assert fleet.claim_name(node("cpu@a", process="y/1/5")) is not None, "a claim asks who it was"
    assert fleet.report_node(node("cpu@a", process="y/1/5"))
    assert not fleet.report_node(first)


def test_nodes_are_listed_by_lane_once_they_are_ready(fleet: Fleet, raw: Any) -> None:
    lanes = (LANE, "inpaint.opencv")
    fleet.report_node(node("cpu@a", lanes=lanes, children=3))
    fleet.report_node(node("cpu@b", ready=False))
    assert [raw.zrange(f"imagemill:nodes:{lane}", 0, -1) for lane in lanes] == [["cpu@a"], ["cpu@a"]]
    assert raw.hgetall("imagemill:node-children") == {"cpu@a": "3"}
    fleet.forget_node(node("cpu@a", lanes=lanes))
    assert not raw.keys("imagemill:nodes:*")
    assert not raw.exists("imagemill:node-children")


def test_rates_are_each_childs_latest_in_one_lane(fleet: Fleet, worker: WorkLedger) -> None:
    for lane, child, rate in (
        (LANE, "cpu@a/1", 1.0),
        (LANE, "cpu@a/1", 2.5),
        (LANE, "cpu@a/2", 0.125),
        (f"{LANE}.large", "cpu@a/1", 9.0),
    ):
        worker.report_rate(lane, child, rate)
    assert fleet.rates(LANE) == {"cpu@a/1": 2.5, "cpu@a/2": 0.125}
    assert fleet.rates("inpaint.opencv") == {}


def test_memory_is_each_nodes_latest(fleet: Fleet, raw: Any) -> None:
    fleet.report_memory("gpu0@a", 0.5, 0)
    fleet.report_memory("gpu0@a", 0.931, 12)
    fleet.report_memory("gpu1@a", 0.25, 0)
    assert fleet.memory() == {"gpu0@a": (0.931, 12), "gpu1@a": (0.25, 0)}
    assert MEMORY_SECONDS - 60 < raw.ttl("imagemill:memory") <= MEMORY_SECONDS


def test_canary_answers_only_its_own_token(fleet: Fleet, raw: Any) -> None:
    answer = threading.Timer(0.05, fleet.answer_canary, args=["mine"])
    answer.start()
    assert fleet.await_canary("mine", 30)
    answer.join()
    fleet.answer_canary("early")
    assert 0 < raw.ttl("imagemill:canary:early") <= CANARY_SECONDS
    assert not fleet.await_canary("other", 0.05)
    assert fleet.await_canary("early", 0.05)


CALLS: dict[str, Callable[[Fleet], Any]] = {
    "report_node": lambda fleet: fleet.report_node(node("cpu@a")),
    "claim_name": lambda fleet: fleet.claim_name(node("cpu@a")),
    "forget_node": lambda fleet: fleet.forget_node(node("cpu@a")),
    "nodes": lambda fleet: fleet.nodes(),
    "rates": lambda fleet: fleet.rates(LANE),
    "report_memory": lambda fleet: fleet.report_memory("gpu0@a", 0.5, 0),
    "memory": lambda fleet: fleet.memory(),
    "answer_canary": lambda fleet: fleet.answer_canary("mine"),
    "await_canary": lambda fleet: fleet.await_canary("mine", 0.05),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_raises_broker_unavailable_without_redis(name: str) -> None:
    fleet = Fleet("redis://:secret@127.0.0.1:1/0")
    with pytest.raises(BrokerUnavailable, match=r"^Redis: ") as caught:
        CALLS[name](fleet)
    assert "secret" not in caught.value.message


def test_gpus_are_counted_once_per_host_whoever_reports_them(fleet: Fleet, raw: Any) -> None:
    """One supervisor with its nodes; and containers with one GPU each, of which one could not start."""
    fleet.report_gpus(HostGpus(host="a", expected=3, present=("GPU-1", "GPU-2")), "supervisor")
    fleet.report_node(node("gpu0@a", gpu="GPU-1"))
    for number in range(2):
        fleet.report_node(node(f"gpu{number}@b", host="b", gpu=f"GPU-b{number}", expected_gpus=3))
    fleet.report_node(node("gpu2@b", host="b", gpu="gpu2@b", expected_gpus=3, ready=False, gone=True, problem="no such GPU"))
    fleet.report_node(node("gpu0@c", host="c", gpu="GPU-c"))
    fleet.report_node(node("cpu@d", host="d"))
    assert fleet.gpus() == {"a": (3, 2), "b": (3, 2), "c": (None, 1)}
    fleet.forget_gpus("a", "supervisor")
    assert fleet.gpus()["a"] == (None, 1)


def test_node_that_could_not_start_stays_visible_until_the_next_one_takes_its_name(fleet: Fleet) -> None:
    fleet.report_node(node("gpu0@a", process="x/1/5", ready=False, gone=True, problem="no such GPU"))
    assert [report.problem for report in fleet.nodes()] == ["no such GPU"]
    assert fleet.claim_name(node("gpu0@a", process="y/1/5", ready=False)) is None
    assert [report.problem for report in fleet.nodes()] == [""]


def test_queues_of_a_node_go_an_hour_after_it(fleet: Fleet, raw: Any) -> None:
    bindings, remote = "_kombu.binding.imagemill.default", "_kombu.binding.celery.pidbox"
    queues = {name: f"imagemill-node.{name}" for name in ("cpu@a", "cpu@gone")}
    for name, queue in queues.items():
        raw.lpush(queue, "a wake-up")
        raw.sadd(bindings, f"{queue}\x06\x16\x06\x16{queue}")
        raw.sadd(remote, f"\x06\x16\x06\x16{name}.celery.pidbox")
    raw.sadd(bindings, "imagemill.stylize.opencv\x06\x16\x06\x16imagemill.stylize.opencv")
    raw.sadd(remote, "\x06\x16\x06\x16another@program.celery.pidbox")
    fleet.report_node(node("cpu@a"))
    assert fleet.sweep() == 0, "it may be starting again"
    seen = {name: float(time) for name, time in raw.hgetall("imagemill:node-queues").items()}
    assert set(seen) == set(queues)
    for name, time in seen.items():
        raw.hset("imagemill:node-queues", name, time - FORGET_SECONDS - 1)
    assert fleet.sweep() == 1
    assert [name for name, queue in queues.items() if raw.exists(queue)] == ["cpu@a"]
    assert {member.rpartition("\x16")[2] for member in raw.smembers(bindings)} == {queues["cpu@a"], "imagemill.stylize.opencv"}
    assert {member.rpartition("\x16")[2] for member in raw.smembers(remote)} == {
        "cpu@a.celery.pidbox",
        "another@program.celery.pidbox",
    }


def test_sweep_leaves_keys_of_another_type_alone(fleet: Fleet, raw: Any) -> None:
    raw.set("_kombu.binding.imagemill.default", "no set")
    assert fleet.sweep() == 0
