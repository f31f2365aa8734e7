"""The ledger as everyone reads it: a job's spec, status, rows and results as they arrive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from imagemill.shared.connection import longest_wait, reachable
from imagemill.shared.errors import JobNotFound
from imagemill.shared.ledger.scripts import PACK, Scripts, key, unpack
from imagemill.shared.messages import ENDED, Item, ItemResult, Job, JobState, JobStatus, Row, Unfinished, row


class ReadLedger(Scripts):
    """Reads jobs."""

    def spec(self, job: str) -> Job:
        """The job's spec as submitted."""
        raw = self._redis.hget(key(job), "spec")
        if raw is None:
            raise _not_found(job)
        return Job.model_validate_json(raw)

    def status(self, job: str) -> JobStatus:
        """The job's state and counts."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(key(job))
            pipe.time()
            raw, (seconds, micros) = pipe.execute()
        if b"spec" not in raw:
            raise _not_found(job)
        fields = {name.decode(): value for name, value in raw.items()}
        spec = Job.model_validate_json(fields["spec"])
        created = int(fields["created"]) / 1000
        ended = int(fields["ended"]) / 1000 if "ended" in fields else None
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
            priority=fields["priority"].decode(),
            owner=spec.policy.owner,
            not_before=float(fields["later"]) / 1000 if "later" in fields else None,
            until=float(fields["until"]) / 1000 if "until" in fields else None,
            output=spec.output.url,
            manifest=fields["manifest"].decode() if "manifest" in fields else None,
            created=created,
            ended=ended,
            seconds=round((ended or seconds + micros / 1e6) - created, 3),
        )

    def jobs(self, most: int = 50) -> list[JobStatus]:
        """The latest `most` jobs, newest first."""
        jobs = []
        for raw in self._redis.zrevrange("imagemill:jobs", 0, most - 1):
            try:
                jobs.append(self.status(raw.decode()))
            except JobNotFound:
                self._redis.zrem("imagemill:jobs", raw)
        return jobs

    def rows(self, job: str) -> Iterator[Row]:
        """Every row of a job with its result, in list order; read pack by pack."""
        # Once the manifest is being written, items without a result will not get one.
        state, expired = self.status(job).state, self._redis.hexists(key(job), "lapsed")
        unfinished: Unfinished = "pending" if state not in (*ENDED, "finishing") else "expired" if expired else "cancelled"
        for _, items in self._packs(job):
            with reachable():
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
        return [ItemResult.model_validate_json(value) if value is not None else None for value in raw]

    def _fields(self, job: str, part: str, indexes: Sequence[int]) -> list[bytes | None]:
        return self._redis.hmget(key(job, part), list(map(str, indexes))) if indexes else []

    def _packs(self, job: str) -> Iterator[tuple[int, list[Item]]]:
        with reachable():
            size = int(self._redis.hget(key(job), "size") or 0)
        for number in range(-(-size // PACK)):
            with reachable():  # around the read alone: the generator's caller may raise at the yield
                raw = self._redis.hget(key(job, "packs"), str(number))
            if raw is not None:
                yield number, unpack(raw)


def _state(fields: dict[str, bytes]) -> JobState:
    """The state as users see it: a paused job whose last images are still running is paused."""
    state = cast(JobState, fields["state"].decode())
    return "paused" if "paused" in fields and state in ("queued", "running") else state


def _not_found(job: str) -> JobNotFound:
    return JobNotFound(f"job {job} not found; it may have expired")
