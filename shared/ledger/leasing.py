"""The ledger as workers use it: lease chunks, record results, and reap what other workers lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from imagemill.shared.ledger.reading import ReadLedger
from imagemill.shared.ledger.scripts import key, unpack
from imagemill.shared.messages import MANIFEST, Chunk, Item, ItemResult, compact


@dataclass(frozen=True)
class Lease:
    """A chunk that this worker may work on. `lost` counts the workers that died with it before."""

    job: str
    number: int
    token: str
    lost: int
    items: list[Item]


class WorkLedger(ReadLedger):
    """Leases chunks and records results."""

    scripts = ("acquire", "renew", "record", "complete", "release", "reap")

    def acquire(self, job: str, number: int, *, task: str, token: str) -> Lease | Literal["gone", "held"]:
        """Lease a chunk for the Celery task with ID `task`; `token` identifies this delivery and starts with `{task}/`.

        'gone' if the chunk has nothing left to do; 'held' if another worker has it.
        """
        answer = self._script("acquire", job, number, task, token, self._lease_ms)
        if answer[0] != b"ok":
            return "gone" if answer[0] == b"gone" else "held"
        return Lease(job, number, token, int(answer[1]), unpack(answer[2]) if answer[2] else [])

    def renew(self, lease: Lease) -> Literal["ok", "lost", "cancelled"]:
        """Extend a lease. 'lost' if another worker has the chunk; 'cancelled' if the job was cancelled."""
        answer: Literal["ok", "lost", "cancelled"] = self._script(
            "renew", lease.job, lease.number, lease.token, self._lease_ms
        ).decode()
        return answer

    def recorded(self, job: str, indexes: Sequence[int]) -> set[int]:
        """Those of `indexes` that already have a result."""
        return {
            index for index, result in zip(indexes, self._fields(job, "results", indexes), strict=True) if result is not None
        }

    def record(self, job: str, result: ItemResult) -> bool:
        """Record a result; False, and no change, if the image already has one."""
        return bool(self._script("record", job, result.index, result.state, compact(result)))

    def complete(self, lease: Lease, *, manifest: str | None = None) -> Literal["ok", "lost", "finishing"]:
        """End the lease of a finished chunk; 'finishing' if it was the job's last and the manifest is due.

        `manifest` is the manifest's URL, given with the chunk MANIFEST.
        """
        answer: Literal["ok", "lost", "finishing"] = self._script(
            "complete", lease.job, lease.number, lease.token, manifest or ""
        ).decode()
        return answer

    def release(self, lease: Lease) -> bool:
        """Give back an unfinished chunk without counting it as lost; the caller publishes it again."""
        return bool(self._script("release", lease.job, lease.number, lease.token))

    def count_attempt(self, job: str, index: int) -> int:
        """Count an attempt to process an image alone, before it starts; returns the count."""
        with self._redis.pipeline() as pipe:
            pipe.hincrby(key(job, "attempts"), str(index), 1)
            pipe.expire(key(job, "attempts"), self._ttl)
            return int(pipe.execute()[0])

    def forget_attempt(self, job: str, index: int) -> None:
        """Uncount an attempt whose worker was asked to stop before the image could do harm."""
        self._redis.hincrby(key(job, "attempts"), str(index), -1)

    def attempts(self, job: str, indexes: Sequence[int]) -> dict[int, int]:
        """How often each image was tried alone."""
        return {index: int(count or 0) for index, count in zip(indexes, self._fields(job, "attempts", indexes), strict=True)}

    def reap(self, node: str, *, patience: float = 30.0, every: float = 5.0) -> list[Chunk]:
        """Overdue chunks, which must be published again; none while another node is the reaper.

        A chunk may be missing from an idle queue for `patience` seconds. A node stays the reaper for 0.9 * `every` seconds.
        """
        if not self._redis.set("imagemill:reaper", node, nx=True, px=int(every * 900)):
            return []
        chunks = []
        for member in self._script("reap", int(patience * 1000), 1000):
            job, _, number = member.decode().rpartition(":")
            chunks.append(self.chunk(job, int(number)))
        return chunks

    def chunk(self, job: str, number: int) -> Chunk:
        """The message for a chunk."""
        raw = self._redis.hget(key(job, "chunks"), str(number)) if number != MANIFEST else None
        return Chunk(job=job, number=number, images=sum(i.duplicate_of is None for i in unpack(raw)) if raw else 0)
