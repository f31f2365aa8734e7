"""The Celery tasks: every message gets a result and is acknowledged."""

from __future__ import annotations

import logging
import threading
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
from imagemill.shared.errors import BrokerUnavailable, DeviceLost
from imagemill.shared.queues import CANARY_TASK, queue_name, task_name
from imagemill.shared.settings import Settings
from imagemill.worker.node import tasks
from imagemill.worker.node.tasks import not_loaded, register
from tests.workers import wait_until

LANE = "stylize.opencv"
GOOD = {"version": 2, "lane": LANE}
TASK = "imagemill.stylize"


class Child:
    """Replaces the loaded child of this process: records its shifts, reports progress, and runs `behaviour`."""

    def __init__(self, behaviour: Callable[[], str] = lambda: "3 done") -> None:
        self.behaviour = behaviour
        self.lanes: list[str] = []
        self.canaries: list[str] = []

    @property
    def fleet(self) -> Child:
        return self

    def answer_canary(self, token: str) -> None:
        self.canaries.append(token)

    def work(self, lane: str, tell: Callable[[str], None]) -> str:
        self.lanes.append(lane)
        thread = threading.Thread(target=tell, args=("1 done; now 5 of JOB",), kwargs={"images_done": 1})  # the feeder's
        thread.start()
        thread.join()
        return self.behaviour()


def app_for(child: Callable[[], Any], url: str | None = None) -> Celery:
    app = make_app(Settings(_env_file=None, redis_url=url or "redis://127.0.0.1:1/0"))  # type: ignore[call-arg]
    if url is None:
        app.conf.broker_url = "memory://"
    register(app, child)
    return app


@pytest.fixture
def progress(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The progress messages that Flower would show."""
    messages: list[str] = []

    def send(self: EventDispatcher, kind: str, *, uuid: str, retry: bool, result: str, images_done: int) -> None:
        assert (kind, bool(uuid), retry) == ("task-progress", True, False)
        assert images_done == 1
        messages.append(result)

    monkeypatch.setattr(EventDispatcher, "send", send)
    return messages


def deliver(app: Celery, payload: dict[str, Any], task: str = TASK) -> str:
    return str(app.tasks[task].apply(kwargs=payload).get())


@pytest.mark.parametrize("lane", [LANE, "inpaint.lama.lama", "remove-background.rembg.u2net"])
def test_task_is_a_shift_that_reports_progress_and_what_became_of_the_images(lane: str, progress: list[str]) -> None:
    child = Child()
    assert deliver(app_for(lambda: child), GOOD | {"lane": lane}, task_name(lane)) == "3 done"
    assert child.lanes == [lane]
    assert progress == ["1 done; now 5 of JOB"]


def test_task_continues_when_progress_cannot_be_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def send(*_: Any, **__: Any) -> None:
        raise OperationalError("connection refused")

    monkeypatch.setattr(EventDispatcher, "send", send)
    assert deliver(app_for(Child), GOOD) == "3 done"
    assert [record.message for record in caplog.records] == ["progress not reported"]


@pytest.mark.parametrize(
    "change",
    [{"lane": "../../etc"}, {"lane": None}, {"lane": "stylize"}, {"version": 1}, {"surprise": 1}],
    ids=str,
)
def test_task_refuses_a_malformed_message(
    change: dict[str, Any], progress: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    child = Child()
    assert deliver(app_for(lambda: child), GOOD | change) == "refused"
    assert child.lanes == []
    (record,) = caplog.records
    assert (record.message, record.levelname) == ("message refused", "ERROR")
    assert next(iter(change)) in record.reason  # type: ignore[attr-defined]


def test_task_succeeds_when_redis_is_down(progress: list[str]) -> None:
    def fail() -> str:
        raise BrokerUnavailable("Redis: gone")

    assert deliver(app_for(lambda: Child(fail)), GOOD) == "postponed"


def test_process_ends_when_its_device_is_lost(
    progress: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[bool] = []

    def fail() -> str:
        raise DeviceLost("illegal memory access")

    monkeypatch.setattr(tasks, "end_process", lambda: ended.append(True))
    deliver(app_for(lambda: Child(fail)), GOOD)
    assert ended == [True]
    (record,) = caplog.records
    assert (record.levelname, record.reason) == ("CRITICAL", "illegal memory access")  # type: ignore[attr-defined]


def test_canary_is_answered_by_the_loaded_child() -> None:
    child = Child()
    assert deliver(app_for(lambda: child), {"token": "abc"}, CANARY_TASK) == "alive"
    assert child.canaries == ["abc"]


def test_canary_fails_before_the_engines_are_loaded() -> None:
    result = app_for(not_loaded).tasks[CANARY_TASK].apply(kwargs={"token": "abc"})
    assert result.failed()
    assert "no engines loaded" in str(result.result)


@pytest.mark.integration
@pytest.mark.usefixtures("logging_as_before")
def test_messages_leave_the_queue_whatever_their_result(own_redis: EmbeddedRedis) -> None:
    """With a real consumer: a refused message, a malformed one, a failing one, and one that succeeds."""

    def fail() -> str:
        raise ZeroDivisionError("a bug")

    outcomes = iter([fail, lambda: "3 done"])
    children: list[Child] = []

    def child() -> Child:
        children.append(Child(next(outcomes)))
        return children[-1]

    app = app_for(child, own_redis.url)
    app.conf.task_queues = queues([queue_name(LANE)])
    with start_worker(app, pool="solo", perform_ping_check=False, loglevel=logging.ERROR):
        for args, kwargs in (((), GOOD | {"lane": "../../etc"}), ((1, 2), {}), ((), GOOD), ((), GOOD)):
            app.send_task(TASK, args=args, kwargs=kwargs, queue=queue_name(LANE))
        with redis.Redis.from_url(own_redis.url) as raw:

            def left() -> int:
                return int(raw.llen(queue_name(LANE))) + int(raw.hlen("unacked"))

            wait_until(lambda: len(children) == 2 and left() == 0, "all four messages are acknowledged")
