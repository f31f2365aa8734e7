"""Dead letters: entries in Redis that could not be read, set aside so that nothing trips over them again.

`imagemill:dead` is a list of JSON objects, newest first: the time, where the entry was, the reason, and its beginning. It holds
the latest 1,000 and expires. lua/common.lua writes the same entries.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any, Self

import redis
from pydantic import ValidationError

from imagemill.shared.connection import Connected
from imagemill.shared.messages import DeadLetter
from imagemill.shared.options.base import validation_sentence
from imagemill.shared.settings import Settings

log = logging.getLogger(__name__)

DEAD = "imagemill:dead"
MOST_DEAD = 1000
MOST_CONTENT = 2048
"""Bytes of an entry that are kept."""
VERSION = 1
"""The highest version of specs and reports that this installation reads."""
KEPT_SECONDS = 7 * 86_400
"""Unless the settings say otherwise."""


def put_aside(client: Any, where: str, reason: str, content: object, *, seconds: int = KEPT_SECONDS) -> None:
    """Record an entry that could not be read; the caller removes it from where it was."""
    raw = content if isinstance(content, bytes) else str(content).encode(errors="replace")
    seen, micros = client.time()
    text = raw[:MOST_CONTENT].decode(errors="backslashreplace").encode()[:MOST_CONTENT].decode(errors="ignore")
    fields = dict(time=seen + micros / 1e6, where=where[:300], reason=reason[:300], content=text)
    log.error("entry set aside", extra={"action": "dead", "where": where[:300], "reason": reason[:300]})
    try:
        _push(client, json.dumps(fields), seconds)
    except redis.ResponseError as error:
        if "WRONGTYPE" not in str(error):
            raise
        client.delete(DEAD)
        _push(client, json.dumps(fields), seconds)


def _push(client: Any, entry: str, seconds: int) -> None:
    with client.pipeline() as pipe:
        pipe.lpush(DEAD, entry)
        pipe.ltrim(DEAD, 0, MOST_DEAD - 1)
        pipe.expire(DEAD, seconds)
        pipe.execute()


def take_out(client: Any, name: str, field: bytes, raw: bytes, reason: str) -> None:
    """Move a field of a hash to the dead letters, once, even if several readers find it."""
    if client.hdel(name, field):
        put_aside(client, f"{name} {field.decode(errors='backslashreplace')}", reason, raw)


def reason_of(error: ValueError) -> str:
    """Why an entry could not be read, in one sentence."""
    return validation_sentence(error) if isinstance(error, ValidationError) else str(error)


def version_of(raw: bytes | str) -> int:
    """The version named in a JSON row, or 0. A row of a newer version is not damaged; leave it alone."""
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return 0
    version = row.get("version") if isinstance(row, dict) else None
    return version if type(version) is int else 0


class DeadLetters(Connected):
    """Reads the dead letters, and writes those of messages."""

    def __init__(self, url: str, *, expire_days: float = 7.0) -> None:
        super().__init__(url)
        self._seconds = int(expire_days * 86_400)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The dead letters at the settings' Redis."""
        return cls(settings.redis_url.get_secret_value(), expire_days=settings.expire_days)

    def add(self, where: str, reason: str, content: object) -> None:
        """Record an entry that could not be read."""
        put_aside(self._redis, where, reason, content, seconds=self._seconds)

    def entries(self) -> list[DeadLetter]:
        """All of them, newest first."""
        return [letter for letter in map(_parsed, self._listed(lambda: self._redis.lrange(DEAD, 0, MOST_DEAD - 1))) if letter]

    def count(self) -> int:
        """How many there are."""
        return int(self._listed(lambda: self._redis.llen(DEAD)) or 0)

    def _listed(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except redis.ResponseError as error:  # the next entry replaces a key of another type
            if "WRONGTYPE" not in str(error):
                raise
            return []


def _parsed(raw: bytes) -> DeadLetter | None:
    try:
        return DeadLetter.model_validate_json(raw.decode(errors="replace"))
    except ValidationError:
        return None
