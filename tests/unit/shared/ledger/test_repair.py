"""Garbage in the ledger's keys: it is set aside, damaged jobs end, and the others are done."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from imagemill.shared.errors import JobUnreadable
from imagemill.shared.ledger.leasing import ManifestDue
from imagemill.shared.messages import Job
from imagemill.shared.options.base import STORED
from tests.ledgers import Ledger
from tests.unit.shared.ledger.jobs import CHILD, LANE, OTHER, ask, counts, indexes, item, make_job, run, take, work

pytestmark = pytest.mark.integration

SHARED = (
    *("alarms", "leased", "jobs", "lanes", "latest", "weights", "running", "children", "speed", "nodes", "node-children"),
    *("tender", "tended", "sequence", f"manifests:{LANE}", f"nodes:{LANE}", f"rates:{LANE}", "clocks:normal"),
    *(f"turns:{LANE}:normal", f"waiting:{LANE}:normal:ann"),
)
PARTS = ("packs", "results", "events", "duplicates", "shares", "back", "suspects")


def replace(raw: Any, name: str) -> None:
    """Write a key of a type that nobody expects."""
    raw.delete(name)
    if name.endswith(("tender", "tended", "sequence")):
        raw.sadd(name, "text")
    else:
        raw.set(name, "text")


def finish(ledger: Ledger) -> None:
    """Nodes tend and repair, and a child works, until nothing is left."""
    for _ in range(3):
        ledger.tend()
        ledger.repair()
        run(ledger)


@pytest.mark.parametrize("name", SHARED)
def test_jobs_are_done_whatever_type_a_shared_key_has(ledger: Ledger, raw: Any, name: str) -> None:
    first, second = make_job(ledger, 40, owner="ann"), make_job(ledger, 3, owner="ann")
    begun = take(ledger, OTHER, room=4)
    replace(raw, f"imagemill:{name}")
    work(ledger, begun, OTHER)
    finish(ledger)
    assert counts(ledger, first) == ("done", 40, 0)
    assert counts(ledger, second) == ("done", 3, 0)
    third = make_job(ledger, 2, owner="ann")
    finish(ledger)
    assert counts(ledger, third) == ("done", 2, 0)


@pytest.mark.parametrize("part", PARTS)
def test_job_ends_if_one_of_its_keys_has_another_type(ledger: Ledger, raw: Any, part: str) -> None:
    bad, good = make_job(ledger, 40), make_job(ledger, 3)
    begun = take(ledger, OTHER, room=4)
    replace(raw, f"imagemill:job:{bad}:{part}")
    work(ledger, begun, OTHER)
    finish(ledger)
    assert counts(ledger, good) == ("done", 3, 0)
    assert ledger.status(bad).over
    assert sum(counts(ledger, bad)[1:]) == 40
    assert bad in " ".join(raw.lrange("imagemill:dead", 0, -1))


FIELDS = ("spec", "state", "lane", "priority", "owner", "order", "size", "next", "total", "open", "back", "done", "shares")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("garbage", ["text", "", "-1", "1e400", "99999999999999"])
def test_job_ends_if_its_record_is_damaged(ledger: Ledger, raw: Any, field: str, garbage: str) -> None:
    bad, good = make_job(ledger, 40), make_job(ledger, 3)
    take(ledger, OTHER, room=4)
    raw.hset(f"imagemill:job:{bad}", field, garbage)
    finish(ledger)
    assert counts(ledger, good) == ("done", 3, 0)
    ledger.bury(OTHER)
    finish(ledger)
    assert raw.hget(f"imagemill:job:{bad}", "state") in ("done", "failed")
    if field == "spec":
        with pytest.raises(JobUnreadable):
            ledger.status(bad)


def test_job_of_an_earlier_version_is_done_whatever_its_prompt_says(ledger: Ledger) -> None:
    """[cat|dog] used to be text; a job that says it now is refused when it is submitted."""
    options = {"engine": "diffusion", "prompt": "a [cat|dog]"}
    fields = {"operation": "stylize", "options": options, "output": {"url": "s3://results/x"}}
    old = Job.model_validate(fields, context=STORED)
    ledger.open_job("old", old)
    ledger.add_packs("old", [(0, [item(0)])])
    ledger.seal("old", size=1, total=1, duplicates={})
    ledger.repair()
    assert ledger.spec("old") == old
    work(ledger, take(ledger, lanes=[old.lane]))
    assert counts(ledger, "old") == ("finishing", 1, 0)


Spoil = Callable[[Any, str], Any]
ENTRIES: dict[str, Spoil] = {
    "back": lambda raw, job: raw.rpush(f"imagemill:job:{job}:back", "0-99999999999"),
    "suspects": lambda raw, job: raw.rpush(f"imagemill:job:{job}:suspects", "text"),
    "share": lambda raw, job: raw.hset(f"imagemill:job:{job}:shares", "1", "null"),
    "huge share": lambda raw, job: raw.hset(
        f"imagemill:job:{job}:shares",
        "1",
        json.dumps({"child": OTHER, "owner": f"~{job}", "images": 4, "ranges": "0-99999999999"}),
    ),
    "huge group": lambda raw, job: raw.rpush(f"imagemill:job:{job}:suspects", "1:0-99999999999"),
}


@pytest.mark.parametrize("what", ENTRIES)
def test_job_ends_if_an_entry_is_malformed(ledger: Ledger, raw: Any, what: str) -> None:
    bad, good = make_job(ledger, 40), make_job(ledger, 3)
    take(ledger, OTHER, room=4)
    ENTRIES[what](raw, bad)
    finish(ledger)
    ledger.bury(OTHER)
    finish(ledger)
    assert counts(ledger, good) == ("done", 3, 0)
    assert ledger.status(bad).over


@pytest.mark.parametrize("score", ["inf", "-inf", 1e300])
def test_entries_of_shared_keys_with_impossible_times(ledger: Ledger, raw: Any, score: Any) -> None:
    job = make_job(ledger, 3, owner="ann")
    raw.zadd(f"imagemill:waiting:{LANE}:normal:ann", {"nobody": 0, b"\xff": 0})
    for name in (f"turns:{LANE}:normal", "clocks:normal", "leased", "alarms", f"manifests:{LANE}"):
        raw.zadd(f"imagemill:{name}", {"nobody": score, b"\xff": score, "ann": score})
    raw.sadd("imagemill:lanes", "no lane", b"\xff")
    assert ledger.tend()[1].keys() <= {LANE}
    finish(ledger)
    assert counts(ledger, job) == ("done", 3, 0)
    assert raw.smembers("imagemill:lanes") <= {LANE}


@pytest.mark.parametrize("pack", [b"text", zlib.compress(b"[" + b" " * (64 * 1024 * 1024) + b"]"), zlib.compress(b"7"), None])
def test_images_of_a_damaged_pack_fail_and_the_others_are_done(ledger: Ledger, raw: Any, pack: bytes | None) -> None:
    job = make_job(ledger, 40)
    if pack is None:
        raw.hdel(f"imagemill:job:{job}:packs", "1")
    else:
        raw.hset(f"imagemill:job:{job}:packs", "1", pack)
    finish(ledger)
    assert counts(ledger, job) == ("done", 32, 8)
    assert len(list(ledger.rows(job))) == 32
    assert ledger.retry(job) == 8
    finish(ledger)
    assert counts(ledger, job) == ("done", 32, 8)


def test_rows_of_a_newer_version_are_left_to_other_nodes(ledger: Ledger, raw: Any) -> None:
    new, old = make_job(ledger, 2), make_job(ledger, 2)
    rows = [{"version": 2, "index": 0, "from": "https://example.com/0.jpg"}]
    raw.hset(f"imagemill:job:{new}:packs", "0", zlib.compress(json.dumps(rows).encode()))
    share = take(ledger)
    assert (share.job, share.newer) == (new, True)
    ledger.give_back(share, CHILD, returned=sorted(share.indexes))
    other = take(ledger, avoid=[new])
    assert (other.job, indexes(other)) == (old, [0, 1])
    work(ledger, other)
    due = ask(ledger, avoid=[new])
    assert isinstance(due, ManifestDue)
    assert due.job == old
    assert ledger.repair() == 0


def test_manifest_of_a_skipped_job_is_left_to_other_nodes(ledger: Ledger, raw: Any) -> None:
    job = make_job(ledger, 2)
    work(ledger, take(ledger))
    assert ask(ledger, avoid=[job]) == "none"
    assert isinstance(ask(ledger), ManifestDue)
