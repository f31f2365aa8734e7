"""The ledger as workers use it: take shares, record results, give back what was not begun."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Literal, NamedTuple, cast

from imagemill.shared.dead import put_aside, reason_of
from imagemill.shared.fleet import NODE_SECONDS
from imagemill.shared.ledger.ranges import as_ranges, as_text, indexes_in
from imagemill.shared.ledger.reading import ReadLedger
from imagemill.shared.ledger.scripts import PACK, NewerVersion, key, unpack
from imagemill.shared.messages import LANE, Item, ItemResult, compact

Verdict = Literal["ok", "yield", "stop", "lost"]

WAIT_SECONDS = 30
"""How long the reason why a job waits is shown."""
MOST_DAMAGED = 20
"""Most damaged jobs that one call ends."""
EMPTY_SHARES = 100
"""Most shares without an image that one call skips."""


@dataclass(frozen=True)
class Request:
    """What a child asks of the ledger. `child` names this process; of its `lanes`, those with `room` are wanted now.

    `room` is how many more images it wants, `rate` how many images per second it computes, both by lane; `held` is how many
    images it holds, by job. Only if it holds none (`empty`) can it get images whose worker died.
    """

    child: str
    lanes: Sequence[str]
    room: Mapping[str, int]
    rate: Mapping[str, float] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)
    empty: bool = True
    avoid: Sequence[str] = ()
    """Jobs that it can't work on at the moment."""
    drains: bool = True
    """Whether it will soon hold no images if it takes none."""
    siblings: int = 1
    """How many children share its device, this one included."""


@dataclass(frozen=True)
class Share:
    """Images that this child may work on while it renews the lease. `items` leaves out duplicates and what is recorded already.

    `deaths` is how many processes have died with these images in them; one that died with its node counts half. If there are
    any, nothing else may run alongside. `rank` is that of its priority, 1 for high to 3 for low; it is `fresh` if nothing
    else of its owner was running.
    """

    job: str
    number: int
    indexes: frozenset[int]
    items: list[Item]
    deaths: float = 0
    rank: int = 2
    fresh: bool = False
    newer: bool = False
    """Whether some of its rows are of a newer version; then it has no items."""


@dataclass(frozen=True)
class ManifestDue:
    """A manifest that this child should write; `number` is that of its lease. A retry of the job is another `run`.

    It was first handed out `seconds` ago. `stop` is set once the lease is lost.
    """

    job: str
    number: int
    run: int | None = field(default=None, compare=False)
    seconds: float = field(default=0.0, compare=False)
    stop: Event = field(default_factory=Event, compare=False, repr=False)


@dataclass(frozen=True)
class Renewal:
    """The answer to a renewal: the job whose turn it is, with its lane, and a verdict for each lease.

    ok; yield: give back what is not fetched yet, for the sake of `urgent`; stop: begin nothing more of this job; lost.
    """

    urgent: str | None
    lane: str
    verdicts: list[Verdict]


@dataclass(frozen=True)
class Record:
    """A result on its way into the ledger. Making one raises ValueError if it contains text that is not valid UTF-8."""

    job: str
    index: int
    state: str
    text: str

    @classmethod
    def of(cls, job: str, result: ItemResult) -> Record:
        """The record of an image of a job."""
        return cls(job, result.index, result.state, compact(result))


class Recorded(NamedTuple):
    """The answer to a record: whether it is the `first` of its image, in a job that is not over.

    `stop`: nothing more of the job should be begun; it is cancelled, paused or past its deadline.
    """

    first: bool
    stop: bool


class WorkLedger(ReadLedger):
    """Hands out shares and records results."""

    scripts = (*ReadLedger.scripts, "take", "renew", "record", "give_back", "end_job", "tend", "bury")

    def take(self, request: Request) -> Share | ManifestDue | Literal["none", "drain"]:
        """The next share for this child: of the job whose turn it is, as many images as it has room for, within its part.

        'none' if there is nothing for it; 'drain' if it should come back once it holds no images.
        """
        for _ in range(EMPTY_SHARES):
            answer = self._take(request)
            if not isinstance(answer, Share) or answer.items or answer.newer:
                return answer
            self.give_back(answer, request.child)  # only duplicates, or images that are recorded already
        return "none"

    def _take(self, request: Request) -> Share | ManifestDue | Literal["none", "drain"]:
        for _ in range(MOST_DAMAGED):
            answer = self._script("take", self._asked(request), PACK)
            if answer[0] != b"damaged":
                return self._answer(answer)
            job, reason = answer[1].decode(errors="replace"), answer[2].decode(errors="replace")
            if not self._repair().run([job]):
                self._repair().condemn(job, f"its record can't be used: {reason}"[:300])
        return "none"

    def _asked(self, request: Request) -> str:
        lanes = [lane for lane in request.lanes if request.room.get(lane, 0) > 0]
        return json.dumps({**vars(request), "lanes": lanes, "lease": self._lease_ms, "avoid": list(request.avoid)})

    def _answer(self, answer: list[Any]) -> Share | ManifestDue | Literal["none", "drain"]:
        kind = answer[0].decode()
        if kind == "manifest":
            return ManifestDue(answer[1].decode(), int(answer[2]), int(answer[3]), int(answer[4]) / 1000)
        if kind != "share":
            return cast(Literal["none", "drain"], kind)
        job, number, deaths, rank, fresh, ranges, recorded, *packs = answer[1:]
        leased = indexes_in(ranges.decode())
        wanted = leased - indexes_in(recorded.decode())
        numbered = zip(packs[::2], packs[1::2], strict=True)
        items, newer = [], False
        try:
            items = [item for pack, raw in numbered for item in self._items(job.decode(), int(pack), raw, wanted)]
        except NewerVersion:
            newer = True
        fields = job.decode(), int(number), frozenset(leased), items, float(deaths), int(rank), bool(fresh), newer
        return Share(*fields)

    def _items(self, job: str, number: int, raw: bytes, wanted: set[int]) -> list[Item]:
        """The items of a pack. One that can't be read is set aside; its images fail when the job's others are done."""
        try:
            return [item for item in unpack(raw, wanted) if item.duplicate_of is None] if raw else []
        except NewerVersion:
            raise
        except ValueError as error:
            self._redis.hset(key(job), "damaged", f"some of its images can't be read: {error}"[:300])
            if self._lua["take_out"](args=[key(job, "packs"), "hash", number, raw]) is not None:
                put_aside(self._redis, f"{key(job, 'packs')} {number}", reason_of(error), raw, seconds=self._ttl)
            return []

    def renew(
        self, child: str, lanes: Sequence[str], leases: Sequence[Share | ManifestDue], avoid: Sequence[str] = ()
    ) -> Renewal:
        """Extend leases, and learn what has changed. It is never the turn of jobs to `avoid`: it can't work on them."""
        named = [part for lease in leases for part in (lease.job, _named(lease))]
        asked = json.dumps({"lanes": list(lanes), "avoid": list(avoid)})
        urgent, lane, *verdicts = self._script("renew", child, self._lease_ms, asked, *named)
        return Renewal(urgent.decode() or None, lane.decode(), [verdict.decode() for verdict in verdicts])

    def give_back(self, share: Share, child: str, *, kept: Sequence[int] = (), returned: Sequence[int] = ()) -> bool:
        """Return images of a share; without `kept` images the share ends. False if it was lost.

        Those without a result are handed out again.
        """
        parts = (as_text(as_ranges(kept)), len(set(kept)), as_text(as_ranges(returned)))
        return bool(self._script("give_back", share.job, share.number, child, *parts, job=share.job))

    def record(self, job: str, result: ItemResult, stop: Event | None = None) -> bool:
        """Record one result; False, and no change, if the image already has one or the job is over. May set `stop`."""
        [answer] = self.record_all([Record.of(job, result)])
        if answer.stop and stop is not None:
            stop.set()
        return answer.first

    def record_all(self, records: Sequence[Record]) -> list[Recorded]:
        """Record results, of any jobs, in one round trip; an answer for each."""
        jobs: dict[str, list[Record]] = {}
        for record in records:
            jobs.setdefault(record.job, []).append(record)
        answers = dict(zip(jobs, self._record(jobs) if jobs else [], strict=True))
        for job, answer in answers.items():
            if not answer:  # it is damaged
                [answers[job]] = self._record({job: jobs[job]})
        first = {job: iter(digits) for job, (digits, _) in answers.items()}
        return [Recorded(next(first[record.job]) == ord("1"), bool(answers[record.job][1])) for record in records]

    def _record(self, jobs: Mapping[str, Sequence[Record]]) -> list[tuple[bytes, int]]:
        args: list[Any] = []
        for job, records in jobs.items():
            args += job, len(records)
            for record in records:
                args += record.index, record.state, record.text
        answers: list[tuple[bytes, int]] = self._script("record", *args, job=next(iter(jobs)) if len(jobs) == 1 else None)
        return answers

    def end_job(self, job: str, manifest: str | None, run: int | None = None) -> bool:
        """The manifest is written, or never will be (None); False if a retry has begun meanwhile."""
        return bool(self._script("end_job", job, manifest or "", "" if run is None else run, job=job))

    def report_wait(self, job: str, reason: str) -> None:
        """Report why images of a job wait on some worker; forgotten unless it is repeated."""
        self._redis.set(key(job, "wait"), reason, ex=WAIT_SECONDS)

    def end_wait(self, job: str) -> None:
        """What has been reported is no longer so."""
        self._redis.delete(key(job, "wait"))

    def report_rate(self, lane: str, child: str, images_per_second: float) -> None:
        """Report how many images per second a child computes; forgotten with its node. `child` is NODE/NUMBER."""
        self._redis.hset(f"imagemill:rates:{lane}", child, f"{images_per_second:.4g}")

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Replace the weights of owners; all others have 1."""
        with self._redis.pipeline() as pipe:
            pipe.delete("imagemill:weights")
            if weights:
                pipe.hset("imagemill:weights", mapping=dict(weights))
            pipe.execute()

    def tend(self) -> tuple[list[str], dict[str, int]]:
        """What some node must do every second.

        Returns the job of each share of a dead worker, and for each lane that needs wake-ups its number of children.
        """
        count, *answer = self._script("tend", NODE_SECONDS, self._lease_ms)
        lost, lanes = answer[: int(count)], answer[int(count) :]
        counts = {lane.decode(errors="replace"): int(children) for lane, children in zip(lanes[::2], lanes[1::2], strict=True)}
        return _names(lost), {lane: children for lane, children in counts.items() if LANE.fullmatch(lane)}

    def bury(self, child: str) -> list[str]:
        """A child process has died: hand its shares out again at once; returns the job of each."""
        return _names(self._script("bury", child))

    def lead(self, node: str, seconds: float) -> bool:
        """Whether this node is the one that tends the ledger for the next `seconds`."""
        milliseconds = int(seconds * 1000)
        if self._redis.set("imagemill:tender", node, nx=True, px=milliseconds):
            return True
        left = self._redis.pttl("imagemill:tender")
        if left == -1 or left > 60_000:
            self._redis.delete("imagemill:tender")  # not ours, and nobody would lead
        return False


def _names(jobs: Iterable[bytes]) -> list[str]:
    return [job.decode(errors="replace") for job in jobs]


def _named(lease: Share | ManifestDue) -> str:
    return f"{lease.number}" if isinstance(lease, Share) else f"manifest {lease.number}"
