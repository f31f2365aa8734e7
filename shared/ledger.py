"""What is known of every job: the record that survives queues, workers and restarts.

A chunk is written here before its message is published, is leased while a worker has it, and is
published again by the reaper when it is overdue, so that the queue is only a hint (Celery on Redis
can lose a message under any setting). Every change that must be atomic is one Lua script in `lua/`.

Keys, all below `imagemill:`, all of a job expiring with it:

    job:{id}              hash    spec, state, counts, queue
    job:{id}:chunks       hash    number -> its items, zlib-compressed JSON, once
    job:{id}:results      hash    index -> ItemResult, once
    job:{id}:events       stream  one entry per result, so that watchers are pushed
    job:{id}:duplicates   hash    index -> how many later rows share its result
    job:{id}:attempts     hash    index -> times it was tried alone after its chunk's worker died
    job:{id}:leases       hash    chunk -> token of the worker that has it
    job:{id}:lost         hash    chunk -> how often its worker was lost
    job:{id}:finished     bitmap  chunks with nothing left to do
    waiting:{queue}       zset    chunk -> when it was published
    leased                zset    chunk -> when its lease ends
    newest, queues, jobs, reaper
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from imagemill.shared.connection import connect, longest_wait, now_ms, reachable
from imagemill.shared.errors import JobNotFound
from imagemill.shared.messages import (
    ENDED,
    MANIFEST,
    Chunk,
    Item,
    ItemResult,
    Job,
    JobState,
    JobStatus,
    Row,
    compact,
    row,
)
from imagemill.shared.queues import manifest_queue, queue_name
from imagemill.shared.settings import Settings

SUBMITTING_SECONDS = 3600
"""A list whose producer died while it was being written is forgotten after this."""


@dataclass(frozen=True)
class Lease:
    """A chunk that this worker may work on. `lost` is how often a worker died with it before."""

    job: str
    number: int
    token: str
    lost: int
    items: list[Item]


class Ledger:
    """Reads and writes the record. Thread-safe; make one per process, after the fork.

    Every method raises BrokerUnavailable when Redis can't be reached or refuses.
    """

    def __init__(self, url: str, *, lease_seconds: float = 20.0, expire_days: float = 7.0) -> None:
        self._redis = connect(url)
        self._lease_ms = int(lease_seconds * 1000)
        self._ttl = int(expire_days * 86_400)
        folder = files("imagemill.shared") / "lua"
        common = (folder / "common.lua").read_text()
        names = ("seal", "acquire", "renew", "record", "complete", "release", "reap", "cancel", "retry")
        self._lua = {name: self._redis.register_script(common + (folder / f"{name}.lua").read_text()) for name in names}

    @classmethod
    def of(cls, settings: Settings) -> Ledger:
        """The ledger that `settings` name."""
        url = settings.redis_url.get_secret_value()
        return cls(url, lease_seconds=settings.worker.lease_seconds, expire_days=settings.expire_days)

    def close(self) -> None:
        """Give the connections back."""
        self._redis.close()

    # --- submitting -------------------------------------------------------------------------

    @reachable()
    def open_job(self, job: str, spec: Job) -> None:
        """Begin a list. Nothing of it is visible to workers before `seal`."""
        key = _key(job)
        fields = {
            "spec": spec.model_dump_json(),
            "state": "submitting",
            "queue": queue_name(spec.operation, spec.lane, spec.policy.priority),
            "manifest_queue": manifest_queue(spec.operation, spec.lane),
            "created": now_ms(self._redis),
        }
        with self._redis.pipeline() as pipe:
            pipe.hset(key, mapping=fields)
            pipe.expire(key, SUBMITTING_SECONDS)
            pipe.execute()

    @reachable()
    def add_chunks(self, job: str, chunks: Iterable[tuple[int, Sequence[Item]]]) -> None:
        """Write chunks as (number, items), in one round trip."""
        with self._redis.pipeline(transaction=False) as pipe:
            for number, items in chunks:
                pipe.hset(_key(job, "chunks"), str(number), pack(items))
            pipe.expire(_key(job, "chunks"), SUBMITTING_SECONDS)
            pipe.execute()

    @reachable()
    def seal(self, job: str, *, chunks: int, total: int, duplicates: dict[int, int]) -> None:
        """The list is complete: its chunks count as published from now on.

        `total` counts rows, duplicates included; `duplicates` maps an item's index to how many
        later rows share its result.
        """
        if duplicates:
            with self._redis.pipeline() as pipe:
                pipe.hset(_key(job, "duplicates"), mapping=duplicates)
                pipe.expire(_key(job, "duplicates"), SUBMITTING_SECONDS)
                pipe.execute()
        if not self._script("seal", job, chunks, total, sum(duplicates.values()), self._ttl):
            raise JobNotFound(f"job {job} took longer than {SUBMITTING_SECONDS} s to submit and was forgotten; submit it again")

    @reachable()
    def discard(self, job: str) -> None:
        """Forget a list that was never sealed."""
        self._redis.delete(_key(job), _key(job, "chunks"), _key(job, "duplicates"))

    # --- working ----------------------------------------------------------------------------

    @reachable()
    def acquire(self, job: str, number: int, *, task: str, token: str) -> Lease | Literal["gone", "held"]:
        """Take a chunk for `task`, a Celery task id; `token` names this delivery and begins with `{task}/`."""
        answer = self._script("acquire", job, number, task, token, self._lease_ms)
        if answer[0] != b"ok":
            return "gone" if answer[0] == b"gone" else "held"
        return Lease(job, number, token, int(answer[1]), unpack(answer[2]) if answer[2] else [])

    @reachable()
    def renew(self, lease: Lease) -> Literal["ok", "lost", "cancelled"]:
        """Prolong a lease, and hear whether the job was cancelled."""
        answer: Literal["ok", "lost", "cancelled"] = self._script(
            "renew", lease.job, lease.number, lease.token, self._lease_ms
        ).decode()
        return answer

    @reachable()
    def recorded(self, job: str, indexes: Sequence[int]) -> set[int]:
        """Those of `indexes` that have a result already."""
        if not indexes:
            return set()
        known = self._redis.hmget(_key(job, "results"), [str(index) for index in indexes])
        return {index for index, value in zip(indexes, known, strict=True) if value is not None}

    @reachable()
    def record(self, job: str, result: ItemResult) -> bool:
        """Record a result; False if this image has one already (then nothing changes)."""
        return bool(self._script("record", job, result.index, result.state, compact(result)))

    @reachable()
    def complete(self, lease: Lease, *, manifest: str | None = None) -> Literal["ok", "lost", "finishing"]:
        """A chunk is done; 'finishing' if it was its job's last, and the manifest is due.

        `manifest` is where the manifest was written, with the chunk that stands for it.
        """
        answer: Literal["ok", "lost", "finishing"] = self._script(
            "complete", lease.job, lease.number, lease.token, manifest or ""
        ).decode()
        return answer

    @reachable()
    def release(self, lease: Lease) -> bool:
        """Give an unfinished chunk back, without counting it as lost; the caller publishes it."""
        return bool(self._script("release", lease.job, lease.number, lease.token))

    @reachable()
    def count_attempt(self, job: str, index: int) -> int:
        """An image is about to be tried alone; how often that makes it."""
        with self._redis.pipeline() as pipe:
            pipe.hincrby(_key(job, "attempts"), str(index), 1)
            pipe.expire(_key(job, "attempts"), self._ttl)
            return int(pipe.execute()[0])

    @reachable()
    def forget_attempt(self, job: str, index: int) -> None:
        """That try ended before it could do harm, as its worker was told to stop: it does not count."""
        self._redis.hincrby(_key(job, "attempts"), str(index), -1)

    @reachable()
    def attempts(self, job: str, indexes: Sequence[int]) -> dict[int, int]:
        """How often each image was tried alone."""
        counts = self._redis.hmget(_key(job, "attempts"), [str(index) for index in indexes]) if indexes else []
        return {index: int(count or 0) for index, count in zip(indexes, counts, strict=True)}

    @reachable()
    def reap(self, node: str, *, patience: float = 30.0, every: float = 5.0) -> list[Chunk]:
        """Chunks that are overdue and must be published again; empty while another node is the reaper.

        `patience` in seconds is how long a chunk may be missing from an idle queue.
        """
        if not self._redis.set("imagemill:reaper", node, nx=True, px=int(every * 900)):
            return []
        members = self._script("reap", int(patience * 1000), 1000)
        chunks = []
        for member in members:
            job, _, number = member.decode().rpartition(":")
            chunks.append(self.chunk(job, int(number)))
        return chunks

    # --- following --------------------------------------------------------------------------

    @reachable()
    def spec(self, job: str) -> Job:
        """What was asked for."""
        raw = self._redis.hget(_key(job), "spec")
        if raw is None:
            raise JobNotFound(f"there is no job {job}; it may have expired")
        return Job.model_validate_json(raw)

    @reachable()
    def status(self, job: str) -> JobStatus:
        """How far a job is."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(_key(job))
            pipe.time()
            raw, (seconds, micros) = pipe.execute()
        if b"spec" not in raw:
            raise JobNotFound(f"there is no job {job}; it may have expired")
        fields = {name.decode(): value for name, value in raw.items()}
        spec = Job.model_validate_json(fields["spec"])
        created = int(fields["created"]) / 1000
        ended = int(fields["ended"]) / 1000 if "ended" in fields else None
        state: JobState = fields["state"].decode()
        return JobStatus(
            job=job,
            operation=spec.operation,
            engine=spec.engine,
            lane=spec.lane,
            state=state,
            total=int(fields.get("total", 0)),
            done=int(fields.get("done", 0)),
            failed=int(fields.get("failed", 0)),
            duplicates=int(fields.get("dup", 0)),
            priority=spec.policy.priority,
            output=spec.output.url,
            manifest=fields["manifest"].decode() if "manifest" in fields else None,
            created=created,
            ended=ended,
            seconds=round((ended or seconds + micros / 1e6) - created, 3),
        )

    @reachable()
    def jobs(self, most: int = 50) -> list[JobStatus]:
        """The latest jobs, newest first."""
        self._redis.zremrangebyscore("imagemill:jobs", "-inf", now_ms(self._redis) - self._ttl * 1000)
        found = []
        for raw in self._redis.zrevrange("imagemill:jobs", 0, most - 1):
            try:
                found.append(self.status(raw.decode()))
            except JobNotFound:
                self._redis.zrem("imagemill:jobs", raw)
        return found

    def rows(self, job: str) -> Iterator[Row]:
        """Every item of a job in the list's order, with what became of it; streamed chunk by chunk."""
        # While the manifest is being written, what has no result won't get one any more.
        ended = self.status(job).state in (*ENDED, "finishing")
        for _, items in self._chunks(job):
            with reachable():
                results = self._results(job, [item.index if item.duplicate_of is None else item.duplicate_of for item in items])
            for item, result in zip(items, results, strict=True):
                yield row(item, result, ended=ended)

    @reachable()
    def follow(self, job: str, *, since: str = "0", wait: float = 1.0) -> tuple[str, list[ItemResult]]:
        """Results after the place `since` in the job's stream, waiting up to `wait` seconds, at most 5, for the first.

        Returns the place to go on from. An entry whose image is being retried has no result and is left out.
        """
        block = max(1, int(1000 * min(wait, longest_wait(self._redis))))
        answer = self._redis.xread({_key(job, "events"): since}, count=1000, block=block)
        if not answer:
            return since, []
        entries = answer[0][1] if isinstance(answer, list) else next(iter(answer.values()))[0]
        indexes = [int(fields[b"i"]) for _, fields in entries if b"i" in fields]
        found = [result for result in self._results(job, indexes) if result is not None]
        return entries[-1][0].decode(), found

    @reachable()
    def cancel(self, job: str) -> Literal["over", "stopping", "stopped"]:
        """Stop what has not started. 'over' if there is nothing to stop; after 'stopped' the manifest is due."""
        self.spec(job)
        answer: Literal["over", "stopping", "stopped"] = ("over", "stopping", "stopped")[self._script("cancel", job)]
        return answer

    @reachable()
    def retry(self, job: str) -> list[Chunk]:
        """Forget the failures of an ended job; the chunks to publish, with how many images each has again."""
        if not self.status(job).over:
            return []
        again = []
        for number, items in self._chunks(job):
            own = [item.index for item in items if item.duplicate_of is None]
            results = self._results(job, own)
            failed = [index for index, result in zip(own, results, strict=True) if result is None or result.state == "failed"]
            if failed:
                self._script("retry", job, number, *failed)
                again.append(Chunk(job=job, number=number, images=len(failed)))
        return again

    @reachable()
    def chunk(self, job: str, number: int) -> Chunk:
        """The message for a chunk."""
        raw = self._redis.hget(_key(job, "chunks"), str(number)) if number != MANIFEST else None
        return Chunk(job=job, number=number, images=sum(i.duplicate_of is None for i in unpack(raw)) if raw else 0)

    # --- inside -----------------------------------------------------------------------------

    def _script(self, name: str, *args: Any) -> Any:
        return self._lua[name](args=args)

    def _results(self, job: str, indexes: Sequence[int]) -> list[ItemResult | None]:
        if not indexes:
            return []
        raw = self._redis.hmget(_key(job, "results"), [str(index) for index in indexes])
        return [ItemResult.model_validate_json(value) if value is not None else None for value in raw]

    def _chunks(self, job: str) -> Iterator[tuple[int, list[Item]]]:
        with reachable():
            count = int(self._redis.hget(_key(job), "chunks") or 0)
        for number in range(count):
            with reachable():  # around the read alone: a generator's caller may raise at its yield
                raw = self._redis.hget(_key(job, "chunks"), str(number))
            if raw is not None:
                yield number, unpack(raw)


def _key(job: str, part: str | None = None) -> str:
    return f"imagemill:job:{job}" + (f":{part}" if part else "")


def pack(items: Sequence[Item]) -> bytes:
    """Items as zlib-compressed JSON: 32 addresses of 124 bytes take about 1.1 kB."""
    return zlib.compress(("[" + ",".join(compact(item) for item in items) + "]").encode(), 9)


def unpack(data: bytes) -> list[Item]:
    """The items that `pack` packed."""
    return [Item.model_validate(fields) for fields in json.loads(zlib.decompress(data))]
