"""Jobs in a ledger, and the moves of worker children."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any

from imagemill.shared.ledger.leasing import ManifestDue, Request, Share, WorkLedger
from imagemill.shared.ledger.reading import ReadLedger
from imagemill.shared.ledger.scripts import PACK
from imagemill.shared.ledger.submitting import SubmitLedger
from imagemill.shared.messages import Item, ItemResult, Job, Output, Policy

LANE, OTHER_LANE = "stylize.opencv", "inpaint.opencv"
CHILD, OTHER = "cpu@a/1", "cpu@b/1"
NUMBERS = itertools.count()


def spec(lane: str = LANE, **policy: Any) -> Job:
    operation: Any = lane.partition(".")[0]
    return Job(operation=operation, output=Output(url="s3://results/x"), policy=Policy(**policy))


def item(index: int, duplicate_of: int | None = None) -> Item:
    return Item(index=index, source=f"https://example.com/{index}.jpg", duplicate_of=duplicate_of)


def make_job(
    producer: SubmitLedger,
    images: int,
    *,
    duplicates: Sequence[int] = (),
    gaps: Collection[int] = (),
    lane: str = LANE,
    **policy: Any,
) -> str:
    """A sealed job: `images` indexes without those in `gaps`, and then a duplicate of each item in `duplicates`."""
    job = f"job-{next(NUMBERS):06d}"
    items = [item(index) for index in range(images) if index not in gaps]
    items += [item(images + place, first) for place, first in enumerate(duplicates)]
    packs = itertools.groupby(items, lambda item: item.index // PACK)
    producer.open_job(job, spec(lane, **policy))
    producer.add_packs(job, [(number, list(found)) for number, found in packs])
    producer.seal(
        job,
        size=images + len(duplicates),
        total=len(items),
        duplicates={first: duplicates.count(first) for first in duplicates},
    )
    return job


def ask(worker: WorkLedger, child: str = CHILD, room: int = 32, lanes: Sequence[str] = (LANE,), **fields: Any) -> Any:
    """What a child gets that has room for `room` images in each lane."""
    return worker.take(Request(child, lanes, dict.fromkeys(lanes, room), **fields))


def take(worker: WorkLedger, child: str = CHILD, room: int = 32, lanes: Sequence[str] = (LANE,), **fields: Any) -> Share:
    share = ask(worker, child, room, lanes, **fields)
    assert isinstance(share, Share)
    return share


def indexes(share: Share) -> list[int]:
    """The images of a share, in the order in which its child begins them."""
    return [item.index for item in share.items]


def done(index: int) -> ItemResult:
    return ItemResult(index=index, state="done", output=f"s3://results/x/{index}.png")


def failed(index: int) -> ItemResult:
    return ItemResult(index=index, state="failed", code="not_found", message="no such image")


def work(worker: WorkLedger, share: Share, child: str = CHILD, bad: Collection[int] = ()) -> None:
    """Record all images of a share and give it back; `bad` images fail."""
    for index in indexes(share):
        worker.record(share.job, failed(index) if index in bad else done(index))
    worker.give_back(share, child)


def write_manifest(worker: WorkLedger, job: str) -> None:
    due = ask(worker)
    assert isinstance(due, ManifestDue)
    assert due.job == job
    assert worker.end_job(job, "s3://results/x/manifest.jsonl")


def run(worker: WorkLedger, bad: Collection[int] = (), lanes: Sequence[str] = (LANE,)) -> list[tuple[str, int]]:
    """One child does all that can be done; returns the images in order."""
    order = []
    while (answer := ask(worker, lanes=lanes)) != "none":
        if isinstance(answer, ManifestDue):
            worker.end_job(answer.job, "s3://results/x/manifest.jsonl")
        else:
            order += [(answer.job, index) for index in indexes(answer)]
            work(worker, answer, bad=bad)
    return order


def die(worker: WorkLedger, raw: Any, share: Share) -> int:
    """The child of a share dies, and its node notices that."""
    name = f"imagemill:job:{share.job}:shares"
    held = raw.hget(name, str(share.number))
    if held is not None:
        raw.hset(name, str(share.number), json.dumps({**json.loads(held), "child": "dead"}))
    return len(worker.bury("dead"))


def fall_silent(worker: WorkLedger, raw: Any, share: Share) -> int:
    """The child of a share has died with its node, or seems to have; another node notices that."""
    raw.zadd("imagemill:leased", {f"{share.job}:{share.number}": 1}, xx=True)
    return len(worker.tend()[0])


def ring(raw: Any, what: str, job: str) -> None:
    """A time that was set for a job has come: `begin`, `end` or `rise`."""
    assert raw.zadd("imagemill:alarms", {f"{what} {job}": 1}, xx=True, ch=True) == 1


def hours(count: float) -> datetime:
    """The time in so many hours."""
    return datetime.fromtimestamp(datetime.now(UTC).timestamp() + 3600 * count, UTC)


def keys(raw: Any, job: str) -> list[str]:
    return sorted(raw.scan_iter(f"imagemill:job:{job}*"))


def counts(ledger: ReadLedger, job: str) -> tuple[str, int, int]:
    status = ledger.status(job)
    return status.state, status.done, status.failed


def nothing_left(raw: Any) -> bool:
    """Whether nobody waits, works or is due."""
    names = ("turns:*", "waiting:*", "manifests:*", "leased", "running", "alarms", "job:*:shares")
    return not any(list(raw.scan_iter(f"imagemill:{name}")) for name in names)
