"""What becomes of a message: an answer in a word, and an acknowledgement in any case."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import redis
from celery import Celery
from celery.contrib.testing.worker import start_worker
from celery.events import EventDispatcher
from kombu.exceptions import OperationalError

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.broker import make_app, queues
from imagemill.shared.errors import BrokerUnavailable, DeviceLost, JobNotFound
from imagemill.shared.messages import Chunk
from imagemill.shared.queues import CANARY_TASK, MANIFEST_TASK
from imagemill.shared.settings import Settings
from imagemill.worker.node import tasks
from imagemill.worker.node.tasks import not_loaded, register
from tests.workers import wait_until

GOOD = {"version": 1, "job": "260730-1f0c9a3e", "number": 3, "images": 32}
TASK = "imagemill.stylize"


class Child:
    """Stands for the loaded child of this process: notes its chunks, tells progress, and does `what`."""

    def __init__(self, what: Callable[[], str] = lambda: "done") -> None:
        self.what = what
        self.chunks: list[Chunk] = []
        self.canaries: list[str] = []

    @property
    def fleet(self) -> Child:
        return self

    def answer_canary(self, token: str) -> None:
        self.canaries.append(token)

    def work(self, chunk: Chunk, *, task: str, tell: Callable[[int, int], None]) -> str:
        assert task
        self.chunks.append(chunk)
        tell(12, 0)
        tell(12, 3)
        return self.what()


def app_for(child: Callable[[], Any], url: str | None = None) -> Celery:
    app = make_app(Settings(_env_file=None, redis_url=url or "redis://127.0.0.1:1/0"))  # type: ignore[call-arg]
    if url is None:
        app.conf.broker_url = "memory://"
    register(app, child)
    return app


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The progress that Flower would show."""
    told: list[str] = []

    def send(self: EventDispatcher, kind: str, *, uuid: str, retry: bool, result: str) -> None:
        assert (kind, bool(uuid), retry) == ("task-progress", True, False)
        told.append(result)

    monkeypatch.setattr(EventDispatcher, "send", send)
    return told


def deliver(app: Celery, payload: dict[str, Any], task: str = TASK) -> str:
    return str(app.tasks[task].apply(kwargs=payload).get())


@pytest.mark.parametrize("task", [TASK, "imagemill.inpaint", "imagemill.remove-background", MANIFEST_TASK])
def test_a_chunk_is_worked_on_and_its_progress_told(task: str, told: list[str]) -> None:
    child = Child()
    assert deliver(app_for(lambda: child), GOOD, task) == "done"
    assert child.chunks == [Chunk(job="260730-1f0c9a3e", number=3, images=32)]
    assert told == ["12 of 32 images", "15 of 32 images, 3 failed"]


def test_progress_that_cannot_be_told_stops_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def send(*_: Any, **__: Any) -> None:
        raise OperationalError("connection refused")

    monkeypatch.setattr(EventDispatcher, "send", send)
    assert deliver(app_for(Child), GOOD) == "done"
    assert [record.message for record in caplog.records] == ["progress not told"] * 2


@pytest.mark.parametrize(
    "change",
    [{"job": "../../etc"}, {"number": "x"}, {"number": -2}, {"images": None}, {"version": 2}, {"surprise": 1}],
    ids=str,
)
def test_a_malformed_message_is_refused_with_the_reason(
    change: dict[str, Any], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    child = Child()
    assert deliver(app_for(lambda: child), GOOD | change) == "refused"
    assert child.chunks == []
    (record,) = caplog.records
    assert (record.message, record.levelname) == ("message refused", "ERROR")
    assert next(iter(change)) in record.reason  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "answer"), [(JobNotFound("there is no job"), "gone"), (BrokerUnavailable("Redis: gone"), "put off")]
)
def test_what_the_ledger_settles_is_no_failure_of_the_task(error: Exception, answer: str, told: list[str]) -> None:
    def fail() -> str:
        raise error

    assert deliver(app_for(lambda: Child(fail)), GOOD) == answer


def test_a_process_whose_device_is_lost_ends(
    told: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[bool] = []

    def fail() -> str:
        raise DeviceLost("illegal memory access")

    monkeypatch.setattr(tasks, "end_process", lambda: ended.append(True))
    deliver(app_for(lambda: Child(fail)), GOOD)
    assert ended == [True]
    (said,) = caplog.records
    assert (said.levelname, said.reason) == ("CRITICAL", "illegal memory access")  # type: ignore[attr-defined]


def test_the_canary_is_answered_by_the_loaded_child() -> None:
    child = Child()
    assert deliver(app_for(lambda: child), {"token": "abc"}, CANARY_TASK) == "alive"
    assert child.canaries == ["abc"]


def test_a_process_without_engines_answers_nothing() -> None:
    result = app_for(not_loaded).tasks[CANARY_TASK].apply(kwargs={"token": "abc"})
    assert result.failed()
    assert "no engines loaded" in str(result.result)


@pytest.mark.integration
def test_whatever_comes_of_a_message_it_leaves_the_queue(own_redis: EmbeddedRedis, caplog: pytest.LogCaptureFixture) -> None:
    """A real consumer: refused, malformed beyond refusal, failed, and done at last."""

    def fail() -> str:
        raise ZeroDivisionError("a fault of ours")

    outcomes = iter([fail, lambda: "done"])
    children: list[Child] = []

    def child() -> Child:
        children.append(Child(next(outcomes)))
        return children[-1]

    app = app_for(child, own_redis.url)
    app.conf.task_queues = queues(["imagemill.stylize.opencv"])
    with start_worker(app, pool="solo", perform_ping_check=False, loglevel=logging.ERROR):
        for args, kwargs in (((), GOOD | {"job": "../../etc"}), ((1, 2), {}), ((), GOOD), ((), GOOD)):
            app.send_task(TASK, args=args, kwargs=kwargs, queue="imagemill.stylize.opencv")
        with redis.Redis.from_url(own_redis.url) as raw:

            def left() -> int:
                return int(raw.llen("imagemill.stylize.opencv")) + int(raw.hlen("unacked"))

            wait_until(lambda: len(children) == 2 and left() == 0, "all four messages are acknowledged")
