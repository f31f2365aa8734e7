"""The client against a real Redis. The tests act as the worker by writing to the ledger."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import BadRow, SourceRow, read_sources
from imagemill.shared.broker import Publisher
from imagemill.shared.errors import BrokerUnavailable, InvalidOption, InvalidSource, JobNotFound, UsageError
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import ManifestDue, Request, Share
from imagemill.shared.ledger.submitting import SubmitLedger
from imagemill.shared.messages import ItemResult, Job, Node, Output, Row
from imagemill.shared.options.inpaint import OpencvInpaint
from imagemill.shared.options.stylize import OpencvStylize
from imagemill.shared.settings import S3Settings, Settings
from tests.conftest import client_for
from tests.ledgers import Ledger

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("raw")]

OUT = Output(url="s3://results/sketches")
SPEC = Job(operation="stylize", output=OUT)
LANE = "stylize.opencv"
QUEUE = f"imagemill.{LANE}"
CHILD = "cpu@a/0/1"


def rows(count: int, start: int = 0) -> list[SourceRow | BadRow]:
    return [SourceRow(f"list:{n + 1}", {"source": f"https://example.com/{n}.jpg"}) for n in range(start, start + count)]


def messages(raw: Any, queue: str = QUEUE) -> list[dict[str, Any]]:
    """Task name, arguments and Flower's text of the messages on a queue, in the order they are taken."""
    found = []
    for text in reversed(raw.lrange(queue, 0, -1)):
        message = json.loads(text)
        _, arguments, _ = json.loads(base64.b64decode(message["body"]))
        found.append({"task": message["headers"]["task"], "shown": message["headers"]["kwargsrepr"], **arguments})
    return found


def node(children: int, lane: str = LANE, name: str = "cpu@a") -> Node:
    return Node(node=name, host="a", pid=1, device="cpu", lanes=(lane,), children=children, ready=True)


def take(ledger: Ledger, images: int = 10_000) -> Share:
    """A share of at most this many images."""
    share = ledger.take(Request(CHILD, [LANE], {LANE: images}))
    assert isinstance(share, Share)
    return share


def finish(ledger: Ledger, share: Share, outcome: Callable[[int], ItemResult]) -> None:
    """Record all images of a share, as a worker does."""
    for item in share.items:
        ledger.record(share.job, outcome(item.index))
    ledger.give_back(share, CHILD)


def write_manifest(ledger: Ledger) -> None:
    due = ledger.take(Request(CHILD, [LANE], {LANE: 1}))
    assert isinstance(due, ManifestDue)
    ledger.end_job(due.job, None)


def work(ledger: Ledger, outcome: Callable[[int], ItemResult]) -> None:
    """Do all that waits in the lane."""
    while (answer := ledger.take(Request(CHILD, [LANE], {LANE: 10_000}))) != "none":
        if isinstance(answer, Share):
            finish(ledger, answer, outcome)
        elif isinstance(answer, ManifestDue):
            ledger.end_job(answer.job, None)


def done(index: int) -> ItemResult:
    return ItemResult(index=index, state="done", output=f"s3://results/sketches/{index}.png")


def failed(index: int) -> ItemResult:
    return ItemResult(index=index, state="failed", code="not_found", message="there is no such image")


# --- submitting -------------------------------------------------------------------------------


def test_submit_writes_the_ledger(client: Client, raw: Any) -> None:
    submission = client.submit(iter(rows(70)), SPEC)
    assert (submission.total, submission.duplicates) == (70, 0)
    assert (submission.served, submission.nodes, submission.invalid_count) == (False, 0, 0)
    status = client.status(submission.job)
    assert (status.state, status.total, status.done, status.failed) == ("queued", 70, 0, 0)
    assert (status.operation, status.engine, status.output) == ("stylize", "opencv", OUT.url)
    found = list(client.results(submission.job))
    assert [row.source for row in found] == [f"https://example.com/{n}.jpg" for n in range(70)]
    assert {row.state for row in found} == {"pending"}


def test_message_is_a_wake_up_and_contains_no_urls(client: Client, raw: Any) -> None:
    client.submit(rows(70), SPEC)
    assert messages(raw) == [{"task": "imagemill.stylize", "shown": LANE, "version": 2, "lane": LANE}]
    assert "example.com" not in "".join(raw.lrange(QUEUE, 0, -1))


def test_images_keep_their_order_over_several_writes(client: Client, ledger: Ledger) -> None:
    submission = client.submit((row for row in rows(32 * 64 + 1)), SPEC)
    assert [row.index for row in client.results(submission.job)] == list(range(32 * 64 + 1))
    assert [item.index for item in take(ledger).items] == list(range(32 * 64 + 1))


def test_interrupted_or_refused_list_leaves_nothing_in_redis(client: Client, raw: Any) -> None:
    def interrupted() -> Iterator[SourceRow | BadRow]:
        yield from rows(3000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.submit(interrupted(), SPEC)
    with pytest.raises(InvalidSource):
        client.submit([*rows(3000), BadRow("list:3001", "no URL", "")], SPEC)
    with pytest.raises(InvalidSource):
        client.submit([], SPEC)
    assert raw.keys("*") == []


def test_invalid_rows_are_reported_and_nothing_is_queued(client: Client, raw: Any, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(
        b"https://example.com/1.jpg\n\xff\nftp://example.com/3.jpg?sig=hidden\nhttps://example.com/4.jpg\nfive\nsix\n"
    )
    with pytest.raises(InvalidSource) as caught:
        client.submit(read_sources([str(path)], s3=client.s3), SPEC)
    assert [row.place for row in caught.value.rows] == [f"{path}:{n}" for n in (2, 3, 5, 6)]
    assert f"{path}:2: the line is not UTF-8" in caught.value.message
    assert "4 invalid rows, nothing was queued" in caught.value.message
    assert "and 1 more" in caught.value.message
    assert "hidden" not in caught.value.message
    assert raw.keys("*") == []


def test_invalid_rows_are_skipped_and_others_keep_their_index(client: Client) -> None:
    bad = BadRow("list:2", "no URL in the source column", "")
    listed = [*rows(1), bad, SourceRow("list:3", {"source": "nonsense"}), *rows(1, start=3)]
    submission = client.submit(listed, SPEC, skip_invalid=True)
    assert (submission.total, submission.invalid_count) == (2, 2)
    assert submission.invalid[0] == bad
    assert submission.invalid[1].place == "list:3"
    assert [row.index for row in client.results(submission.job)] == [0, 3]


def test_all_invalid_rows_are_counted_and_the_first_thousand_kept(client: Client) -> None:
    with pytest.raises(InvalidSource, match="1,500 invalid rows") as caught:
        client.submit((BadRow(f"list:{n}", "bad", "") for n in range(1500)), SPEC, skip_invalid=True)
    assert len(caught.value.rows) == 1000


def test_empty_list_is_an_error(client: Client) -> None:
    with pytest.raises(InvalidSource, match="the list has no images"):
        client.submit([], SPEC, skip_invalid=True)


def test_duplicates_are_processed_once_and_share_the_result(client: Client, ledger: Ledger) -> None:
    listed = [*rows(40), *rows(2), SourceRow("list:43", {"source": "https://example.com/0.jpg", "name": "other"})]
    submission = client.submit(listed, SPEC)
    assert (submission.total, submission.duplicates) == (43, 2)
    work(ledger, lambda index: failed(index) if index == 1 else done(index))
    status = client.status(submission.job)
    assert (status.state, status.total, status.done, status.failed, status.duplicates) == ("done", 43, 41, 2, 2)
    found = list(client.results(submission.job))
    assert [row.duplicate_of for row in found[40:]] == [0, 1, None]
    assert [row.output for row in found[40:]] == [found[0].output, None, "s3://results/sketches/42.png"]
    assert [row.code for row in found[40:]] == [None, "not_found", None]


def test_submission_tells_what_has_no_effect(client: Client) -> None:
    spec = SPEC.model_copy(update={"options": OpencvStylize(colour=True)})
    listed = [
        SourceRow("list:1", {"source": "https://example.com/0.jpg"}),
        SourceRow("list:2", {"source": "https://example.com/1.jpg", "mask": "s3://masks/1.png"}),
    ]
    assert client.submit(listed, spec).warnings == (
        "colour has no effect, because style is stylization",
        "'mask' in the list has no effect on stylize (opencv), only on inpaint: 1 row, list:2",
    )
    assert client.submit(rows(3), SPEC).warnings == ()


def test_inpaint_requires_a_mask_or_boxes(client: Client) -> None:
    with_mask = SourceRow("list:1", {"source": "https://example.com/1.jpg", "mask": "https://example.com/m.png"})
    with_box = SourceRow("list:2", {"source": "https://example.com/2.jpg", "boxes": "1,2,3,4"})
    without = SourceRow("list:3", {"source": "https://example.com/3.jpg"})
    with pytest.raises(InvalidSource, match="list:3: needs a mask or boxes"):
        client.submit([with_mask, with_box, without], Job(operation="inpaint", output=OUT))
    for options in ({"mask": "https://example.com/m.png"}, {"boxes": "0.1,0.1,0.2,0.2"}):
        spec = Job(operation="inpaint", output=OUT, options=OpencvInpaint.model_validate(options))
        assert client.submit([with_mask, with_box, without], spec).total == 3


def test_submit_wakes_up_the_children_of_the_lane_but_no_more_than_there_are_images(
    client: Client, fleet: Fleet, raw: Any
) -> None:
    fleet.report_node(node(2))
    fleet.report_node(node(1, name="cpu@b"))
    fleet.report_node(node(8, lane="inpaint.opencv", name="cpu@c"))
    submission = client.submit(rows(7), SPEC)
    assert (submission.nodes, submission.served, len(messages(raw))) == (2, True, 3)
    client.submit(rows(2), SPEC)
    assert len(messages(raw)) == 3 + 2
    assert [known.node for known in client.nodes()] == ["cpu@a", "cpu@b", "cpu@c"]


def test_unreachable_redis_raises_broker_unavailable(tmp_path: Path) -> None:
    with client_for("redis://:secret@127.0.0.1:1/0") as client, pytest.raises(BrokerUnavailable) as caught:
        client.submit(rows(1), SPEC)
    assert "secret" not in caught.value.message


def test_job_whose_wake_up_was_lost_is_recorded_and_waits_for_the_nodes_to_look(
    own_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def seal_and_lose_redis(self: SubmitLedger, job: str, **counts: Any) -> None:
        seal(self, job, **counts)
        monkeypatch.setattr(Publisher, "wake", unreachable)

    def unreachable(*_: Any, **__: Any) -> None:
        raise BrokerUnavailable("Redis: gone")

    seal = SubmitLedger.seal
    monkeypatch.setattr(SubmitLedger, "seal", seal_and_lose_redis)
    with client_for(own_redis.url) as client:
        submission = client.submit(rows(40), SPEC)
        assert submission.total == 40
        assert "no worker was woken up" in caplog.text
        assert client.status(submission.job).state == "queued"
    ledger = Ledger(own_redis.url)
    assert ledger.tend() == ([], {LANE: 0})
    ledger.close()


# --- following --------------------------------------------------------------------------------


def test_watch_yields_updates_as_they_happen(client: Client, ledger: Ledger) -> None:
    job = client.submit(rows(3), SPEC).job
    seen = client.watch(job, every=60.0)  # longer than the test: only pushed updates arrive
    first, results = next(seen)
    assert (first.state, results) == ("queued", [])
    share = take(ledger)
    ledger.record(job, done(0))
    status, results = next(seen)
    assert (status.state, status.done, [result.index for result in results]) == ("running", 1, [0])
    ledger.record(job, failed(1))
    ledger.record(job, done(2))
    ledger.give_back(share, CHILD)
    write_manifest(ledger)
    rest = list(seen)
    assert [result.index for _, results in rest for result in results] == [1, 2]
    last = rest[-1][0]
    assert (last.state, last.done, last.failed, last.over) == ("done", 2, 1, True)


def test_watch_yields_all_results_of_a_finished_job(client: Client, ledger: Ledger) -> None:
    submission = client.submit(rows(2200), SPEC)
    work(ledger, done)
    seen = list(client.watch(submission.job))
    assert sorted(result.index for _, results in seen for result in results) == list(range(2200))
    assert all(status.over for status, _ in seen)


def test_watch_yields_a_status_when_nothing_happens(client: Client) -> None:
    job = client.submit(rows(1), SPEC).job
    seen = client.watch(job, every=0.01)
    assert [next(seen)[0].state for _ in range(3)] == ["queued"] * 3


def test_wait_returns_when_the_job_is_over(client: Client, ledger: Ledger) -> None:
    job = client.submit(rows(2), SPEC).job
    assert client.wait(job, timeout=0.0).state == "queued"
    worker = threading.Thread(target=work, args=(ledger, done))
    worker.start()
    assert client.wait(job, timeout=60).state == "done"
    worker.join()


def test_jobs_are_listed_newest_first(client: Client) -> None:
    jobs = [client.submit(rows(1), SPEC).job for _ in range(3)]
    assert {status.job for status in client.jobs()} == set(jobs)
    created = [status.created for status in client.jobs()]
    assert created == sorted(created, reverse=True)


def test_unknown_job_raises_job_not_found(client: Client) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: client.status("260730-00000000"),
        lambda: client.wait("260730-00000000"),
        lambda: list(client.watch("260730-00000000")),
        lambda: list(client.results("260730-00000000")),
        lambda: client.retry("260730-00000000"),
        lambda: client.cancel("260730-00000000"),
    ]
    for call in calls:
        with pytest.raises(JobNotFound, match="260730-00000000"):
            call()


def test_results_raise_broker_unavailable_when_redis_stops(own_redis: EmbeddedRedis) -> None:
    with client_for(own_redis.url) as client:
        found = client.results(client.submit(rows(2000), SPEC).job)
        next(found)
        own_redis.kill()
        with pytest.raises(BrokerUnavailable):
            list(found)


# --- changing ---------------------------------------------------------------------------------


def test_retry_queues_only_failed_images(client: Client, ledger: Ledger, raw: Any) -> None:
    job = client.submit(rows(70), SPEC).job
    with pytest.raises(UsageError, match="still queued"):
        client.retry(job)
    work(ledger, lambda index: failed(index) if index in (1, 2, 69) else done(index))
    raw.delete(QUEUE)
    assert client.retry(job) == 3
    assert messages(raw), "a child is woken up"
    status = client.status(job)
    assert (status.state, status.done, status.failed) == ("queued", 67, 0)
    share = take(ledger)
    assert sorted(item.index for item in share.items) == [1, 2, 69]
    finish(ledger, share, done)
    write_manifest(ledger)
    status = client.status(job)
    assert (status.state, status.done, status.failed) == ("done", 70, 0)
    assert client.retry(job) == 0
    assert client.status(job).state == "done"


def test_cancelled_job_that_has_not_started_is_over_at_once(client: Client, ledger: Ledger) -> None:
    job = client.submit(rows(40), SPEC).job
    assert client.cancel(job).state == "cancelled"
    assert client.wait(job).state == "cancelled"
    write_manifest(ledger)
    assert ledger.take(Request(CHILD, [LANE], {LANE: 1})) == "none"
    assert {row.state for row in client.results(job)} == {"cancelled"}
    assert client.cancel(job).state == "cancelled"


def test_cancelled_job_can_be_retried(client: Client, ledger: Ledger) -> None:
    job = client.submit(rows(40), SPEC).job
    share = take(ledger, 10)
    assert client.cancel(job).state == "running", "one image is on a device"
    assert ledger.renew(CHILD, [LANE], [share]).verdicts == ["stop"]
    ledger.record(job, done(0))
    ledger.give_back(share, CHILD, returned=range(1, 10))
    assert client.status(job).state == "cancelled"
    assert client.retry(job) == 39
    work(ledger, done)
    status = client.status(job)
    assert (status.state, status.done) == ("done", 40)


def test_paused_job_is_handed_out_again_when_resumed(client: Client, ledger: Ledger) -> None:
    job = client.submit(rows(4), SPEC).job
    assert client.pause(job).state == "paused"
    assert ledger.take(Request(CHILD, [LANE], {LANE: 1})) == "none"
    assert client.resume(job).state == "queued"
    work(ledger, done)
    assert client.status(job).state == "done"
    for change in (client.pause, client.resume):
        with pytest.raises(UsageError, match="is done"):
            change(job)


def test_job_moved_to_a_higher_priority_is_next(client: Client, ledger: Ledger) -> None:
    first, second = (client.submit(rows(4), SPEC).job for _ in range(2))
    assert client.prioritize(second, "high").priority == "high"
    assert [take(ledger).job for _ in range(2)] == [second, first]


# --- links ------------------------------------------------------------------------------------


def result_at(output: str | None) -> Row:
    return Row(item="000000-00000000", index=0, source="https://example.com/0.jpg", state="done", output=output)


def test_link_is_presigned_for_s3_and_unchanged_for_files(redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    s3 = S3Settings(endpoint_url="http://minio:9000", public_url="https://photos.example")
    settings = Settings(_env_file=None, redis_url=redis_server.url, s3=s3)  # type: ignore[call-arg]
    with Client(settings) as client:
        link = client.link(result_at("s3://results/a b.png"), 60)
        assert link.startswith("https://photos.example/results/a%20b.png?")
        assert "X-Amz-Expires=60" in link
        assert client.link(result_at("file:///srv/out/a.png"), 60) == "file:///srv/out/a.png"
        with pytest.raises(UsageError, match="has no result"):
            client.link(result_at(None), 60)
        with pytest.raises(InvalidOption):
            client.link(result_at("s3://results/a.png"), 0)
