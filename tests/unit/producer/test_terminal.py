"""Messages and tables on the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from imagemill.producer import terminal
from imagemill.producer.rows import BadRow
from imagemill.producer.terminal import counted, duration
from tests.unit.producer.jobs import node, status


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


def test_text_of_a_bad_row_is_shown_unless_the_reason_quotes_it() -> None:
    out = io.StringIO()
    rows = [BadRow("a.txt:1", "not a URL, not 'cat'", "cat"), BadRow("a.txt:2", "needs a mask", "https://example.com/a.jpg")]
    terminal.bad_rows(Console(file=out, width=160), rows, 2)
    assert out.getvalue().splitlines()[1:] == [
        "  a.txt:1: not a URL, not 'cat'",
        "  a.txt:2: needs a mask: https://example.com/a.jpg",
    ]


def test_outcome_is_one_line() -> None:
    assert terminal.outcome(status(90, 10, "done")) == "done: 90 of 100 images done, 10 failed, in 5.0 s (18.00 images/s)"
    assert terminal.outcome(status(3)) == "running: 3 of 100 images done"


def printed(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(table)
    return out.getvalue()


def test_outcome_says_why_a_job_waits() -> None:
    waits = status(0, state="queued").model_copy(update={"why": "starts at 2026-11-29 08:00"})
    assert terminal.outcome(waits) == "queued: 0 of 100 images done; starts at 2026-11-29 08:00"
    assert terminal.outcome(status(3, state="paused").model_copy(update={"why": "paused"})) == "paused: 3 of 100 images done"


def test_jobs_table_leaves_out_columns_that_would_be_empty() -> None:
    over, waits = status(100, state="done"), {"state": "queued", "why": "behind 60 images of other jobs", "position": 2}
    assert [word in printed(terminal.jobs_table([over])) for word in ("owner", "waiting", "ahead")] == [False] * 3
    text = printed(terminal.jobs_table([over, over.model_copy(update=waits), over.model_copy(update={"owner": "ann"})]))
    assert [word in text for word in ("owner", "ann", f"queued, {waits['why']}", "2 jobs")] == [True] * 4


def test_status_table_shows_the_forecast() -> None:
    facts = {"owner": "ann", "waiting": 90, "running": 7, "position": 0, "ahead": 40, "starts": 1e9, "ends": 2e9, "until": 3e9}
    text = " ".join(printed(terminal.status_table(status(3).model_copy(update=facts))).split())
    for part in (
        "owner ann",
        "running 7 waiting 90",
        "position next, 40 images of other jobs before it ends",
        "ends about 2033",
    ):
        assert part in text
    text = printed(terminal.status_table(status(100, state="done")))
    assert [word in text for word in ("owner", "waiting", "position", "deadline")] == [False] * 4


def test_fleet_table_has_one_row_per_node() -> None:
    lane = "stylize.diffusion.sd15-canny"
    gpu = node(lane, "stylize.opencv", name="gpu0@a").model_copy(update={"ready": False})
    text = printed(terminal.fleet_table([gpu], {"gpu0@a": (0.934, 2)}, {"gpu0@a": {lane: 1.2345}}))
    assert "loading" in text
    assert "93%, 2 above 90 %" in text
    assert f"{lane} (1.23), stylize.opencv" in text
    assert "%" not in printed(terminal.fleet_table([gpu], {}, {}))


EVIL = "[red]x[/red]\x1b[2J\u202e\n"
SHOWN = "[red]x[/red]\ufffd[2J\ufffd\ufffd"


def test_names_from_redis_are_shown_literally() -> None:
    job = status(1).model_copy(update={"job": EVIL, "owner": EVIL, "why": EVIL, "output": EVIL, "engine": EVIL})
    evil_node = node("stylize.opencv").model_copy(update={"node": EVIL, "device": EVIL, "lanes": (EVIL,)})
    tables = (terminal.jobs_table([job]), terminal.status_table(job), terminal.fleet_table([evil_node], {}, {}))
    for table, times in zip((*tables, terminal.summary_table([job])), (4, 5, 3, 1), strict=True):
        text = printed(table).replace(" ", "")
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert text.count(SHOWN) == times, text
