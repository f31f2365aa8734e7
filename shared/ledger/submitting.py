"""The ledger as producers use it: submit, steer, cancel and retry jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import chain, islice
from typing import Any

from imagemill.shared.errors import JobNotFound, NameTaken
from imagemill.shared.ledger.reading import ReadLedger
from imagemill.shared.ledger.scripts import pack, unpack
from imagemill.shared.messages import Item, Job, Priority

SUBMITTING_SECONDS = 3600
"""Seconds after which Redis forgets an unsealed job that nothing is added to, in case its producer died."""
FIELDS_PER_WRITE = 1000
"""Duplicates written in one round trip."""


class SubmitLedger(ReadLedger):
    """Writes jobs."""

    scripts = (*ReadLedger.scripts, "open", "add", "seal", "discard", "cancel", "pause", "prioritize", "retry", "reopen")

    def open_job(self, job: str, spec: Job) -> None:
        """Start a job, or continue one of this name. Workers see none of it until `seal`.

        Raises NameTaken if there is one with other options.
        """
        fields = {
            "spec": spec.model_dump_json(),
            "state": "submitting",
            "lane": spec.lane,
            "priority": spec.policy.priority,
            "owner": spec.policy.owner or f"~{job}",  # no name may start with ~
            "attempts": spec.policy.attempts,
        }
        opened = self._script("open", job, SUBMITTING_SECONDS, *chain.from_iterable(fields.items()))
        if not opened and _fixed(self.spec(job)) != _fixed(spec):
            raise NameTaken(f"there is a job {job} with other options; submit this one under another name")

    def add_packs(self, job: str, packs: Iterable[tuple[int, Sequence[Item]]]) -> None:
        """Write packs, given as (number, items), in one round trip. Pack n holds the items with an index from n * PACK on.

        Raises NameTaken, and writes nothing, if the job has other items in one of them.
        """
        self._add(job, "packs", {number: pack(items) for number, items in packs}, unpack)

    def seal(self, job: str, *, size: int, total: int, duplicates: Mapping[int, int]) -> bool:
        """Mark the job as complete; from now on its images are handed out. False if it was sealed before, with the same list.

        `size` is the highest index + 1; `total` counts rows, duplicates included; `duplicates` maps an item's index to how
        many later rows share its result. Raises NameTaken if the job has a different list.
        """
        left = iter(duplicates.items())
        while some := dict(islice(left, FIELDS_PER_WRITE)):
            self._add(job, "duplicates", some, int)
        policy = self.spec(job).policy
        times = _ms(policy.not_before), _ms(policy.until), self._rise_ms
        answer = self._script("seal", job, size, total, sum(duplicates.values()), self._ttl, *times).decode()
        if answer == "gone":
            raise _forgotten(job)
        if answer == "other":
            raise _other_list(job)
        return bool(answer == "sealed")

    def discard(self, job: str) -> bool:
        """Delete a job unless it is sealed; returns whether it did."""
        return bool(self._script("discard", job))

    def cancel(self, job: str) -> bool:
        """Hand out nothing more of a job; it is over as soon as nothing of it runs. False if there is nothing to cancel."""
        self.spec(job)
        return bool(self._script("cancel", job))

    def pause(self, job: str) -> bool:
        """Hand out nothing of a job until `resume`. False if it is over."""
        self.spec(job)
        return bool(self._script("pause", job, 1))

    def resume(self, job: str) -> bool:
        """End a pause. False if the job is over."""
        self.spec(job)
        return bool(self._script("pause", job, 0))

    def prioritize(self, job: str, priority: Priority) -> bool:
        """Move a job to another priority. False if it is over."""
        self.spec(job)
        return bool(self._script("prioritize", job, priority, self._rise_ms))

    def retry(self, job: str) -> int:
        """Forget the failures of an ended job and put it back in line; returns the number of images to redo."""
        if not self.status(job).over:
            return 0
        for items in self._lists(job):
            own = [item.index for item in items if item.duplicate_of is None]
            results = zip(own, self._results(job, own), strict=True)
            failed = [index for index, result in results if result is not None and result.state == "failed"]
            if failed:
                self._script("retry", job, *failed)
        return int(self._script("reopen", job, self._rise_ms))

    def _add(self, job: str, part: str, fields: Mapping[int, Any], read: Callable[[bytes], Any]) -> None:
        """Add fields to a part of an unsealed job; those that it has must be equal once they are `read`."""
        fields = dict(fields)
        while fields:
            written = chain.from_iterable(fields.items())
            answer = self._script("add", job, part, SUBMITTING_SECONDS, *written)
            if answer is None:
                raise _forgotten(job)
            if not answer:
                return
            for name, value in zip(map(int, answer[::2]), answer[1::2], strict=True):
                if not value or read(value) != read(_bytes(fields.pop(name))):  # another zlib may compress differently
                    raise _other_list(job)


def _bytes(value: bytes | int) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _fixed(spec: Job) -> Any:
    """What the same command repeats: not the times, which may be given from now."""
    times = spec.policy.not_before is None, spec.policy.until is None
    return times, spec.model_dump(exclude={"policy": {"not_before", "until"}})


def _other_list(job: str) -> NameTaken:
    return NameTaken(f"there is a job {job} with another list; submit this one under another name")


def _forgotten(job: str) -> JobNotFound:
    return JobNotFound(
        f"job {job} was forgotten while it was submitted, after {SUBMITTING_SECONDS} s of silence; submit it again"
    )


def _ms(time: datetime | None) -> int:
    return int(time.timestamp() * 1000) if time else 0
