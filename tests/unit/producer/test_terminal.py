import io
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from imagemill.producer import terminal
from imagemill.shared.messages import ItemResult, JobState, JobStatus, Node


def status(done: int, failed: int = 0, state: JobState = "running") -> JobStatus:
    return JobStatus(
        job="260730-00000000",
        operation="stylize",
        engine="opencv",
        lane="opencv",
        state=state,
        total=100,
        done=done,
        failed=failed,
        duplicates=0,
        priority="normal",
        output="s3://b/p",
        created=0,
        seconds=5.0,
    )


def updates() -> Iterator[tuple[JobStatus, list[ItemResult]]]:
    for done in range(100):
        yield status(done), []
    yield status(99, 1), [ItemResult(index=7, state="failed", code="truncated", message="[bold]half[/bold] \x1b]0;x\x07")]
    yield status(99, 1, "done"), []


def test_progress_is_one_line_per_tenth_without_a_terminal() -> None:
    out = io.StringIO()
    followed = terminal.follow(updates(), Console(file=out, width=200))
    assert followed.status.state == "done"
    lines = out.getvalue().splitlines()
    assert len(lines) == 12  # ten tenths, the failure, all of them
    assert "stylize (opencv) running: 10 of 100 images done" in lines[1]


def test_failures_are_printed_literally_without_control_characters() -> None:
    out = io.StringIO()
    terminal.follow(updates(), Console(file=out, width=200))
    assert "image 7: truncated: [bold]half[/bold] \ufffd]0;x\ufffd" in out.getvalue()


def test_last_result_of_a_retried_image_counts() -> None:
    first = [
        ItemResult(index=1, state="failed", code="timeout", retryable=True),
        ItemResult(index=2, state="done", notes=("enlarged", "flag:blurred")),
        ItemResult(index=3, state="done", notes=("flag:cast", "flag:blurred")),
    ]
    again = [ItemResult(index=1, state="done"), ItemResult(index=2, state="done")]
    failed = ItemResult(index=4, state="failed", code="not_found")
    out = Console(file=io.StringIO())
    seen = terminal.follow(iter([(status(2, 1), first)]), out)
    assert (seen.flagged, seen.retryable) == (2, True)
    seen = terminal.follow(iter([(status(2, 1), first), (status(3, 1), [*again, failed])]), out)
    assert (seen.flagged, seen.retryable) == (1, False)


def test_progress_is_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    terminal.follow(updates(), Console(file=out, force_terminal=True, width=120))
    assert "━" in out.getvalue()
    assert "100/100" in out.getvalue()


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
