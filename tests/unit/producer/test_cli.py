"""The command line against a real Redis. Tests that need processed images write the ledger as a worker would."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from click.testing import CliRunner, Result

from imagemill.producer.cli import main
from imagemill.producer.client import Client
from imagemill.shared.engines import ENGINES
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import Lease
from imagemill.shared.messages import MANIFEST, Item, ItemResult, JobStatus, Node
from imagemill.shared.quality import RULES, Measures, Quality
from imagemill.shared.queues import queue_name
from imagemill.shared.settings import Settings
from tests.ledgers import Ledger
from tests.services.redis import running_redis

Invoke = Callable[..., Result]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    ledger = Ledger(url)
    yield ledger
    ledger.close()


@pytest.fixture
def fleet(url: str) -> Iterator[Fleet]:
    fleet = Fleet(url)
    yield fleet
    fleet.forget_node("cpu@x")
    fleet.close()


@pytest.fixture
def imagemill(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run `imagemill ...` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMAGEMILL_REDIS_URL", url)

    def invoke(*args: str, stdin: str | None = None, client: Callable[[Settings], Client] | None = None) -> Result:
        return CliRunner().invoke(main, args, input=stdin, obj=client)

    return invoke


def work(ledger: Ledger, job: str) -> None:
    """Act as a worker: every image is done, except those with `bad` in their URL."""
    number = 0
    while isinstance(lease := ledger.acquire(job, number, task="t", token=f"t/{number}"), Lease):
        for item in lease.items:
            if item.duplicate_of is None:
                ledger.record(job, outcome(item))
        number += 1
        if ledger.complete(lease) == "finishing":
            lease = ledger.acquire(job, MANIFEST, task="t", token="t/m")
            assert isinstance(lease, Lease)
            ledger.complete(lease)
            return


def outcome(item: Item) -> ItemResult:
    if "bad" in item.source:
        return ItemResult(index=item.index, state="failed", code="not_found", message="there is \x1b[31mnothing", attempts=2)
    return ItemResult(index=item.index, state="done", output=f"s3://results/out/{item.index}.png")


class Worked(Client):
    """A client whose jobs are done as soon as they are watched."""

    def watch(self, job: str, *, every: float = 1.0) -> Iterator[tuple[JobStatus, list[ItemResult]]]:
        with closing(Ledger.of(self._settings)) as ledger:
            work(ledger, job)
        return super().watch(job, every=every)


class Interrupted(Client):
    """A client that is interrupted with Ctrl-C while watching."""

    def watch(self, job: str, *, every: float = 1.0) -> Iterator[tuple[JobStatus, list[ItemResult]]]:
        yield self.status(job), []
        raise KeyboardInterrupt


GOOD = "https://example.com/a.jpg\nhttps://example.com/b.jpg\nhttps://example.com/a.jpg\n"
MIXED = GOOD + "https://example.com/bad.jpg\n"
STYLIZE = ("submit", "-", "--operation", "stylize", "--output", "s3://results/out")


def submitted(imagemill: Invoke, rows: str = MIXED, *more: str) -> str:
    result = imagemill(*STYLIZE, *more, stdin=rows)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


# --- submit -----------------------------------------------------------------------------------------------------------


def test_submit_prints_only_the_job_on_stdout_and_warns_without_workers(imagemill: Invoke, ledger: Ledger) -> None:
    result = imagemill(*STYLIZE, "--priority", "high", stdin=GOOD)
    job = result.stdout.removesuffix("\n")
    assert ledger.status(job).total == 3
    assert f"{job}: 3 images queued, including 1 duplicate" in result.stderr
    assert "no worker listens to imagemill.stylize.opencv.high; start one with `imagemill worker --cpu`" in result.stderr


def test_submit_names_the_model_to_pull_when_no_worker_has_it(imagemill: Invoke) -> None:
    flags = ("--operation", "remove-background", "--engine", "rembg", "--set", "model=silueta", "--output", "s3://results/x")
    stderr = imagemill("submit", "-", *flags, stdin=GOOD).stderr
    assert "no worker listens to imagemill.remove-background.rembg.silueta" in stderr
    assert "`imagemill models pull silueta`" in stderr
    assert "IMAGEMILL_WORKER__ENGINES='[\"rembg\"]' imagemill worker" in " ".join(stderr.split())


def test_submit_does_not_warn_when_a_worker_listens(imagemill: Invoke, fleet: Fleet) -> None:
    node = Node(node="cpu@x", host="x", pid=1, device="cpu", queues=(queue_name("stylize", "opencv"),), children=1, ready=True)
    fleet.report_node(node)
    assert "no worker" not in imagemill(*STYLIZE, stdin=GOOD).stderr


@pytest.mark.parametrize(("flags", "reuse"), [([], True), (["--fresh"], False)], ids=["remembered", "fresh"])
def test_fresh_turns_off_reuse_of_results(imagemill: Invoke, ledger: Ledger, flags: list[str], reuse: bool) -> None:
    job = imagemill(*STYLIZE, *flags, stdin=GOOD).stdout.strip()
    policy = ledger.spec(job).policy
    assert (policy.reuse, policy.attempts) == (reuse, 3)


def test_submit_json_prints_the_counts(imagemill: Invoke) -> None:
    result = imagemill(*STYLIZE, "--json", "--skip-invalid", stdin=GOOD + "ftp://example.com/c.jpg\n")
    summary = json.loads(result.stdout)
    assert summary == {"job": summary["job"], "total": 3, "duplicates": 1, "invalid": 1}
    assert "stdin:4" in result.stderr


@pytest.mark.parametrize(("rows", "code", "done", "failed"), [(GOOD, 0, 3, 0), (MIXED, 1, 3, 1)])
def test_submit_wait_prints_one_json_object_and_exits_with_1_on_failures(
    imagemill: Invoke, rows: str, code: int, done: int, failed: int
) -> None:
    result = imagemill(*STYLIZE, "--wait", "--json", stdin=rows, client=Worked)
    summary = json.loads(result.stdout)
    assert list(summary) == ["job", "state", "total", "done", "failed", "seconds"]
    assert (summary["state"], summary["total"], summary["done"], summary["failed"]) == ("done", done + failed, done, failed)
    assert result.exit_code == code


def test_invalid_rows_are_listed_and_nothing_is_queued(imagemill: Invoke, ledger: Ledger) -> None:
    before = {status.job for status in ledger.jobs()}
    result = imagemill(*STYLIZE, stdin=GOOD + "".join(f"nonsense-{n}\n" for n in range(25)))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "stdin:4: source: " in result.stderr
    assert "nonsense-19" in result.stderr
    assert "nonsense-20" not in result.stderr
    assert "and 5 more" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error (invalid_source): 25 invalid rows, nothing was queued")
    assert "--skip-invalid" in result.stderr
    assert {status.job for status in ledger.jobs()} == before


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--operation", "stilize"], "did you mean 'stylize'?"),
        (["--engine", "opencw"], "did you mean 'opencv'?"),
        (["--set", "colur=yes"], "did you mean 'colour'?"),
        (["--set", "long_edge=7"], "greater than or equal to 16, not '7'"),
        (["--set", "colour"], "KEY=VALUE, not 'colour'"),
        (["--mask", "mask.png"], "stylize (opencv) has no option 'mask'"),
        (["--set", "reference=ftp://x/y.png"], "reference: "),
        (["--quality", "101"], "output: quality: "),
        (["--key", "{name}"], "output: key: "),
        (["--output", "ftp://host/x"], "output: url: "),
        (["--output", "./out", "--expire-days", "3"], "--expire-days needs an --output of s3://bucket/prefix"),
    ],
)
def test_invalid_options_are_refused_in_one_line(imagemill: Invoke, more: list[str], reason: str) -> None:
    result = imagemill(*STYLIZE, *more, stdin=GOOD)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error (invalid_option): ")
    assert reason in line


def test_paths_become_file_urls(imagemill: Invoke, ledger: Ledger, tmp_path: Path) -> None:
    result = imagemill(
        *("submit", "-", "--operation", "inpaint", "--output", "./my out", "--mask", "m.png", "--set", "mask-dilate=2"),
        stdin=GOOD,
    )
    assert result.exit_code == 0, result.stderr
    spec = ledger.spec(result.stdout.strip())
    assert spec.output.url == (tmp_path / "my out").as_uri()
    assert spec.options.model_dump()["mask"] == (tmp_path / "m.png").as_uri()
    assert spec.options.model_dump()["mask_dilate"] == 2


def test_unreachable_redis_exits_with_3(imagemill: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMILL_REDIS_URL", "redis://:secret@127.0.0.1:1/0")
    result = imagemill("status", "260101-12345678")
    assert result.exit_code == 3
    (line,) = result.stderr.splitlines()
    assert line.startswith("error (broker_unavailable): ")
    assert "secret" not in line


def test_invalid_setting_is_named_and_exits_with_2(imagemill: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMILL_EXPIRE_DAYS", "soon")
    result = imagemill("jobs")
    assert result.exit_code == 2
    assert "IMAGEMILL_EXPIRE_DAYS" in result.stderr


def test_unexpected_exceptions_propagate(imagemill: Invoke) -> None:
    def broken(settings: Settings) -> Client:
        raise ZeroDivisionError

    assert isinstance(imagemill("jobs", client=broken).exception, ZeroDivisionError)


# --- following --------------------------------------------------------------------------------------------------------


def test_watch_shows_failures_and_the_outcome(imagemill: Invoke) -> None:
    job = submitted(imagemill)
    result = imagemill("watch", job, client=Worked)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "image 3: not_found: there is" in result.stderr
    assert "\x1b" not in result.stderr
    assert "done: 3 of 4 images done, 1 failed" in result.stderr
    assert f"`imagemill results {job} --failed`\n" in result.stderr, "a retry can't help with not_found"


def test_watch_ends_with_the_number_of_flagged_images(imagemill: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "outcome", styled)
    job = submitted(imagemill, "".join(f"https://example.com/{n}.jpg\n" for n in range(5)))
    result = imagemill("watch", job, client=Worked)
    assert result.exit_code == 0
    assert f"1 image flagged by the check: `imagemill results {job} --flagged`" in result.stderr


@pytest.mark.parametrize("command", [["watch"], ["submit", "--wait"]])
def test_ctrl_c_reports_that_the_job_continues(imagemill: Invoke, command: list[str]) -> None:
    job = submitted(imagemill)
    arguments = ["watch", job] if command == ["watch"] else [*STYLIZE, "--wait"]
    result = imagemill(*arguments, stdin=GOOD, client=Interrupted)
    assert result.exit_code == 130
    assert "the job continues; follow it with `imagemill watch" in result.stderr


def test_fleet_lists_nodes_and_jobs_without_a_worker(imagemill: Invoke, ledger: Ledger, fleet: Fleet) -> None:
    assert "no worker is running" in imagemill("fleet").stderr
    job = submitted(imagemill)
    assert json.loads(imagemill("status", job, "--json").stdout)["served"] is False
    assert "queued, no worker for opencv" in imagemill("jobs").stdout
    lacks = ("no model of the engine rembg is in /models: imagemill models pull u2net",)
    node = Node(node="cpu@x", host="x", pid=1, device="cpu", queues=(), children=2, ready=True, lacks=lacks)
    fleet.report_node(node)
    result = imagemill("fleet")
    assert "cpu@x" in result.stdout
    assert f"cpu@x: {lacks[0]}" in result.stderr
    assert re.search(rf"no worker can take \d+ jobs?: .*{job}", result.stderr)
    fleet.report_node(node.model_copy(update={"queues": (queue_name("stylize", "opencv"),), "lacks": ()}))
    fleet.report_memory("cpu@x", 0.95, 3)
    result = imagemill("fleet", "--json")
    assert job not in result.stderr
    (line,) = json.loads(result.stdout)
    assert (line["node"], line["memory"]) == ("cpu@x", [0.95, 3])
    work(ledger, job)
    assert json.loads(imagemill("jobs", "--json").stdout)[0]["served"] is True


def test_status_and_jobs_show_a_finished_job(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill)
    work(ledger, job)
    shown = json.loads(imagemill("status", job, "--json").stdout)
    assert (shown["job"], shown["state"], shown["done"], shown["failed"]) == (job, "done", 3, 1)
    assert json.loads(imagemill("jobs", "--json").stdout)[0]["job"] == job
    assert job in imagemill("jobs").stdout
    assert "s3://results/out" in imagemill("status", job).stdout


@pytest.mark.parametrize("command", ["status", "watch", "results", "retry", "cancel", "report"])
def test_unknown_job_exits_with_2(imagemill: Invoke, command: str) -> None:
    result = imagemill(command, "260101-12345678")
    assert result.exit_code == 2
    assert result.stderr.startswith("error (job_not_found): ")
    assert "260101-12345678" in result.stderr


# --- results ----------------------------------------------------------------------------------------------------------


def test_results_prints_jsonl(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill)
    assert [json.loads(line)["state"] for line in imagemill("results", job).stdout.splitlines()] == ["pending"] * 4
    work(ledger, job)
    rows = [json.loads(line) for line in imagemill("results", job).stdout.splitlines()]
    assert [row["state"] for row in rows] == ["done", "done", "done", "failed"]
    assert rows[2]["duplicate_of"] == 0
    assert rows[2]["output"] == rows[0]["output"] == "s3://results/out/0.png"
    assert rows[3] == {
        "item": rows[3]["item"],
        "index": 3,
        "source": "https://example.com/bad.jpg",
        "state": "failed",
        "output": None,
        "code": "not_found",
        "message": "there is \x1b[31mnothing",
        "attempts": 2,
        "duplicate_of": None,
        "notes": [],
    }


def test_results_prints_failures_as_csv(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill)
    work(ledger, job)
    header, row = imagemill("results", job, "--format", "csv", "--failed").stdout.splitlines()
    assert header == "item,index,source,state,output,code,message,attempts,duplicate_of,notes"
    assert row.split(",")[1:6] == ["3", "https://example.com/bad.jpg", "failed", "", "not_found"]


def test_submit_passes_on_check_and_limits(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill, GOOD, "--check", "repair", "--limit", "most_cast=2")
    assert ledger.spec(job).policy.quality == Quality(mode="repair", most_cast=2)
    assert ledger.spec(submitted(imagemill)).policy.quality == Quality()
    refused = imagemill(*STYLIZE, "--limit", "most_cats=2", stdin=GOOD)
    assert refused.exit_code == 2
    assert "did you mean 'most_cast'?" in refused.stderr


STYLED = Measures(sharpness=500, kept=1, edges=0.8, look=(60, 0, 0, 20, 5, 5), before=(50, 0, 0, 20, 5, 5))


def styled(item: Item) -> ItemResult:
    """The third image is flagged, the fifth is an outlier."""
    odd = STYLED.model_copy(update={"look": (60, 0, 40, 20, 5, 5)})
    notes = ("enlarged", "flag:cast") if item.index == 2 else ()
    output, measures = f"s3://results/out/{item.index}.png", odd if item.index == 4 else STYLED
    return ItemResult(index=item.index, state="done", output=output, notes=notes, quality=measures)


def test_results_flagged_prints_flagged_images_and_outliers(
    imagemill: Invoke, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "outcome", styled)
    job = submitted(imagemill, "".join(f"https://example.com/{n}.jpg\n" for n in range(30)))
    assert imagemill("results", job, "--flagged").stdout == ""
    work(ledger, job)
    rows = [json.loads(line) for line in imagemill("results", job, "--flagged").stdout.splitlines()]
    noted = [json.loads(line)["notes"] for line in imagemill("results", job).stdout.splitlines()]
    assert noted[1:3] == [[], ["enlarged", "flag:cast"]]
    assert [(row["index"], row["flags"]) for row in rows] == [(2, ["cast"]), (4, ["drift:blue-yellow"])]
    header, *lines = imagemill("results", job, "--flagged", "--format", "csv").stdout.splitlines()
    assert header.endswith(",duplicate_of,notes,flags")
    assert [line.split(",")[-2:] for line in lines] == [["enlarged flag:cast", "cast"], ["", "drift:blue-yellow"]]
    assert imagemill("results", job, "--flagged", "--failed").exit_code == 2


def test_results_presign_adds_links(imagemill: Invoke, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-show")
    monkeypatch.setenv("IMAGEMILL_S3__ENDPOINT_URL", "http://127.0.0.1:1")
    job = submitted(imagemill)
    work(ledger, job)
    result = imagemill("results", job, "--presign", "60")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert parse_qs(urlsplit(rows[0]["link"]).query)["X-Amz-Expires"] == ["60"]
    assert rows[3]["link"] is None
    assert "do-not-show" not in result.output
    assert imagemill("results", job, "--presign", "0").exit_code == 2


# --- changing ---------------------------------------------------------------------------------------------------------


def test_retry_queues_failed_images(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill)
    early = imagemill("retry", job)
    assert early.exit_code == 2
    assert "is still queued" in early.stderr
    work(ledger, job)
    assert "1 image queued again" in imagemill("retry", job).stderr
    assert ledger.status(job).state == "queued"
    work(ledger, job)
    assert imagemill("retry", job, "--wait", client=Worked).exit_code == 1


def test_retry_does_nothing_when_no_image_failed(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill, GOOD)
    work(ledger, job)
    result = imagemill("retry", job, "--wait")
    assert result.exit_code == 0
    assert "nothing to retry" in result.stderr


def test_cancel_ends_a_job(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill)
    assert imagemill("cancel", job).exit_code == 0
    assert ledger.status(job).state in ("finishing", "cancelled")


def test_report_writes_a_page(imagemill: Invoke, ledger: Ledger, tmp_path: Path) -> None:
    job = submitted(imagemill)
    work(ledger, job)
    assert imagemill("report", job).stdout == f"{job}.html\n"
    assert "not_found" in (tmp_path / f"{job}.html").read_text()
    refused = imagemill("report", job, "--out", "no/such/folder/x.html")
    assert refused.exit_code == 2
    assert "can't write no/such/folder/x.html" in refused.stderr


def test_help_lists_all_commands(imagemill: Invoke) -> None:
    assert imagemill("--version").stdout.startswith("imagemill, version ")
    listed = imagemill("--help").stdout
    for name in ("demo", "submit", "status", "watch", "results", "retry", "cancel", "report", "jobs", "fleet"):
        assert f"  {name} " in listed


@pytest.mark.parametrize(
    ("flags", "shown", "hidden"),
    [
        ([], ["--help-options"], ["mask_feather", "strength", "most_step"]),
        (["--operation", "inpaint"], ["inpaint (opencv)", "inpaint (lama)", "mask_feather", "most_step"], ["stylize ("]),
        (["--operation", "inpaint", "--engine", "lama"], ["inpaint (lama)", "strategy"], ["inpaint (opencv)"]),
        (["--preset", "sketch"], ["stylize (diffusion)", "strength"], ["stylize (opencv)", "inpaint ("]),
        (["--operation", "unknown"], ["--help-options"], ["mask_feather"]),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["help first", "help last"])
def test_submit_help_shows_the_options_of_the_named_operation(
    imagemill: Invoke, flags: list[str], shown: list[str], hidden: list[str], first: bool
) -> None:
    result = imagemill("submit", *(["--help", *flags] if first else [*flags, "--help"]))
    assert result.exit_code == 0
    assert "--output" in result.stdout
    assert [name for name in shown if name not in result.stdout] == []
    assert [name for name in hidden if name in result.stdout] == []


def test_help_options_lists_the_options_of_every_engine_and_every_limit(imagemill: Invoke) -> None:
    text = " ".join(imagemill("submit", "--help-options").stdout.split())
    for engine in ENGINES:
        assert f"{engine.operation} ({engine.name}), --set:" in text
        fields = {name: field for name, field in engine.options.model_fields.items() if name != "engine"}
        assert [name for name, field in fields.items() if f" {name} {field.description} (" not in text] == []
    assert [name for name in RULES if f" {name} flag:{RULES[name].flag}: " not in text] == []
    assert "default )" not in text
