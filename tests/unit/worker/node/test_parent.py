"""The parent of a node: it reports the node, buries children that died, and wakes up workers."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from typing import Any
from unittest.mock import patch

import pytest
from celery.exceptions import WorkerShutdown
from celery.worker import state as worker_state

from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import Request, Share
from imagemill.shared.messages import Item, Job, Node
from imagemill.shared.settings import Settings, WorkerSettings
from imagemill.worker.node import parent as parent_module
from imagemill.worker.node.lookout import Lookout
from imagemill.worker.node.parent import MOST_WAKE_UPS, Children, Parent, child_name
from tests.ledgers import Ledger

pytestmark = pytest.mark.integration

LANE = "stylize.opencv"
NODE = "cpu@here"


class Publisher:
    """Records wake-ups."""

    def __init__(self) -> None:
        self.woken: list[tuple[str, int]] = []

    def wake(self, lane: str, count: int = 1) -> None:
        self.woken.append((lane, count))


def parent_of(children: Children, ledger: Any, fleet: Any, weights: dict[str, float] | None = None) -> Parent:
    node = Node(node=NODE, host="here", pid=1, device="cpu", lanes=(LANE,), children=children.count, ready=False)
    publisher: Any = Publisher()
    lookout = Lookout(Settings(_env_file=None, worker=WorkerSettings(operations=("stylize",))))  # type: ignore[call-arg]
    return Parent(node, children, lookout, ledger, fleet, publisher, WorkerSettings(), weights or {})


def submit(ledger: Ledger, count: int) -> str:
    job = "260730-1f0c9a3e"
    ledger.open_job(job, Job.model_validate({"operation": "stylize", "output": {"url": "s3://results/x"}}))
    ledger.add_packs(job, [(0, [Item(index=n, source=f"https://a.example/{n}.jpg") for n in range(count)])])
    ledger.seal(job, size=count, total=count, duplicates={})
    return job


class Process:
    """A process that runs until it is killed."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.pid = self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def loaded(children: Children, *processes: Process) -> None:
    """These are the children, and have loaded their engines."""
    for index, process in enumerate(processes):
        with patch("os.getpid", return_value=process.pid):
            children.loaded(index)


@pytest.mark.usefixtures("raw")
def test_node_is_reported_with_lanes_and_children_and_ready_once_all_are_loaded(ledger: Ledger, fleet: Fleet) -> None:
    children = Children(2)
    parent = parent_of(children, ledger, fleet)
    parent.tick()
    (node,) = fleet.nodes()
    assert (node.lanes, node.children, node.ready) == ((LANE,), 2, False)
    children.loaded(0)
    children.loaded(1)
    parent.report_at = 0.0
    parent.tick()
    (node,) = fleet.nodes()
    assert node.ready
    parent.leave()
    assert fleet.nodes() == []
    assert children.stopping()


@pytest.mark.usefixtures("raw")
def test_lane_out_of_service_is_reported_with_the_reason_at_once(ledger: Ledger, fleet: Fleet) -> None:
    parent = parent_of(Children(1), ledger, fleet)
    parent.tick()
    parent.lanes.close(LANE, "the model is damaged", time.monotonic())
    parent.tick()
    (node,) = fleet.nodes()
    assert (node.lanes, node.faults) == ((), {LANE: "the model is damaged"})
    parent.lanes.offer(LANE)
    parent.tick()
    (node,) = fleet.nodes()
    assert (node.lanes, node.faults) == ((LANE,), {})
    for name in ("red", "blue"):
        parent.lookout.parts.offer(name)
    parent.lookout.parts.close("red", "the LoRA is damaged", time.monotonic())
    parent.tick()
    (node,) = fleet.nodes()
    assert (node.parts, node.faults) == (("blue",), {"red": "the LoRA is damaged"})


def test_owner_weights_are_written_to_the_ledger(ledger: Ledger, fleet: Fleet, raw: Any) -> None:
    parent_of(Children(1), ledger, fleet, {"anna": 2.5}).tick()
    assert raw.hgetall("imagemill:weights") == {"anna": "2.5"}


def test_images_of_a_child_that_died_are_handed_out_again_at_once(ledger: Ledger, fleet: Fleet, raw: Any) -> None:
    """Its lease has 20 s to go. The other child keeps its share."""
    children, processes = Children(2), [Process(), Process()]
    loaded(children, *processes)
    parent = parent_of(children, ledger, fleet)
    job = submit(ledger, 8)
    for index, process in enumerate(processes):
        assert isinstance(ledger.take(Request(child_name(NODE, index, os.getpid(), process.pid), [LANE], {LANE: 2})), Share)
    parent.tick()
    assert raw.zcard("imagemill:leased") == 2
    processes[1].kill()
    parent.tick()
    assert raw.zcard("imagemill:leased") == 1
    assert raw.lrange(f"imagemill:job:{job}:suspects", 0, -1) == ["1:2-3", "1:3-4"]
    parent.tick()
    assert raw.llen(f"imagemill:job:{job}:suspects") == 2, "once"
    processes[0].kill()


def test_every_process_that_died_is_noticed_once() -> None:
    children, first, second, third = Children(1), Process(), Process(), Process()
    loaded(children, first)
    assert children.died() == []
    first.kill()
    loaded(children, second)  # before anybody looked
    assert children.died() == [(0, first.pid)]
    assert children.died() == []
    second.kill()
    loaded(children, third)
    third.kill()
    assert children.died() == [(0, second.pid), (0, third.pid)]
    assert children.died() == []


def test_lanes_with_work_are_woken_up_one_message_per_child(ledger: Ledger, fleet: Fleet, raw: Any) -> None:
    children = Children(3)
    for index in range(3):
        children.loaded(index)
    parent: Any = parent_of(children, ledger, fleet)
    parent.tick()
    assert parent.publisher.woken == []
    submit(ledger, 8)
    raw.delete("imagemill:tender")
    parent.tick()
    assert parent.publisher.woken == [(LANE, 3)]
    parent.tick()
    assert len(parent.publisher.woken) == 1, "one node does this, once a second"


def test_wake_ups_are_limited(ledger: Ledger, fleet: Fleet, raw: Any) -> None:
    parent: Any = parent_of(Children(1), ledger, fleet)
    other = parent.node.model_copy(update={"node": "cpu@there", "children": 1000, "ready": True})
    fleet.report_node(other)
    submit(ledger, 8)
    parent.tick()
    assert parent.publisher.woken == [(LANE, MOST_WAKE_UPS)]


@pytest.mark.usefixtures("raw")
def test_lane_without_any_node_is_not_left_without_a_message(ledger: Ledger, fleet: Fleet) -> None:
    """Its nodes may be starting."""
    parent: Any = parent_of(Children(1), ledger, fleet)
    submit(ledger, 8)
    parent.tick()
    assert parent.publisher.woken == [(LANE, 1)]


@pytest.mark.usefixtures("raw")
def test_node_leaves_when_another_has_taken_its_name(
    ledger: Ledger, fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_state, "should_stop", None)
    children = Children(1)
    parent = parent_of(children, ledger, fleet)
    fleet.report_node(parent.node.model_copy(update={"process": "x/1/5"}))
    parent.tick()
    with pytest.raises(WorkerShutdown, match="1"):
        worker_state.maybe_shutdown()
    assert children.stopping()
    assert [node.process for node in fleet.nodes()] == ["x/1/5"]
    assert [record.message for record in caplog.records] == ["another node has taken this node's name; the node exits"]


@pytest.mark.usefixtures("raw")
def test_node_that_has_left_is_not_reported_again(ledger: Ledger, fleet: Fleet) -> None:
    parent = parent_of(Children(1), ledger, fleet)
    parent.leave()
    parent.tick()
    assert fleet.nodes() == []


@pytest.mark.usefixtures("raw")
def test_node_is_reported_while_it_loads_and_stays_visible_if_that_fails(
    ledger: Ledger, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Children(1)
    parent = parent_of(children, ledger, fleet)
    reported: list[bool] = []

    def look(_seconds: float) -> None:
        reported.extend(node.ready for node in fleet.nodes())
        children.failed(2, "the GPU is gone")

    monkeypatch.setattr(parent_module.time, "sleep", look)
    with pytest.raises(SystemExit, match="2"):
        parent.wait_for_children()
    assert reported == [False]
    (node,) = fleet.nodes()
    assert (node.problem, node.gone, node.ready, node.lanes) == ("the GPU is gone", True, False, ())


def test_node_goes_on_without_redis(caplog: pytest.LogCaptureFixture) -> None:
    class Down:
        def __getattr__(self, name: str) -> Any:
            raise BrokerUnavailable("Redis: gone")

    children, process = Children(1), Process()
    loaded(children, process)
    children.died()
    process.kill()
    parent = parent_of(children, Down(), Down())
    with caplog.at_level(logging.WARNING):
        parent.tick()
        parent.leave()
    assert [record.message for record in caplog.records] == ["node not reported", "node not removed from the fleet"]
