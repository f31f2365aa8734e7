"""Messages as they come from Redis: what isn't one that imagemill or Celery published is set aside before Celery sees it.

Celery trusts what is in its queues: given a malformed message, the node exits, the message returns to its queue, and the
next node dies of it too.
"""

from __future__ import annotations

import base64
import json
import logging
import uuid
from collections.abc import Callable
from queue import Empty
from typing import Annotated, Any, Literal

from celery.worker.consumer import Consumer as CeleryConsumer
from kombu.exceptions import KombuError
from kombu.transport import TRANSPORT_ALIASES, redis
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from imagemill.shared.dead import put_aside
from imagemill.shared.options.base import validation_sentence

log = logging.getLogger(__name__)

LONGEST = 64 * 1024
"""Bytes of a message; ours have about 1 kB."""
Text = str | None
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Headers(_Strict):
    """Those that Celery's consumer or pool uses, as wake-ups and canaries have them."""

    task: str = Field(pattern=r"^imagemill\.[a-z-]+$")
    id: str = Field(min_length=1, max_length=200)
    root_id: Text = None
    parent_id: Text = None
    group: Text = None
    eta: None = None
    expires: Text = None
    shadow: Text = None
    compression: None = None
    retries: Literal[0] = 0
    timelimit: tuple[Seconds | None, Seconds | None] = (None, None)
    argsrepr: Text = None
    kwargsrepr: Text = None
    origin: Text = None
    ignore_result: bool | None = None
    replaced_task_nesting: int | None = None
    stamped_headers: list[str] | None = None
    stamps: dict[str, Any] | None = None


class _DeliveryInfo(_Strict):
    exchange: str
    routing_key: str


class _Properties(_Strict):
    delivery_tag: str = Field(min_length=1, max_length=200)
    delivery_info: _DeliveryInfo
    body_encoding: Literal["base64"]
    correlation_id: Text = None
    reply_to: Text = None
    priority: int | None = None
    delivery_mode: int | None = None


class _Message(_Strict):
    body: str
    headers: _Headers
    properties: _Properties
    content_type: Literal["application/json"] = Field(alias="content-type")
    content_encoding: Literal["utf-8"] = Field(alias="content-encoding")


def problem(raw: bytes) -> str | None:
    """Why this isn't a message that imagemill publishes; None if it is one."""
    if len(raw) > LONGEST:
        return f"a message of {len(raw)} bytes"
    try:
        message = _Message.model_validate_json(raw)
        json.loads(raw)  # as Celery does it: pydantic's parser accepts more
        body = json.loads(base64.b64decode(message.body, validate=True))
    except ValidationError as error:
        return validation_sentence(error)
    except (ValueError, RecursionError) as error:
        return f"not a message: {error}"
    if not (isinstance(body, list) and [type(part) for part in body[:2]] == [list, dict] and len(body) == 3):
        return "the body isn't a list of arguments"
    return None if body[2] is None or isinstance(body[2], dict) else "the body isn't a list of arguments"


class QoS(redis.QoS):
    """Restores messages whose worker has died."""

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Set aside what can't be restored, or nothing after it would be."""
        with self.channel.conn_or_acquire(client) as client:
            raw = client.hget(self.unacked_key, tag)
            reason = _unacked_problem(raw) if raw is not None else None
            if reason is not None:
                put_aside(client, self.unacked_key, reason, raw)
                with client.pipeline() as pipe:
                    self._remove_from_indices(tag, pipe).execute()
                return
            super().restore_by_tag(tag, client, leftmost)


def _unacked_problem(raw: bytes) -> str | None:
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return f"not a message: {error}"
    if not (isinstance(entry, list) and len(entry) == 3 and all(isinstance(name, str) for name in entry[1:])):
        return "not a message with its exchange and routing key"
    return problem(json.dumps(entry[0]).encode())


def _set_aside(client: Any, name: str, wanted: str) -> None:
    """Set a key aside if it is of another type: Celery could not use it."""
    found = client.type(name).decode()
    if found not in ("none", wanted):
        put_aside(client, name, f"a {found} instead of a {wanted}", f"a {found}")
        client.delete(name)


class Channel(redis.Channel):
    """Delivers well-formed messages only."""

    QoS = QoS

    def _create_client(self, asynchronous: bool = False) -> Any:
        client = super()._create_client(asynchronous=asynchronous)
        client.set_response_callback("BRPOP", self._checked)
        return client

    def _brpop_read(self, **options: Any) -> Any:
        """Set aside queues that are keys of another type."""
        try:
            return super()._brpop_read(**options)
        except self.ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            with self.conn_or_acquire() as client:
                for queue in self.active_queues:
                    _set_aside(client, queue, "list")
            raise Empty from error

    def _queue_bind(self, exchange: str, *args: Any) -> None:
        with self.conn_or_acquire() as client:
            _set_aside(client, self.keyprefix_queue % (exchange,), "set")
            _set_aside(client, self.unacked_key, "hash")
            _set_aside(client, self.unacked_index_key, "zset")
        super()._queue_bind(exchange, *args)

    def _checked(self, response: Any, **_: Any) -> Any:
        """The queue and message that BRPOP has taken; None, as if there were none, if nobody could read it."""
        if not response:
            return None
        queue, raw = response
        if not queue.startswith(b"imagemill"):  # replies to `celery inspect`, which runs in a process of its own
            return response
        reason = problem(raw)
        if reason is None:
            message = json.loads(raw)
            # Kombu counts messages at work by their tags: two with the same one would stop it from taking more.
            message["properties"]["delivery_tag"] = uuid.uuid4().hex
            return queue, json.dumps(message).encode()
        with self.conn_or_acquire() as client:
            put_aside(client, queue.decode(errors="replace"), reason, raw)
        return None


class Transport(redis.Transport):
    """Kombu's transport for Redis with the checks above."""

    Channel = Channel

    def _deliver(self, message: Any, queue: str) -> None:
        """Survive what Celery can't read, such as a broadcast: those never were in a queue."""
        try:
            super()._deliver(message, queue)
        except (*self.connection_errors, *self.channel_errors, KombuError):
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            log.exception("message dropped", extra={"action": "dead", "where": queue, "reason": str(error)})


class Consumer(CeleryConsumer):
    """Celery's consumer, which survives messages that it can't handle."""

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        """The function that is called with each message."""
        handle = super().create_task_handler(*args, **kwargs)

        def handled(message: Any) -> Any:
            try:
                return handle(message)
            except (*self.connection_errors, *self.channel_errors):
                raise
            except Exception as error:  # the checks have missed something
                log.exception("message refused", extra={"action": "parse", "reason": str(error)})
                if not message.acknowledged:
                    with message.channel.conn_or_acquire() as client:
                        reason = f"{type(error).__name__}: {error}"
                        put_aside(client, str(message.delivery_info.get("routing_key")), reason, message.body or b"")
                    message.reject_log_error(log, self.connection_errors)

        return handled


def install() -> None:
    """Make Celery read its queues with these classes; to be called before it connects."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
