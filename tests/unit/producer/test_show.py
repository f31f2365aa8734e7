import io
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from imagemill.producer import show
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


def test_where_there_is_no_terminal_progress_is_a_line_per_tenth() -> None:
    out = io.StringIO()
    followed = show.follow(updates(), Console(file=out, width=200))
    assert followed.status.state == "done"
    lines = out.getvalue().splitlines()
    assert len(lines) == 12  # ten tenths, the failure, all of them
    assert "stylize (opencv) running: 10 of 100 images done" in lines[1]


def test_failures_are_shown_as_they_are_without_steering_the_terminal() -> None:
    out = io.StringIO()
    show.follow(updates(), Console(file=out, width=200))
    assert "image 7: truncated: [bold]half[/bold] \ufffd]0;x\ufffd" in out.getvalue()


def test_of_an_image_that_was_retried_the_last_result_counts() -> None:
    first = [
        ItemResult(index=1, state="failed", code="timeout", retryable=True),
        ItemResult(index=2, state="done", notes=("enlarged", "flag:blurred")),
        ItemResult(index=3, state="done", notes=("flag:cast", "flag:blurred")),
    ]
    again = [ItemResult(index=1, state="done"), ItemResult(index=2, state="done")]
    failed = ItemResult(index=4, state="failed", code="not_found")
    out = Console(file=io.StringIO())
    seen = show.follow(iter([(status(2, 1), first)]), out)
    assert (seen.flagged, seen.retryable) == (2, True)
    seen = show.follow(iter([(status(2, 1), first), (status(3, 1), [*again, failed])]), out)
    assert (seen.flagged, seen.retryable) == (1, False)


def test_on_a_terminal_there_is_a_bar() -> None:
    out = io.StringIO()
    show.follow(updates(), Console(file=out, force_terminal=True, width=120))
    assert "━" in out.getvalue()
    assert "100/100" in out.getvalue()


def test_outcome() -> None:
    assert show.outcome(status(90, 10, "done")) == "done: 90 of 100 images done, 10 failed, in 5.0 s (18.00 images/s)"
    assert show.outcome(status(3)) == "running: 3 of 100 images done"


def printed(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(table)
    return out.getvalue()


def test_a_job_that_no_worker_can_take_is_marked() -> None:
    job = status(3)
    for table in (show.jobs_table, lambda jobs, *rest: show.status_table(jobs[0], *rest)):
        assert "running, no worker for opencv" in printed(table([job], {job.job}))
        assert "no worker" not in printed(table([job]))


def test_a_fleet_is_a_row_per_node() -> None:
    queues = tuple(f"imagemill.stylize.diffusion.sd15-canny{priority}" for priority in (".high", "", ".low"))
    node = Node(node="gpu0@a", host="a", pid=1, device="gpu0", queues=queues, children=1, ready=False)
    text = printed(show.fleet_table([node], {"gpu0@a": (0.934, 2)}))
    assert "loading" in text
    assert "93%, 2 above 90 %" in text
    assert text.count("stylize.diffusion.sd15-canny") == 1
    assert "%" not in printed(show.fleet_table([node.model_copy(update={"ready": True})], {}))
