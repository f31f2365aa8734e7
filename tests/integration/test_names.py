"""Submissions under a name: after any kind of failure, the same command continues, and nothing is queued twice."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from imagemill.shared.errors import BrokerUnavailable, InvalidSource, JobNotFound, NameTaken
from imagemill.shared.ledger.submitting import SUBMITTING_SECONDS
from imagemill.shared.messages import Job, Output
from tests.conftest import client_for
from tests.ledgers import Ledger
from tests.unit.producer.jobs import asked, work
from tests.workers import clean_environment, wait_until

pytestmark = pytest.mark.integration

NAME = "spring-sale"
SPEC = Job(operation="stylize", output=Output(url="s3://results/out"))
COUNT = 10_000
"""More images than are written in one round trip."""


def row(number: int, site: str = "example.com") -> SourceRow:
    return SourceRow(f"row {number}", {"source": f"https://{site}/{number}.jpg"})


def rows(count: int = COUNT) -> Iterator[SourceRow]:
    return (row(number) for number in range(count))


@pytest.fixture
def client(own_redis: EmbeddedRedis) -> Iterator[Client]:
    with client_for(own_redis.url) as client:
        yield client


@pytest.fixture
def ledger(own_redis: EmbeddedRedis) -> Iterator[Ledger]:
    with closing(Ledger(own_redis.url)) as ledger:
        yield ledger


@pytest.fixture
def raw(own_redis: EmbeddedRedis) -> Iterator[Any]:
    with redis.Redis.from_url(own_redis.url, decode_responses=True) as raw:
        yield raw


def sources(client: Client) -> list[str]:
    return [result.source for result in client.results(NAME)]


def check_complete(client: Client, count: int = COUNT) -> None:
    """Every image is queued, once."""
    status = client.status(NAME)
    assert (status.state, status.total, status.waiting) == ("queued", count, count)
    assert sources(client) == [row(number).fields["source"] for number in range(count)]


# --- again ------------------------------------------------------------------------------------


def test_second_submission_queues_nothing(client: Client, ledger: Ledger) -> None:
    first, second = (client.submit(rows(100), SPEC, name=NAME) for _ in range(2))
    assert (first.job, first.before, first.total) == (NAME, False, 100)
    assert (second.job, second.before, second.total) == (NAME, True, 100)
    check_complete(client, 100)
    work(ledger, NAME)
    assert client.submit(rows(100), SPEC, name=NAME).before
    status = client.status(NAME)
    assert (status.state, status.done) == ("done", 100)


def test_keys_of_a_job_that_was_submitted_twice_do_not_expire(client: Client, raw: Any) -> None:
    duplicates = [row(0), row(0), row(1)]
    for _ in range(2):
        client.submit(duplicates, SPEC, name=NAME)
    assert {key: raw.ttl(key) for key in raw.keys(f"imagemill:job:{NAME}*")} == {
        f"imagemill:job:{NAME}{part}": -1 for part in ("", ":packs", ":duplicates")
    }


@pytest.mark.parametrize("sealed", [True, False], ids=["queued", "broken off"])
@pytest.mark.parametrize(
    "other",
    [
        [row(number) for number in range(99)],
        [row(number) for number in range(101)],
        [row(number, "example.org" if number == 60 else "example.com") for number in range(100)],
        [row(number) for number in range(99)] + [row(0)],
    ],
    ids=["shorter", "longer", "another row", "a duplicate"],
)
def test_other_list_is_refused(other: list[SourceRow], sealed: bool, client: Client, ledger: Ledger, raw: Any) -> None:
    client.submit(rows(100), SPEC, name=NAME)
    if not sealed:
        raw.hset(f"imagemill:job:{NAME}", "state", "submitting")
    with pytest.raises(NameTaken, match="another list"):
        client.submit(other, SPEC, name=NAME)
    if not sealed:
        assert client.submit(rows(100), SPEC, name=NAME).total == 100
    check_complete(client, 100)


def test_other_options_are_refused(client: Client) -> None:
    client.submit(rows(10), SPEC, name=NAME)
    with pytest.raises(NameTaken, match="other options"):
        client.submit(rows(10), SPEC.model_copy(update={"output": Output(url="s3://results/elsewhere")}), name=NAME)
    check_complete(client, 10)


def test_invalid_list_can_be_fixed_under_its_name(client: Client) -> None:
    with pytest.raises(InvalidSource):
        client.submit([*rows(COUNT - 1), SourceRow("row x", {"source": "nonsense"})], SPEC, name=NAME)
    with pytest.raises(JobNotFound):
        client.status(NAME)
    client.submit(rows(), SPEC, name=NAME)
    with pytest.raises(InvalidSource):
        client.submit([SourceRow("row x", {"source": "nonsense"})], SPEC, name=NAME)
    check_complete(client)


# --- after a failure --------------------------------------------------------------------------


def test_killed_producer_leaves_nothing_to_do_until_the_list_is_submitted_again(
    client: Client, ledger: Ledger, raw: Any, own_redis: EmbeddedRedis, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "imagemill.producer.cli", "submit", "-", "--operation", "stylize"]
    command += ["--output", SPEC.output.url, "--name", NAME, "--until", "1d"]
    environment = clean_environment(IMAGEMILL_REDIS_URL=own_redis.url)
    lines = [f"{row(number).fields['source']}\n".encode() for number in range(COUNT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, cwd=tmp_path) as producer:
        assert producer.stdin is not None
        producer.stdin.writelines(lines[: COUNT // 2])
        producer.stdin.flush()
        wait_until(lambda: raw.hlen(f"imagemill:job:{NAME}:packs"), "some packs are written")
        producer.kill()
    assert client.status(NAME).state == "submitting"
    assert asked(ledger) == "none"
    assert all(0 < raw.ttl(key) <= SUBMITTING_SECONDS for key in raw.keys("imagemill:job:*"))
    for text in ("10,000 images queued", "10,000 images queued already"):
        again = subprocess.run(
            command, input=b"".join(lines), env=environment, cwd=tmp_path, capture_output=True, check=True, timeout=60
        )
        assert again.stdout.decode() == f"{NAME}\n"
        assert f"job {NAME}: {text}\n" in again.stderr.decode()
    check_complete(client)


def fill(raw: Any) -> None:
    """Leave Redis no room."""
    raw.config_set("maxmemory-policy", "noeviction")
    raw.config_set("maxmemory", raw.info("memory")["used_memory"] // 2)


def filling(raw: Any) -> Iterator[SourceRow]:
    for each in rows():
        if each.place == f"row {COUNT // 2}":
            fill(raw)
        yield each


def test_full_redis_says_how_much_was_stored_and_the_same_list_continues(client: Client, ledger: Ledger, raw: Any) -> None:
    with pytest.raises(BrokerUnavailable, match="submit the same list with the same name within 60 minutes") as caught:
        client.submit(filling(raw), SPEC, name=NAME)
    written = 32 * raw.hlen(f"imagemill:job:{NAME}:packs")
    assert 0 < written < COUNT
    assert f"at least {written:,} images of job {NAME} are in Redis, and none is handed out" in caught.value.message
    assert asked(ledger) == "none"
    raw.config_set("maxmemory", 0)
    assert not client.submit(rows(), SPEC, name=NAME).before
    check_complete(client)


def test_full_redis_discards_a_list_without_a_name(client: Client, raw: Any) -> None:
    with pytest.raises(BrokerUnavailable, match=r"; nothing was queued$"):
        client.submit(filling(raw), SPEC)
    assert raw.keys("imagemill:job:*") == []


def test_list_continues_when_redis_is_back(client: Client, own_redis: EmbeddedRedis) -> None:
    def broken() -> Iterator[SourceRow]:
        for each in rows():
            if each.place == f"row {COUNT // 2}":
                own_redis.stop()
            yield each

    with pytest.raises(BrokerUnavailable, match=r"at least 4,096 images of job spring-sale are in Redis"):
        client.submit(broken(), SPEC, name=NAME)
    with pytest.raises(BrokerUnavailable, match=r"; nothing was queued$"):
        client.submit(rows(10), SPEC)
    own_redis.start()
    assert not client.submit(rows(), SPEC, name=NAME).before
    check_complete(client)


# --- two at once ------------------------------------------------------------------------------


def submit_both(url: str, *lists: Iterable[SourceRow]) -> list[bool | str]:
    """Submit lists under one name at once; returns `before` or the error's code for each."""
    outcomes: list[bool | str] = [""] * len(lists)

    def submit(place: int) -> None:
        with client_for(url) as client:
            try:
                outcomes[place] = client.submit(lists[place], SPEC, name=NAME).before
            except (NameTaken, JobNotFound) as error:
                outcomes[place] = error.code

    threads = [threading.Thread(target=submit, args=(place,)) for place in range(len(lists))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_two_producers_of_one_list_queue_it_once(client: Client, own_redis: EmbeddedRedis) -> None:
    outcomes = submit_both(own_redis.url, rows(), rows())
    assert sorted(map(str, outcomes)) == ["False", "True"]
    check_complete(client)


def test_one_of_two_producers_of_different_lists_wins(client: Client, own_redis: EmbeddedRedis) -> None:
    lists = [[row(n, site if n >= COUNT // 2 else "example.com") for n in range(COUNT)] for site in ("a.example", "b.example")]
    outcomes = submit_both(own_redis.url, *lists)
    assert sorted(map(str, outcomes)) == ["False", "name_taken"]
    winner = lists[outcomes.index(False)]
    assert sources(client) == [each.fields["source"] for each in winner]


def test_discarding_spares_a_job_that_is_queued(client: Client, ledger: Ledger) -> None:
    client.submit(rows(10), SPEC, name=NAME)
    assert not ledger.discard(NAME)
    check_complete(client, 10)
