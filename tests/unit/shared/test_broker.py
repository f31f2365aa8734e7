"""Celery's configuration, as far as our guarantees depend on it, and published messages."""

from __future__ import annotations

import base64
import gc
import json
from typing import Any

import pytest
import redis

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.broker import Publisher, make_app, queues
from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.messages import WakeUp
from imagemill.shared.settings import Settings

LANE = "stylize.opencv"


def settings_for(url: str = "redis://:hush@127.0.0.1:1/0", **worker: Any) -> Settings:
    return Settings(_env_file=None, redis_url=url, worker=worker)  # type: ignore[call-arg]


@pytest.fixture
def publisher(redis_server: EmbeddedRedis, raw: Any) -> Publisher:
    return Publisher(make_app(settings_for(redis_server.url)))


def published(raw: Any) -> dict[str, list[dict[str, Any]]]:
    """The messages of each queue, in delivery order."""
    queues = raw.keys("imagemill.*") + raw.keys("imagemill-node.*")
    return {name: [json.loads(text) for text in reversed(raw.lrange(name, 0, -1))] for name in queues}


# --- the configuration ------------------------------------------------------------------------


def test_only_json_messages_are_accepted() -> None:
    conf = make_app(settings_for()).conf
    assert list(conf.accept_content) == ["json"]
    assert conf.task_serializer == conf.event_serializer == "json"


@pytest.mark.parametrize(("time_limit", "load_timeout"), [(1800.0, 600.0), (60.0, 3600.0), (20_000.0, 5.0)])
def test_message_in_progress_is_not_redelivered(time_limit: float, load_timeout: float) -> None:
    conf = make_app(settings_for(time_limit=time_limit, load_timeout=load_timeout)).conf
    visible = conf.broker_transport_options["visibility_timeout"]
    assert visible == conf.visibility_timeout
    assert time_limit == conf.task_soft_time_limit < conf.task_time_limit < visible
    assert conf.worker_soft_shutdown_timeout < visible
    assert conf.worker_proc_alive_timeout == load_timeout  # or children are killed while they load models


def test_message_is_acknowledged_late_and_redelivered_when_its_worker_dies() -> None:
    conf = make_app(settings_for()).conf
    assert conf.task_acks_late is True
    assert conf.task_reject_on_worker_lost is True
    assert conf.task_acks_on_failure_or_timeout is True
    assert conf.worker_prefetch_multiplier == 1
    assert conf.worker_cancel_long_running_tasks_on_connection_loss is False
    assert conf.task_ignore_result is True


def test_lost_redis_is_noticed_soon_and_awaited_without_limit() -> None:
    conf = make_app(settings_for()).conf
    options = conf.broker_transport_options
    assert 0 < options["socket_connect_timeout"] <= options["socket_timeout"] <= 30
    assert 0 < options["health_check_interval"] <= 60
    assert conf.broker_connection_retry_on_startup is True
    assert conf.broker_connection_max_retries is None
    retry = conf.task_publish_retry_policy
    longest = sum(
        min(retry["interval_start"] + n * retry["interval_step"], retry["interval_max"]) for n in range(retry["max_retries"])
    )
    assert longest < 10


def test_every_lane_has_one_queue() -> None:
    assert make_app(settings_for()).conf.broker_transport_options["priority_steps"] == [0]


def test_queues_are_bound_to_their_names() -> None:
    assert [(queue.name, queue.routing_key) for queue in queues(["a", "b"])] == [("a", "a"), ("b", "b")]


@pytest.mark.parametrize(
    "url", ["redis://:hush@127.0.0.1:1/0", "redis+sentinel://:hush@127.0.0.1:1,127.0.0.1:2/main?sentinel_password=hush"]
)
def test_displayed_configuration_contains_no_password(url: str) -> None:
    app = make_app(settings_for(url))
    shown = [repr(app), repr(app.connection_for_write()), app.connection_for_write().as_uri(), app.conf.humanize()]
    assert "hush" not in " ".join([*shown, str(app.conf.table(with_defaults=True))])


# --- wake-ups ---------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize(
    ("lane", "node", "queue", "task"),
    [
        ("stylize.opencv", None, "imagemill.stylize.opencv", "imagemill.stylize"),
        ("inpaint.lama.lama", None, "imagemill.inpaint.lama.lama", "imagemill.inpaint"),
        ("inpaint.lama.lama", "gpu0@a", "imagemill-node.gpu0@a", "imagemill.inpaint"),
    ],
)
def test_message_goes_to_its_queue(publisher: Publisher, raw: Any, lane: str, node: str | None, queue: str, task: str) -> None:
    publisher.wake(lane, node=node)
    ((name, (message,)),) = published(raw).items()
    assert name == queue
    assert message["headers"]["task"] == task
    assert message["content-type"] == "application/json"
    _, arguments, _ = json.loads(base64.b64decode(message["body"]))
    assert WakeUp.model_validate(arguments) == WakeUp(lane=lane)


@pytest.mark.integration
def test_messages_are_small_and_readable_in_flower(publisher: Publisher, raw: Any) -> None:
    publisher.wake(LANE)
    ((text,),) = [raw.lrange(name, 0, -1) for name in published(raw)]
    assert json.loads(text)["headers"]["kwargsrepr"] == LANE
    assert len(text) < 1200


@pytest.mark.integration
def test_many_wake_ups_need_few_connections(publisher: Publisher, raw: Any) -> None:
    gc.collect()  # closes connections of earlier tests
    before = len(raw.client_list())
    for count in (0, 3, 50):
        raw.delete(f"imagemill.{LANE}")
        publisher.wake(LANE, count)
        assert raw.llen(f"imagemill.{LANE}") == count
    assert len(raw.client_list()) - before <= 2  # kombu's: one to check Redis, one for the messages


@pytest.mark.timeout(30)  # seconds are promised; Celery's default is to retry forever
@pytest.mark.parametrize("url", ["redis://:hush@127.0.0.1:1/0", "redis://:hush@no.such.host.invalid:6379/0"])
def test_wake_up_without_redis_fails_within_seconds_and_hides_the_password(url: str) -> None:
    with pytest.raises(BrokerUnavailable, match=r"^Redis: ") as caught:
        Publisher(make_app(settings_for(url))).wake(LANE)
    assert "hush" not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.integration
@pytest.mark.timeout(60)
def test_publisher_survives_a_refusing_and_restarting_redis(own_redis: EmbeddedRedis) -> None:
    publisher = Publisher(make_app(settings_for(own_redis.url)))
    publisher.wake(LANE)
    with redis.Redis.from_url(own_redis.url) as admin:
        admin.config_set("maxmemory", 1)
        with pytest.raises(BrokerUnavailable, match="memory"):
            publisher.wake(LANE)
        admin.config_set("maxmemory", 0)
        admin.config_set("requirepass", "hush")
    with pytest.raises(BrokerUnavailable, match=r"(?i)auth"):
        publisher.wake(LANE)
    own_redis.kill()
    with pytest.raises(BrokerUnavailable):
        publisher.wake(LANE)
    own_redis.start()
    publisher.wake(LANE)
    with redis.Redis.from_url(own_redis.url) as admin:
        assert admin.llen(f"imagemill.{LANE}") >= 1
