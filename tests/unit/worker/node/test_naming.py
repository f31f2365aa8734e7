"""Names of nodes: no two live nodes have the same, and a node that is restarted gets its old one back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.fleet import NODE_SECONDS, Fleet
from imagemill.shared.messages import Node
from imagemill.worker.node.naming import is_running, take_name, this_process
from tests.workers import wait_until

redis_test = [pytest.mark.integration, pytest.mark.usefixtures("raw")]
SLEEP = "import time; time.sleep(600)"


def node(name: str = "cpu@a", process: str = "") -> Node:
    return Node(node=name, host="a", pid=1, process=process or this_process(), device="cpu", children=2, ready=False)


def elsewhere() -> str:
    """A process of another host or container."""
    return f"{uuid.uuid4().hex}/1/100"


def never(_seconds: float) -> None:
    raise AssertionError("nothing to wait for")


def age(raw: Any, name: str, seconds: float) -> None:
    """Let a node's latest report be older by this many seconds."""
    report = Node.model_validate_json(raw.hget("imagemill:nodes", name))
    raw.hset("imagemill:nodes", name, report.model_copy(update={"seen": report.seen - seconds}).model_dump_json())


class Other:
    """Another process, until it is killed."""

    def __init__(self) -> None:
        code = f"from imagemill.worker.node.naming import this_process; print(this_process(), flush=True); {SLEEP}"
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.name = self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class TestTakeName:
    pytestmark = redis_test

    def test_free_name_is_taken_and_seen_in_the_fleet(self, fleet: Fleet) -> None:
        assert take_name(fleet, node(), never) == node()
        (report,) = fleet.nodes()
        assert (report.node, report.process, report.ready) == ("cpu@a", this_process(), False)
        assert take_name(fleet, node(), never).node == "cpu@a", "it is our own"

    def test_names_of_live_nodes_are_passed_over_with_a_warning(self, fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
        """Even if they have been silent: they may be waiting for Redis."""
        first, second = Other(), Other()
        fleet.report_node(node("cpu@a", first.name))
        fleet.report_node(node("cpu-2@a", second.name))
        assert take_name(fleet, node(), never).node == "cpu-3@a"
        warnings = [(record.message, vars(record)["node"]) for record in caplog.records]
        assert warnings == [("name in use; the node takes another", name) for name in ("cpu@a", "cpu-2@a")]
        assert [report.node for report in fleet.nodes()] == ["cpu-2@a", "cpu-3@a", "cpu@a"]
        first.kill()
        second.kill()

    def test_live_node_keeps_its_name_while_it_is_silent(self, fleet: Fleet, raw: Any) -> None:
        """It may be waiting for Redis."""
        other = Other()
        fleet.report_node(node("cpu@a", other.name))
        age(raw, "cpu@a", 10 * NODE_SECONDS)
        assert take_name(fleet, node(), never).node == "cpu-2@a"
        other.kill()

    def test_name_of_a_process_that_ended_here_is_free_at_once(self, fleet: Fleet) -> None:
        other = Other()
        fleet.report_node(node("cpu@a", other.name))
        other.kill()
        assert take_name(fleet, node(), never).node == "cpu@a"
        assert [report.process for report in fleet.nodes()] == [this_process()]

    def test_node_elsewhere_keeps_its_name_if_it_reports_again(self, fleet: Fleet) -> None:
        other = node("cpu@a", elsewhere())
        fleet.report_node(other)
        assert take_name(fleet, node(), lambda _: fleet.report_node(other)).node == "cpu-2@a"

    def test_name_of_a_node_elsewhere_is_free_once_it_counts_as_dead(self, fleet: Fleet, raw: Any) -> None:
        fleet.report_node(node("cpu@a", elsewhere()))
        waits: list[float] = []

        def pause(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 3:
                age(raw, "cpu@a", NODE_SECONDS)

        assert take_name(fleet, node(), pause).node == "cpu@a"
        assert len(waits) == 3

    def test_node_of_an_earlier_release_keeps_its_name(self, fleet: Fleet, raw: Any) -> None:
        old = node("cpu@a").model_copy(update={"process": ""})

        def report() -> None:
            fleet.report_node(old)
            raw.hset("imagemill:nodes", "cpu@a", fleet.nodes()[0].model_dump_json(exclude={"process"}))

        report()
        assert take_name(fleet, node(), lambda _: report()).node == "cpu-2@a"

    def test_node_waits_for_redis(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        claim, failures, waits = fleet.claim_name, [BrokerUnavailable("Redis: gone")] * 6, list[float]()

        def claim_later(*arguments: Any) -> Any:
            if failures:
                raise failures.pop()
            return claim(*arguments)

        monkeypatch.setattr(fleet, "claim_name", claim_later)
        assert take_name(fleet, node(), waits.append).node == "cpu@a"
        assert waits == [1, 2, 4, 8, 10, 10]


def test_process_is_running_until_it_ends() -> None:
    other = Other()
    assert is_running(this_process())
    assert is_running(other.name)
    assert this_process() != other.name
    os.kill(other.process.pid, signal.SIGKILL)
    wait_until(lambda: psutil.Process(other.process.pid).status() == psutil.STATUS_ZOMBIE, "nobody has waited for it yet")
    assert is_running(other.name) is False
    other.kill()
    assert is_running(other.name) is False


def test_process_that_got_the_id_of_another_is_not_taken_for_it() -> None:
    place, pid, start = this_process().split("/")
    assert is_running(f"{place}/{pid}/{int(start) - 1}") is False


@pytest.mark.parametrize("describe", [elsewhere, lambda: "", lambda: uuid.uuid4().hex])
def test_processes_elsewhere_are_unknown(describe: Callable[[], str]) -> None:
    assert is_running(describe()) is None
