"""Messages and tables on the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from imagemill.producer import terminal
from imagemill.producer.terminal import counted, duration
from imagemill.shared.messages import Node
from tests.unit.producer.jobs import status


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (12.3, "12 s"),
        (60, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.6, "1 h 0 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_duration_is_written_in_the_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 images"), (1, "1 image"), (12_000, "12,000 images")])
def test_count_has_thousands_separators_and_a_plural(number: int, text: str) -> None:
    assert counted(number, "image") == text


def test_outcome_is_one_line() -> None:
    assert terminal.outcome(status(90, 10, "done")) == "done: 90 of 100 images done, 10 failed, in 5.0 s (18.00 images/s)"
    assert terminal.outcome(status(3)) == "running: 3 of 100 images done"


def printed(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(table)
    return out.getvalue()


def test_job_without_a_worker_is_marked() -> None:
    job = status(3)
    for table in (terminal.jobs_table, lambda jobs, *rest: terminal.status_table(jobs[0], *rest)):
        assert "running, no worker for opencv" in printed(table([job], {job.job}))
        assert "no worker" not in printed(table([job]))


def test_fleet_table_has_one_row_per_node() -> None:
    queues = tuple(f"imagemill.stylize.diffusion.sd15-canny{priority}" for priority in (".high", "", ".low"))
    node = Node(node="gpu0@a", host="a", pid=1, device="gpu0", queues=queues, children=1, ready=False)
    text = printed(terminal.fleet_table([node], {"gpu0@a": (0.934, 2)}))
    assert "loading" in text
    assert "93%, 2 above 90 %" in text
    assert text.count("stylize.diffusion.sd15-canny") == 1
    assert "%" not in printed(terminal.fleet_table([node.model_copy(update={"ready": True})], {}))
