"""The ledger as everyone reads it: a job's spec, status, rows and results as they arrive."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, cast

import redis
from pydantic import ValidationError

from imagemill.shared.connection import longest_wait, reachable
from imagemill.shared.dead import VERSION, put_aside, version_of
from imagemill.shared.errors import JobNewer, JobNotFound, JobUnreadable, RecordDamaged, sentence
from imagemill.shared.forecast import Waiting
from imagemill.shared.ledger.repair import Repairing
from imagemill.shared.ledger.scripts import PACK, key, unpack
from imagemill.shared.messages import ENDED, PRIORITIES, Item, ItemResult, Job, JobState, JobStatus, Row, Unfinished, row
from imagemill.shared.options.base import STORED, validation_sentence

log = logging.getLogger(__name__)

PACKS_PER_READ = 32
"""Packs read in one round trip."""
MOST_JOBS = 10_000
LAST_SECOND = 1e11
"""No time of the ledger is later; it is in the year 5138."""


@dataclass(frozen=True)
class Lineup:
    """The jobs that wait in a lane, in the order of their turns, and the lane's images per second, 0 if unknown."""

    jobs: list[Waiting]
    speed: float


@dataclass(frozen=True)
class LaneLoad:
    """Images of one owner in one lane and priority; `owner` is empty for jobs without one. `oldest` is in seconds."""

    lane: str
    priority: str
    owner: str
    waiting: int
    running: int
    oldest: float


@dataclass(frozen=True)
class Load:
    """Lanes with work, what waits and runs in them, and the images per second of each child, as (lane, NODE/NUMBER, rate).

    `jobs` is the number of unfinished jobs; `overdue` is how many seconds ago the oldest lease should have ended.
    """

    lanes: list[str]
    rows: list[LaneLoad]
    rates: list[tuple[str, str, float]]
    jobs: int
    overdue: float


class ReadLedger(Repairing):
    """Reads jobs."""

    scripts: ClassVar[tuple[str, ...]] = (*Repairing.scripts, "ring", "load")

    def load(self) -> Load:
        """What waits and runs, of at most 10,000 jobs."""
        found = json.loads(self._script("load", MOST_JOBS).decode(errors="replace"))
        rows = [
            LaneLoad(lane, priority, "" if owner.startswith("~") else owner, int(waiting), int(running), oldest / 1000)
            for lane, priority, owner, waiting, running, oldest in found["rows"]  # an empty table is an object in JSON
        ]
        rates = [(lane, child, float(rate)) for lane, child, rate in found["rates"]]
        return Load(list(found["lanes"]), rows, rates, found["jobs"], found["overdue"] / 1000)

    def memory(self) -> tuple[int, int]:
        """Bytes that Redis uses, and its limit, 0 for none."""
        info = self._redis.info("memory")
        return int(info["used_memory"]), int(info.get("maxmemory", 0))

    def spec(self, job: str) -> Job:
        """The job's spec as submitted."""
        with _legible(job):
            raw = self._redis.hget(key(job), "spec")
        if raw is None:
            raise self._missing(job)
        return _spec(job, raw)

    def _missing(self, job: str) -> JobNotFound | JobUnreadable:
        """What to raise for a job without a spec."""
        if self._redis.exists(key(job)):
            return JobUnreadable(f"job {job} can't be read: its record in Redis is damaged")
        return JobNotFound(f"job {job} not found; it may have expired")

    def status(self, job: str) -> JobStatus:
        """The job's state and counts; cheap. Only what needs no look at other jobs: `position` and the like stay None."""
        status = self._status(job)
        if status.until and not status.over and status.created + status.seconds > status.until:
            self._script("ring")  # no node has noticed yet; perhaps none runs
            status = self._status(job)
        return status

    def _status(self, job: str) -> JobStatus:
        with _legible(job):
            return self._read_status(job)

    def _read_status(self, job: str) -> JobStatus:
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(key(job))
            pipe.hlen(key(job, "shares"))
            pipe.get(key(job, "wait"))
            pipe.time()
            raw, shares, wait, (seconds, micros) = pipe.execute()
        if b"spec" not in raw:
            raise self._missing(job)
        fields = {name.decode(): value for name, value in raw.items()}
        spec = _spec(job, fields["spec"])
        now, created, ended = seconds + micros / 1e6, _seconds(fields, "created") or 0.0, _seconds(fields, "ended")
        later = _seconds(fields, "later")
        waiting, running = _split(fields, shares)
        return JobStatus(
            job=job,
            operation=spec.operation,
            engine=spec.engine,
            lane=spec.lane,
            state=_state(fields),
            total=int(fields.get("total", 0)),
            done=int(fields.get("done", 0)),
            failed=int(fields.get("failed", 0)),
            duplicates=int(fields.get("dup", 0)),
            waiting=waiting,
            running=running,
            priority=fields["priority"].decode(),
            owner=spec.policy.owner,
            not_before=later if later and later > now else None,
            until=_seconds(fields, "until"),
            why=_why(fields, now) or _wait(fields, wait),
            starts=_seconds(fields, "started") if fields["state"] != b"queued" else None,  # a retry starts over
            output=spec.output.url,
            manifest=fields["manifest"].decode() if "manifest" in fields else None,
            created=created,
            ended=ended,
            seconds=round((ended or now) - created, 3),
        )

    def lineup(self, lane: str) -> Lineup:
        """Who waits in a lane, and how fast it is."""
        owners = {priority: self._owners(lane, priority) for priority in PRIORITIES}
        waiting = [(priority, owner) for priority in PRIORITIES for owner in owners[priority]]
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hget("imagemill:speed", lane)
            pipe.hgetall("imagemill:weights")
            for priority, owner in waiting:
                pipe.zrange(f"imagemill:waiting:{lane}:{priority}:{owner}", 0, -1)
            speed, weights, *found = pipe.execute()
        places = [(job.decode(errors="replace"), *place) for place, jobs in zip(waiting, found, strict=True) for job in jobs]
        with self._redis.pipeline(transaction=False) as pipe:
            for job, *_ in places:
                pipe.hmget(key(job), COUNTS)
                pipe.hlen(key(job, "shares"))
            counts = pipe.execute()
        jobs = []
        for place, (job, priority, owner) in enumerate(places):
            values, shares = counts[2 * place : 2 * place + 2]
            fields = {name: value for name, value in zip(COUNTS, values, strict=True) if value is not None}
            try:
                images, _ = _split(fields, shares)
            except ValueError:  # a damaged record says nothing about its turn
                continue
            jobs.append(Waiting(job, owner, _positive(weights.get(owner.encode())) or 1.0, priority, images))
        return Lineup(jobs, _positive(speed))

    def _owners(self, lane: str, priority: str) -> list[str]:
        """The owners with waiting jobs, in the order of their turns: by their clocks, then by name."""
        owners = self._redis.zrange(f"imagemill:turns:{lane}:{priority}", 0, -1)
        clocks = self._redis.zmscore(f"imagemill:clocks:{priority}", owners) if owners else []
        turns = sorted(zip((clock or 0 for clock in clocks), owners, strict=True))
        return [owner.decode(errors="replace") for _, owner in turns]

    def jobs(self, most: int = 50) -> list[JobStatus]:
        """The latest `most` jobs, newest first."""
        jobs = []
        for raw in self._redis.zrevrange("imagemill:jobs", 0, most - 1):
            try:
                jobs.append(self.status(raw.decode()))
            except JobNotFound:
                self._redis.zrem("imagemill:jobs", raw)
            except (JobUnreadable, UnicodeDecodeError) as error:
                self._leave_out(raw, str(error))
        return jobs

    def _leave_out(self, job: bytes, reason: str) -> None:
        """A job of the list that can't be read: set its record aside once, unless a newer version has written it."""
        name = b"imagemill:job:" + job
        try:
            record = self._redis.hgetall(name)
        except redis.ResponseError:
            record = {}
        if version_of(record.get(b"spec", b"")) > VERSION:
            log.warning("job of a newer version left alone", extra={"action": "read", "job": job.decode(errors="replace")})
        elif self._redis.zrem("imagemill:jobs", job):
            content = b"; ".join(field + b"=" + value for field, value in record.items())
            put_aside(self._redis, name.decode(errors="backslashreplace"), reason, content, seconds=self._ttl)

    def rows(self, job: str, *, first: int = 0) -> Iterator[Row]:
        """Every row of a job from index `first` on with its result, in list order; read a thousand at a time."""
        # Once the manifest is being written, items without a result will not get one.
        state, (lapsed, damaged) = self.status(job).state, self._redis.hmget(key(job), "lapsed", "damaged")
        unfinished: Unfinished = (
            "pending"
            if state not in (*ENDED, "finishing")
            else "cancelled"
            if lapsed is None
            else "damaged"
            if damaged
            else "expired"
        )
        for items in self._lists(job, first):
            with reachable(), _legible(job):
                results = self._results(job, [item.index if item.duplicate_of is None else item.duplicate_of for item in items])
            for item, result in zip(items, results, strict=True):
                yield row(item, result, unfinished)

    def follow(self, job: str, *, since: str = "0", wait: float = 1.0) -> tuple[str, list[ItemResult]]:
        """The job's results after stream position `since`; waits up to `wait` seconds, at most 5, for the first.

        Returns the position to continue from. An image that is being retried has an entry but no result, and is left out.
        """
        block = max(1, int(1000 * min(wait, longest_wait(self._redis))))
        answer = self._redis.xread({key(job, "events"): since}, count=1000, block=block)
        if not answer:
            return since, []
        entries = answer[0][1] if isinstance(answer, list) else next(iter(answer.values()))[0]
        indexes = [int(fields[b"i"]) for _, fields in entries if b"i" in fields]
        results = [result for result in self._results(job, indexes) if result is not None]
        return entries[-1][0].decode(), results

    def _results(self, job: str, indexes: Sequence[int]) -> list[ItemResult | None]:
        raw = self._fields(job, "results", indexes)
        return [_result(index, value) for index, value in zip(indexes, raw, strict=True)]

    def _fields(self, job: str, part: str, indexes: Sequence[int]) -> list[bytes | None]:
        return self._redis.hmget(key(job, part), list(map(str, indexes))) if indexes else []

    def _lists(self, job: str, first: int = 0) -> Iterator[list[Item]]:
        """A job's items from index `first` on, about a thousand at a time.

        Packs that can't be read are left out; the counts include their images.
        """
        with reachable(), _legible(job):
            numbers = range(first // PACK, -(-int(self._redis.hget(key(job), "size") or 0) // PACK))
        for start in range(0, len(numbers), PACKS_PER_READ):
            some = numbers[start : start + PACKS_PER_READ]
            with reachable(), _legible(job):  # around the read alone: the generator's caller may raise at the yield
                packs = self._fields(job, "packs", some)
            yield [
                item
                for number, raw in zip(some, packs, strict=True)
                if raw is not None
                for item in _items(job, number, raw)
                if item.index >= first
            ]


def _items(job: str, number: int, raw: bytes) -> list[Item]:
    try:
        return unpack(raw)
    except ValueError as error:
        log.warning("rows left out", extra={"action": "read", "job": job, "pack": number, "reason": str(error)})
        return []


COUNTS = ("state", "total", "done", "failed", "size", "next", "back", "suspects", "cancelled", "expired")


def _split(fields: Mapping[str, bytes], shares: int) -> tuple[int, int]:
    """The images without a result: how many are to be handed out, and how many shares hold.

    Exact unless the list has duplicates or skipped rows, whose places are handed out too.
    """
    if fields.get("state") not in (b"queued", b"running"):
        return 0, 0
    total, done, failed, size, begun, back, suspects = (int(fields.get(name, 0)) for name in COUNTS[1:8])
    left = total - done - failed
    waiting = min(left, size - begun + back + suspects) if shares else left
    return 0 if "cancelled" in fields or "expired" in fields else waiting, left - waiting


def _why(fields: Mapping[str, bytes], now: float) -> str | None:
    """Why a job waits, as far as its own record shows."""
    if fields["state"] not in (b"queued", b"running"):
        return None
    if "cancelled" in fields:
        return "being cancelled"
    until = _seconds(fields, "until")
    if "expired" in fields or (until and until <= now):  # without nodes, nobody ends it
        return "its deadline has passed"
    if "paused" in fields:
        return "paused"
    later = _seconds(fields, "later")
    return f"starts at {time.strftime('%Y-%m-%d %H:%M', time.localtime(later))}" if later and later > now else None


def _wait(fields: Mapping[str, bytes], reported: bytes | None) -> str | None:
    """What a worker has reported: why the images that it holds, or the manifest, can't be finished."""
    waits = reported is not None and fields["state"] in (b"queued", b"running", b"finishing")
    return reported.decode(errors="replace") if reported is not None and waits else None


def _seconds(fields: Mapping[str, bytes], name: str) -> float | None:
    """A time of the ledger, which counts in milliseconds."""
    if name not in fields:
        return None
    seconds = float(fields[name]) / 1000
    if not 0 <= seconds < LAST_SECOND:
        raise ValueError(f"{name} is not a time")
    return seconds


def _result(index: int, raw: bytes | None) -> ItemResult | None:
    """A result; a failure if it can't be read."""
    if raw is None:
        return None
    try:
        return ItemResult.model_validate_json(raw)
    except ValidationError:
        return ItemResult(index=index, state="failed", code=RecordDamaged.code, message="its result in Redis can't be read")


def _state(fields: Mapping[str, bytes]) -> JobState:
    """The state as users see it: a paused job whose last images are still running is paused."""
    state = cast(JobState, fields["state"].decode())
    return "paused" if "paused" in fields and "cancelled" not in fields and state in ("queued", "running") else state


def _positive(raw: bytes | None) -> float:
    """A figure of the ledger; 0 if it is unknown or damaged."""
    try:
        figure = float(raw or 0)
    except ValueError:
        return 0.0
    return figure if 0 < figure < math.inf else 0.0


def _spec(job: str, raw: bytes) -> Job:
    version = version_of(raw)
    if version > VERSION:
        raise JobNewer(f"job {job} was submitted by a newer version of imagemill (its version is {version})")
    try:
        return Job.model_validate_json(raw, context=STORED)
    except ValidationError as error:
        raise JobUnreadable(f"job {job} can't be read: {validation_sentence(error)}") from error


@contextmanager
def _legible(job: str) -> Iterator[None]:
    """Turns what goes wrong with a damaged record into JobUnreadable."""
    try:
        yield
    except (ValueError, KeyError) as error:  # such as a count that isn't a number, or no state
        raise JobUnreadable(f"job {job} can't be read: {sentence(error)}") from error
    except redis.ResponseError as error:
        if "WRONGTYPE" not in str(error):
            raise
        raise JobUnreadable(f"job {job} can't be read: one of its keys is of another type") from error
