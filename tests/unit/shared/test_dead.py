"""Dead letters, on a real Redis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.dead import DEAD, MOST_CONTENT, DeadLetters

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("raw")]


@pytest.fixture
def letters(redis_server: EmbeddedRedis) -> Iterator[DeadLetters]:
    letters = DeadLetters(redis_server.url, expire_days=2)
    yield letters
    letters.close()


def test_entry_says_when_where_and_why(letters: DeadLetters, raw: Any) -> None:
    assert (letters.count(), letters.entries()) == (0, [])
    letters.add("imagemill:nodes", "not JSON", b"\xffnode")
    (letter,) = letters.entries()
    assert (letter.where, letter.reason, letter.content) == ("imagemill:nodes", "not JSON", "\\xffnode")
    assert abs(letter.time - raw.time()[0]) < 60
    assert 0 < raw.ttl(DEAD) <= 2 * 86_400


def test_entries_are_bounded_and_the_latest_come_first(letters: DeadLetters) -> None:
    for number in range(1005):
        letters.add("q", f"number {number}", "ä" * 5000 if number == 1004 else "x")
    found = letters.entries()
    assert letters.count() == len(found) == 1000
    assert [found[0].reason, found[-1].reason] == ["number 1004", "number 5"]
    assert len(found[0].content.encode()) == MOST_CONTENT


@pytest.mark.parametrize("garbage", ["null", "{", '{"time": "x"}', b"\xff"])
def test_garbage_among_the_entries_is_skipped(letters: DeadLetters, raw: Any, garbage: str | bytes) -> None:
    raw.lpush(DEAD, garbage)
    letters.add("q", "why", "what")
    assert [letter.where for letter in letters.entries()] == ["q"]


def test_key_of_another_type_is_replaced(letters: DeadLetters, raw: redis.Redis) -> None:
    raw.set(DEAD, "text")
    assert (letters.count(), letters.entries()) == (0, [])
    letters.add("q", "why", "what")
    assert letters.count() == 1
