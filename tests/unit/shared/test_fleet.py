"""What the nodes tell of themselves, on a real Redis."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.fleet import CANARY_SECONDS, NODE_SECONDS, RATE_SECONDS, Fleet
from imagemill.shared.messages import Node

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("raw")]

QUEUE = "imagemill.stylize.opencv"


def node(name: str, **changes: Any) -> Node:
    fields = dict(node=name, host="a", pid=1, device="cpu", queues=(QUEUE,), children=2, ready=True)
    return Node.model_validate({**fields, **changes})


def test_nodes_are_listed_by_name_as_they_reported_themselves_last(fleet: Fleet) -> None:
    assert fleet.nodes() == []
    for one in (node("gpu1@a"), node("gpu0@a", ready=False), node("gpu0@a", ready=True, pid=7)):
        fleet.report_node(one)
    found = fleet.nodes()
    assert [one.model_copy(update={"seen": 0.0}) for one in found] == [node("gpu0@a", pid=7), node("gpu1@a")]


def test_a_silent_node_is_taken_for_dead_by_redis_clock(fleet: Fleet, raw: Any) -> None:
    for name in ("cpu@a", "cpu@b"):
        fleet.report_node(node(name, seen=9e12))  # what a host's own clock says does not count
    (one, other) = fleet.nodes()
    seconds, _ = raw.time()
    assert abs(one.seen - seconds) < 60
    raw.hset("imagemill:nodes", "cpu@b", other.model_copy(update={"seen": other.seen - NODE_SECONDS}).model_dump_json())
    assert [found.node for found in fleet.nodes()] == ["cpu@a"]
    assert raw.hexists("imagemill:nodes", "cpu@b")
    raw.hset("imagemill:nodes", "cpu@b", other.model_copy(update={"seen": other.seen - 3601}).model_dump_json())
    assert [found.node for found in fleet.nodes()] == ["cpu@a"]
    assert not raw.hexists("imagemill:nodes", "cpu@b")


def test_a_node_that_signs_off_is_gone_at_once(fleet: Fleet) -> None:
    fleet.report_node(node("cpu@a"))
    fleet.forget_node("cpu@a")
    fleet.forget_node("cpu@never")
    assert fleet.nodes() == []


def test_rates_are_of_one_queue_and_each_nodes_latest(fleet: Fleet, raw: Any) -> None:
    for queue, name, rate in (
        (QUEUE, "cpu@a", 1.0),
        (QUEUE, "cpu@a", 2.5),
        (QUEUE, "cpu@b", 0.125),
        (f"{QUEUE}.high", "cpu@a", 9.0),
        ("imagemill.stylize", "cpu@a", 9.0),
    ):
        fleet.report_rate(queue, name, rate)
    assert sorted(fleet.rates(QUEUE)) == [0.125, 2.5]
    assert fleet.rates("imagemill.inpaint.opencv") == []
    assert RATE_SECONDS - 60 < raw.ttl("imagemill:rates") <= RATE_SECONDS


def test_how_full_a_gpu_was_is_told_by_its_node(fleet: Fleet, raw: Any) -> None:
    fleet.report_memory("gpu0@a", 0.5, 0)
    fleet.report_memory("gpu0@a", 0.931, 12)
    fleet.report_memory("gpu1@a", 0.25, 0)
    assert fleet.memory() == {"gpu0@a": (0.931, 12), "gpu1@a": (0.25, 0)}
    assert RATE_SECONDS - 60 < raw.ttl("imagemill:memory") <= RATE_SECONDS


def test_a_canary_is_heard_by_whoever_waits_for_it_and_only_by_them(fleet: Fleet, raw: Any) -> None:
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
    "forget_node": lambda fleet: fleet.forget_node("cpu@a"),
    "nodes": lambda fleet: fleet.nodes(),
    "report_rate": lambda fleet: fleet.report_rate(QUEUE, "cpu@a", 1.0),
    "rates": lambda fleet: fleet.rates(QUEUE),
    "report_memory": lambda fleet: fleet.report_memory("gpu0@a", 0.5, 0),
    "memory": lambda fleet: fleet.memory(),
    "answer_canary": lambda fleet: fleet.answer_canary("mine"),
    "await_canary": lambda fleet: fleet.await_canary("mine", 0.05),
}


@pytest.mark.parametrize("name", CALLS)
def test_without_redis_each_call_says_so(name: str) -> None:
    fleet = Fleet("redis://:secret@127.0.0.1:1/0")
    with pytest.raises(BrokerUnavailable, match=r"^Redis: ") as caught:
        CALLS[name](fleet)
    assert "secret" not in caught.value.message
