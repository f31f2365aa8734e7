"""Malformed entries in Redis: `fleet`, `jobs`, `status` and `submit` go on without them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.dead import DeadLetters
from imagemill.shared.fleet import Fleet
from tests.ledgers import Ledger
from tests.unit.producer.jobs import GOOD, LANE, Invoke, node, submitted, work

GARBAGE = (b"null", b"text", b"[]", b"\xff\xfe", b"", b"[" * 5000, b"nan", b"1e999", b'{"version": 1}')


@pytest.fixture
def letters(redis_server: EmbeddedRedis, raw: Any) -> Iterator[DeadLetters]:
    letters = DeadLetters(redis_server.url)
    yield letters
    letters.close()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_commands_work_despite_malformed_reports(
    imagemill: Invoke, ledger: Ledger, raw: Any, fleet: Fleet, letters: DeadLetters, garbage: bytes
) -> None:
    fleet.report_node(node(LANE))
    raw.hset("imagemill:nodes", b"bad@a", garbage)
    raw.hset(f"imagemill:rates:{LANE}", mapping={b"cpu@x/0": b"2.5", b"bad@a/0": garbage})
    raw.hset("imagemill:memory", mapping={b"cpu@a": b"0.5 1", b"bad@a": garbage})
    shown = imagemill("fleet", "--json")
    assert shown.exit_code == 0, shown.output
    assert [found["node"] for found in json.loads(shown.stdout)] == ["cpu@x"]
    job = submitted(imagemill)
    assert imagemill("status", job).exit_code == imagemill("jobs").exit_code == 0
    raw.hset(f"imagemill:rates:{LANE}", b"cpu@x/1", garbage)
    raw.hset("imagemill:node-children", "cpu@x", garbage)
    raw.hset("imagemill:weights", "ann", garbage)
    submitted(imagemill, GOOD, "--owner", "ann")
    ledger.tend()
    names = [f"imagemill:{name} bad@a" for name in ("nodes", "memory", f"rates:{LANE}")]
    assert sorted(letter.where.removesuffix("/0") for letter in letters.entries()) == sorted(names)


def test_report_of_a_newer_version_is_left_alone(imagemill: Invoke, raw: Any, letters: DeadLetters) -> None:
    raw.hset("imagemill:nodes", "new@a", '{"version": 2, "name": "new@a"}')
    assert imagemill("fleet").exit_code == 0
    assert raw.hexists("imagemill:nodes", "new@a")
    assert letters.count() == 0


@pytest.mark.parametrize("field", ["spec", "state", "total", "created", "priority", "next", "until"])
@pytest.mark.parametrize("garbage", [b"\xff\xfe", b"null", b"nan"])
def test_malformed_job_does_not_hide_the_others(
    imagemill: Invoke, ledger: Ledger, raw: Any, letters: DeadLetters, field: str, garbage: bytes
) -> None:
    bad, good = submitted(imagemill), submitted(imagemill)
    raw.hset(f"imagemill:job:{bad}", field, garbage)
    shown = imagemill("jobs", "--json")
    assert shown.exit_code == 0, shown.output
    listed = {job["job"] for job in json.loads(shown.stdout)}
    assert good in listed
    assert letters.count() == (0 if bad in listed else 1)
    imagemill("jobs")
    assert letters.count() == (0 if bad in listed else 1), "once"
    assert imagemill("status", bad).exit_code in (0, 2)
    assert imagemill("status", good).exit_code == imagemill("fleet").exit_code == 0


def test_list_of_jobs_with_keys_of_other_types(imagemill: Invoke, raw: Any, letters: DeadLetters) -> None:
    good = submitted(imagemill)
    raw.set("imagemill:job:text", "text")
    raw.zadd("imagemill:jobs", {"text": 9e15, b"\xff": 9e15})
    assert [job["job"] for job in json.loads(imagemill("jobs", "--json").stdout)] == [good]
    assert letters.count() == 2
    assert imagemill("status", "text").exit_code == 2


def test_job_of_a_newer_version_is_left_alone(imagemill: Invoke, ledger: Ledger, raw: Any, letters: DeadLetters) -> None:
    new, old = submitted(imagemill), submitted(imagemill)
    spec = json.loads(raw.hget(f"imagemill:job:{new}", "spec"))
    raw.hset(f"imagemill:job:{new}", "spec", json.dumps({**spec, "version": 2}))
    assert [job["job"] for job in json.loads(imagemill("jobs", "--json").stdout)] == [old]
    assert "newer version" in imagemill("status", new).stderr
    assert raw.zscore("imagemill:jobs", new) is not None
    assert letters.count() == 0
    raw.zrem(f"imagemill:waiting:{LANE}:normal:~{new}", new)
    work(ledger, old)
    assert ledger.status(old).over
