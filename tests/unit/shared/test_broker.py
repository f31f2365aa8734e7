"""Celery's configuration, as far as our guarantees depend on it, and published messages."""

from __future__ import annotations

import base64
import gc
import importlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from kombu.utils.scheduling import round_robin_cycle

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.broker import Publisher, make_app, queues
from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.messages import MANIFEST, Chunk, Job, Output, Policy
from imagemill.shared.settings import Settings

JOB = "260730-1f0c9a3e"
OUT = Output(url="s3://results/x")


def settings_for(url: str = "redis://:hush@127.0.0.1:1/0", **worker: Any) -> Settings:
    return Settings(_env_file=None, redis_url=url, worker=worker)  # type: ignore[call-arg]


def chunk(number: int = 0, images: int = 256) -> Chunk:
    return Chunk(job=JOB, number=number, images=images)


@pytest.fixture
def publisher(redis_server: EmbeddedRedis, raw: Any) -> Publisher:
    return Publisher(make_app(settings_for(redis_server.url)))


def published(raw: Any) -> dict[str, list[dict[str, Any]]]:
    """The messages of each queue, in delivery order."""
    return {name: [json.loads(text) for text in reversed(raw.lrange(name, 0, -1))] for name in raw.keys("imagemill.*")}


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


def test_kombu_uses_our_queue_order() -> None:
    options = make_app(settings_for()).conf.broker_transport_options
    module, _, name = options["queue_order_strategy"].partition(":")
    ours = getattr(importlib.import_module(module), name)
    theirs = {name for name in vars(round_robin_cycle) if name[0] != "_"}
    assert theirs <= set(vars(ours))
    assert options["priority_steps"] == [0]


def test_queues_are_bound_to_their_names() -> None:
    assert [(queue.name, queue.routing_key) for queue in queues(["a", "b"])] == [("a", "a"), ("b", "b")]


def test_displayed_configuration_contains_no_password() -> None:
    app = make_app(settings_for())
    shown = [repr(app), repr(app.connection_for_write()), app.connection_for_write().as_uri(), app.conf.humanize()]
    assert "hush" not in " ".join([*shown, str(app.conf.table(with_defaults=True))])


# --- publishing -------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize(
    ("spec", "number", "queue", "task"),
    [
        (Job(operation="stylize", output=OUT), 0, "imagemill.stylize.opencv", "imagemill.stylize"),
        (Job(operation="inpaint", output=OUT), 7, "imagemill.inpaint.opencv", "imagemill.inpaint"),
        (
            Job(operation="stylize", output=OUT, policy=Policy(priority="high")),
            0,
            "imagemill.stylize.opencv.high",
            "imagemill.stylize",
        ),
        (
            Job(operation="stylize", output=OUT, policy=Policy(priority="low")),
            0,
            "imagemill.stylize.opencv.low",
            "imagemill.stylize",
        ),
        (
            Job(operation="stylize", output=OUT, policy=Policy(priority="low")),
            MANIFEST,
            "imagemill.stylize.opencv.high",
            "imagemill.manifest",
        ),
    ],
)
def test_message_goes_to_its_queue(publisher: Publisher, raw: Any, spec: Job, number: int, queue: str, task: str) -> None:
    assert publisher.publish([(chunk(number), spec)]) == 1
    ((name, (message,)),) = published(raw).items()
    assert name == queue
    assert message["headers"]["task"] == task
    assert message["content-type"] == "application/json"
    _, arguments, _ = json.loads(base64.b64decode(message["body"]))
    assert Chunk.model_validate(arguments) == chunk(number)


@pytest.mark.integration
def test_messages_are_small_and_readable_in_flower(publisher: Publisher, raw: Any) -> None:
    publisher.publish(
        [(chunk(3), Job(operation="stylize", output=OUT)), (chunk(MANIFEST, 0), Job(operation="stylize", output=OUT))]
    )
    found = published(raw)
    shown = [message["headers"]["kwargsrepr"] for messages in found.values() for message in messages]
    assert sorted(shown) == [f"job={JOB}", f"job={JOB}, chunk=3, images=256"]
    sizes = [len(text) for name in found for text in raw.lrange(name, 0, -1)]
    assert max(sizes) < 1200
    assert not any("://" in text for name in found for text in raw.lrange(name, 0, -1))


@pytest.mark.integration
def test_large_job_keeps_its_order_and_needs_few_connections(publisher: Publisher, raw: Any) -> None:
    gc.collect()  # closes connections of earlier tests
    before, more = len(raw.client_list()), []

    def chunks(count: int) -> Iterator[tuple[Chunk, Job]]:
        for number in range(count):
            yield chunk(number), Job(operation="stylize", output=OUT)
        more.append(len(raw.client_list()) - before)

    for count in (3, 2500, 3, 3):
        raw.delete("imagemill.stylize.opencv")
        gc.collect()
        assert publisher.publish(chunks(count)) == count
        (messages,) = published(raw).values()
        arguments = [json.loads(base64.b64decode(message["body"]))[1] for message in messages]
        assert [chunk["number"] for chunk in arguments] == list(range(count))
    assert max(more) <= 2  # kombu's: one to check Redis, one for the messages


@pytest.mark.integration
def test_publishing_nothing_is_not_an_error(publisher: Publisher, raw: Any) -> None:
    assert publisher.publish([]) == 0
    assert published(raw) == {}


@pytest.mark.timeout(30)  # seconds are promised; Celery's default is to retry forever
@pytest.mark.parametrize("url", ["redis://:hush@127.0.0.1:1/0", "redis://:hush@no.such.host.invalid:6379/0"])
def test_publishing_without_redis_fails_within_seconds_and_hides_the_password(url: str) -> None:
    with pytest.raises(BrokerUnavailable, match=r"^Redis: ") as caught:
        Publisher(make_app(settings_for(url))).publish([(chunk(), Job(operation="stylize", output=OUT))])
    assert "hush" not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.integration
@pytest.mark.timeout(60)
def test_publisher_survives_a_refusing_and_restarting_redis(own_redis: EmbeddedRedis) -> None:
    publisher = Publisher(make_app(settings_for(own_redis.url)))
    messages = [(chunk(), Job(operation="stylize", output=OUT))]
    assert publisher.publish(messages) == 1
    with redis.Redis.from_url(own_redis.url) as admin:
        admin.config_set("maxmemory", 1)
        with pytest.raises(BrokerUnavailable, match="memory"):
            publisher.publish(messages)
        admin.config_set("maxmemory", 0)
        admin.config_set("requirepass", "hush")
    with pytest.raises(BrokerUnavailable, match=r"(?i)auth"):
        publisher.publish(messages)
    own_redis.kill()
    with pytest.raises(BrokerUnavailable):
        publisher.publish(messages)
    own_redis.start()
    assert publisher.publish(messages) == 1


@pytest.mark.integration
def test_errors_of_the_caller_pass_through(publisher: Publisher) -> None:
    def interrupted() -> Iterator[tuple[Chunk, Job]]:
        yield chunk(), Job(operation="stylize", output=OUT)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publisher.publish(interrupted())
