"""The ledger checked against a model: a few jobs and children, and everything that can happen to them, in any order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import ManifestDue, Record, Request, Share
from imagemill.shared.messages import PRIORITIES, ItemResult, Node, Priority
from tests.ledgers import Ledger
from tests.unit.shared.ledger.contents import contents, everything
from tests.unit.shared.ledger.jobs import LANE, OTHER_LANE, hours, make_job, nothing_left, ring
from tests.unit.shared.ledger.model import Group, ModelJob, SharedOut

pytestmark = pytest.mark.integration

LANES = (LANE, OTHER_LANE)
RATES = {0: 1.0, 1: 4.0}
"""Images per second of two children; the third has not computed any yet."""
CHILDREN = st.integers(0, 2)
JOBS = st.fixed_dictionaries(
    {
        "size": st.integers(1, 6) | st.integers(1, 40),
        "gaps": st.sets(st.integers(0, 39), max_size=6),
        "copied": st.lists(st.integers(0, 39), max_size=5),
        "priority": st.sampled_from(PRIORITIES),
        "owner": st.sampled_from(["ann", "ann", "bob", None]),
        "lane": st.sampled_from([LANE, LANE, OTHER_LANE]),
        "attempts": st.sampled_from([3, 3, 3, 1, 2, 4, 5]),
        "times": st.sampled_from(["", "", "begin", "end", "begin end"]),
    }
)
PLACES = st.sampled_from(range(100))
"""Chooses one of what there is."""
ACTIONS = ("take", "take", "take", "work", "go on", "go on", "fail", "fail", "steer", "steer", "steer", "submit")


def name(child: int) -> str:
    return f"cpu@{child}/1"


class Ledgers(RuleBasedStateMachine):
    """Children take, record, give back and die; users submit, steer, cancel and retry; a node tends."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(self.url)
        self.raw: Any = redis.Redis.from_url(self.url, decode_responses=True)
        self.jobs: list[ModelJob] = []
        self.looked_at: dict[str, str] = {}
        self.submitted = 0

    @initialize(jobs=st.lists(JOBS, min_size=2, max_size=4), later=st.lists(JOBS, max_size=3))
    def start(self, jobs: list[dict[str, Any]], later: list[dict[str, Any]]) -> None:
        self.raw.flushall()
        fleet = Fleet(self.url)
        for child in range(3):
            node = name(child).partition("/")[0]
            fleet.report_node(Node(node=node, host="a", pid=1, device="cpu", lanes=LANES, children=1, ready=True))
        fleet.close()
        for child, rate in RATES.items():
            for lane in LANES:
                self.ledger.report_rate(lane, name(child), rate)
        for job in jobs:
            self.submit(**job)
        self.later = later

    @rule(
        action=st.sampled_from(ACTIONS),
        child=CHILDREN,
        place=PLACES,
        count=st.integers(1, 24),
        choice=PLACES,
        failing=st.booleans(),
    )
    def step(self, action: str, child: int, place: int, count: int, choice: int, failing: bool) -> None:
        """One rule for everything, since hypothesis leaves out most rules in most examples."""
        if action == "take":
            self.take(child, count, (LANES, LANES[::-1], LANES[:1])[choice % 3])
        elif action == "work":
            self.work(child, 1 + place % 9, failing, kept=choice % 3 == 0)
        elif action == "go on":
            self.go_on(child, place, count, choice % 6, failing)
        elif action == "fail":
            self.fail(child, place, choice % 5, failing)
        elif action == "steer":
            self.steer(place, choice % 11)
        elif self.later:
            self.submit(**self.later.pop())

    # --- users -----------------------------------------------------------------------------------

    def submit(
        self,
        size: int,
        gaps: set[int],
        copied: list[int],
        priority: Priority,
        owner: str | None,
        lane: str,
        attempts: int,
        times: str,
    ) -> None:
        images = set(range(size)) - gaps
        if not images:
            return
        duplicates = [index for index in copied if index in images]
        later, until = "begin" in times, "end" in times
        job = make_job(
            self.ledger, size, gaps=gaps, duplicates=duplicates, lane=lane, priority=priority, owner=owner, attempts=attempts,
            not_before=hours(1) if later else None, until=hours(2) if until else None,
        )  # fmt: skip
        self.submitted += 1
        self.jobs.append(
            ModelJob(job, lane, owner, priority, self.submitted, images, Counter(duplicates), later, until, attempts)
        )

    def steer(self, place: int, choice: int) -> None:
        """A user changes a job, or a time comes."""
        if choice < 2:
            self.retry(place)
        elif choice < 4:
            self.pause_or_resume(place, pause=choice == 2)
        elif choice < 7:
            self.prioritize(place, PRIORITIES[choice - 4])
        elif choice < 10:
            self.time_passes(place, ("begin", "end", "rise")[choice - 7])
        else:
            self.cancel(place)

    def pick(self, place: int) -> ModelJob | None:
        return self.jobs[place % len(self.jobs)] if self.jobs else None

    def cancel(self, place: int) -> None:
        if not (job := self.pick(place)):
            return
        possible = job.active and not job.cancelled
        assert self.ledger.cancel(job.id) == possible
        if possible:
            job.cancelled, job.paused, job.later, job.until, job.rises = True, False, False, False, False
            job.finish_if_over()

    def pause_or_resume(self, place: int, pause: bool) -> None:
        if not (job := self.pick(place)):
            return
        possible = job.active and not job.cancelled and not job.expired
        assert (self.ledger.pause(job.id) if pause else self.ledger.resume(job.id)) == possible
        if possible:
            job.paused = pause

    def prioritize(self, place: int, priority: Priority) -> None:
        if not (job := self.pick(place)):
            return
        possible = job.active and not job.cancelled and not job.expired
        assert self.ledger.prioritize(job.id, priority) == possible
        if possible:
            job.priority, job.rises = priority, priority == "low"

    def time_passes(self, place: int, what: str) -> None:
        if (job := self.pick(place)) and {"begin": job.later and job.active, "end": job.until, "rise": job.rises}[what]:
            ring(self.raw, what, job.id)
            if what == "begin":
                job.later = False
            elif what == "rise":
                job.rises, job.priority = False, "normal"
            else:
                job.until, job.expired = False, True
                job.finish_if_over()
            self.tend()

    def retry(self, place: int) -> None:
        over = [job for job in self.jobs if job.over]
        if job := over[place % len(over)] if over else self.pick(place):
            self.submitted += 1
            assert self.ledger.retry(job.id) == job.retry(self.submitted)

    # --- children ----------------------------------------------------------------------------------

    def shares_of(self, child: int) -> list[tuple[ModelJob, SharedOut]]:
        return [(job, share) for job in self.jobs for share in job.shares.values() if share.child == child]

    def pick_share(self, place: int) -> tuple[ModelJob, SharedOut] | None:
        shares = [(job, share) for job in self.jobs for share in job.shares.values()]
        return shares[place % len(shares)] if shares else None

    def take(self, child: int, room: int, lanes: tuple[str, ...]) -> str:
        at_hand = self.shares_of(child)
        if any(share.deaths for _, share in at_hand):
            return "none"
        held = Counter({job.id: 0 for job, _ in at_hand})
        for job, share in at_hand:
            held[job.id] += len(share.images)
        rate = dict.fromkeys(lanes, RATES[child]) if child in RATES else {}
        request = Request(name(child), lanes, dict.fromkeys(lanes, room), rate, held, empty=not at_hand)
        answer = self.ledger.take(request)
        offered = [job for job in self.jobs if job.lane in lanes]
        due = [job for job in offered if job.manifest == "due"]
        assert isinstance(answer, ManifestDue) == bool(due)
        if isinstance(answer, ManifestDue):
            next(job for job in due if job.id == answer.job).manifest = "leased"
            return "manifest"
        # What this child must get before anything of a lower priority.
        urgent = [job for job in offered if job.waits and ((job.free and not held[job.id]) or (job.suspects and not at_hand))]
        if isinstance(answer, Share):
            job = next(job for job in offered if job.id == answer.job)
            self.check_share(job, answer, child, room, empty=not at_hand)
            assert all(other.rank >= job.rank for other in urgent)
            line = [other for other in urgent if (other.owner or other.id, other.rank) == (job.owner or job.id, job.rank)]
            assert all(other.order >= job.order for other in line if other.lane == job.lane)
            return "share"
        if answer == "drain":
            assert at_hand
            assert any(job.waits and job.groups for job in offered)
        else:
            assert not urgent
        return answer

    def check_share(self, job: ModelJob, share: Share, child: int, room: int, empty: bool) -> None:
        images = {item.index for item in share.items}
        assert job.waits
        assert images == share.indexes & job.images
        assert len(share.items) == len(images) > 0
        if share.deaths:
            assert empty
            assert not job.free
            assert (share.deaths, share.indexes) == job.next_group()
            assert images <= job.died_alone or share.deaths < max(2, job.attempts), "given up for a neighbour's sake"
        else:
            assert images <= job.free
            assert len(share.indexes) <= room
        job.free -= images
        alone = share.deaths > 0 and len(images) == 1
        job.shares[share.number] = SharedOut(child, share.number, images, set(share.indexes), share.deaths, alone)

    def work(self, child: int, most: int, failing: bool, kept: bool) -> None:
        """A child takes up to `most` shares and records all of their images; perhaps it dies before it gives them back."""
        for _ in range(most):
            if self.take(child, 24, LANES) in ("none", "drain"):
                break
            for job in self.jobs:
                if job.manifest == "leased":
                    self.write_manifest_of(job, None)
                for share in [share for share in job.shares.values() if share.child == child]:
                    self.record_images(job, sorted(share.images), failing)
                    if not kept:
                        self.return_images(job, share)

    def go_on(self, child: int, place: int, count: int, choice: int, failing: bool) -> None:
        """A child goes on with what it has."""
        if choice < 2:
            self.record(place, count, failing)
        elif choice < 4:
            self.give_back(place, keep=count if choice == 3 else 0)
        elif choice == 4:
            self.renew(child)
        else:
            self.write_manifest(place, "s3://results/x/manifest.jsonl" if failing else None)

    def record(self, place: int, count: int, failing: bool) -> None:
        if found := self.pick_share(place):
            job, share = found
            self.record_images(job, sorted(share.images)[:count], failing)

    def record_images(self, job: ModelJob, images: Iterable[int], failing: bool) -> None:
        state: Any = "failed" if failing else "done"
        records = [Record.of(job.id, ItemResult(index=index, state=state)) for index in images]
        answers = self.ledger.record_all(records)
        assert [answer.first for answer in answers] == [job.record(record.index, state) for record in records]

    def give_back(self, place: int, keep: int) -> None:
        """A child gives back what it has not begun, and keeps a few images."""
        if found := self.pick_share(place):
            self.return_images(*found, keep)

    def return_images(self, job: ModelJob, share: SharedOut, keep: int = 0) -> None:
        left = sorted(share.images - set(job.results))
        kept, returned = left[:keep], left[keep:]
        assert self.ledger.give_back(self.known(job, share), name(share.child), kept=kept, returned=returned)
        if job.active:
            if not share.deaths:
                job.free.update(returned)
            elif returned:
                job.groups.insert(0, Group(share.deaths, set(returned)))
        share.images, share.indexes = set(kept), set(kept)
        if not kept:
            job.end_share(share)

    def known(self, job: ModelJob, share: SharedOut) -> Share:
        """A share as its child knows it."""
        return Share(job.id, share.number, frozenset(share.images), [])

    def renew(self, child: int) -> None:
        mine = self.shares_of(child)
        verdicts = self.ledger.renew(name(child), LANES, [self.known(job, share) for job, share in mine]).verdicts
        for (job, share), verdict in zip(mine, verdicts, strict=True):
            share.silent = False
            stopped = job.cancelled or job.expired or job.paused
            assert verdict == "stop" if stopped else verdict in ("ok", "yield")
            higher = [other for other in self.jobs if other.waits and other.free and other.rank < job.rank]
            assert verdict == "yield" or stopped or not higher

    def write_manifest(self, place: int, url: str | None) -> None:
        """A child has written a manifest; perhaps the job was retried meanwhile."""
        if job := self.pick(place):
            self.write_manifest_of(job, url)

    def write_manifest_of(self, job: ModelJob, url: str | None) -> None:
        assert self.ledger.end_job(job.id, url) == (job.manifest is not None)
        if job.manifest:
            job.end()

    # --- failures ----------------------------------------------------------------------------------

    def fail(self, child: int, place: int, choice: int, failing: bool) -> None:
        if choice == 0:
            self.fall_silent(place)
        elif choice == 1:
            self.fall_silent_with_a_manifest(place)
        elif choice == 2:
            self.die(child)
        elif choice == 3:
            self.wake_up_late(place, place % 4, failing)
        else:
            self.tend()

    def fall_silent(self, place: int) -> None:
        if found := self.pick_share(place):
            job, share = found
            share.silent = True
            self.raw.zadd("imagemill:leased", {f"{job.id}:{share.number}": 1}, xx=True)

    def fall_silent_with_a_manifest(self, place: int) -> None:
        if (job := self.pick(place)) and job.manifest:
            job.manifest = "due"
            self.raw.zadd(f"imagemill:manifests:{job.lane}", {job.id: 1}, xx=True)

    def die(self, child: int) -> None:
        mine = self.shares_of(child)
        assert sorted(self.ledger.bury(name(child))) == sorted(job.id for job, _ in mine)
        for job, share in mine:
            job.bury(share, 1)

    def tend(self) -> None:
        silent = [(job, share) for job in self.jobs for share in job.shares.values() if share.silent]
        self.repair_finds_nothing()
        lost, lanes = self.ledger.tend()
        assert sorted(lost) == sorted(job.id for job, _ in silent)
        for job, share in silent:
            job.bury(share, 0.5)
        for job in self.jobs:
            assert job.lane in lanes or not (job.manifest == "due" or (job.waits and (job.free or job.suspects)))

    def wake_up_late(self, place: int, count: int, failing: bool) -> None:
        """A child that was thought to be dead goes on."""
        lost = [(job, share) for job in self.jobs for share in job.lost]
        if lost:
            job, share = lost[place % len(lost)]
            self.record_images(job, sorted(share.images)[:count], failing)
            known = self.known(job, share)
            assert self.ledger.renew(name(share.child), LANES, [known]).verdicts == ["lost"]
            assert not self.ledger.give_back(known, name(share.child), returned=sorted(share.images))

    # --- invariants ----------------------------------------------------------------------------------

    @invariant()
    def status_matches_the_model(self) -> None:
        for job in self.changed():
            status = self.ledger.status(job.id)
            usual = {"paused"} if job.paused else {"queued", "running"}
            assert status.state in (usual if job.active else {job.state})
            assert (status.done, status.failed) == (job.count("done"), job.count("failed"))
            assert status.total == len(job.images) + sum(job.duplicates.values())
            assert status.priority == job.priority

    def changed(self) -> list[ModelJob]:
        """The jobs that are not, in Redis and in the model, as they were when this was called before."""
        with self.raw.pipeline(transaction=False) as pipe:
            for job in self.jobs:
                pipe.hgetall(f"imagemill:job:{job.id}").hlen(f"imagemill:job:{job.id}:shares")
            stored = iter(pipe.execute())
        before, self.looked_at = self.looked_at, {job.id: f"{next(stored)} {next(stored)} {job}" for job in self.jobs}
        return [job for job in self.jobs if before.get(job.id) != self.looked_at[job.id]]

    @invariant()
    def every_open_image_is_in_one_place(self) -> None:
        named = [(job.id, job.lane, job.priority, job.owner or f"~{job.id}") for job in self.jobs]
        running: Counter[str] = Counter()
        leased = set()
        for job, found in zip(self.jobs, contents(self.raw, named), strict=True):
            places = Counter([*found.free, *found.suspects, *found.shared])
            assert all(places[index] == 1 for index in job.open)
            assert set(found.free) & job.images == job.free
            groups = [(deaths, indexes - found.results) for deaths, indexes in found.groups if indexes & job.open]
            assert groups == job.suspects
            assert found.counted[0] == found.counted[1]
            assert found.results == set(job.results)
            assert found.back[0] == found.back[1]
            assert {number: share["child"] for number, share in found.shares.items()} == {
                number: name(share.child) for number, share in job.shares.items()
            }
            assert found.in_line == (job.waits and bool(found.free or found.suspects))
            assert found.has_turn == found.line
            assert found.manifest == bool(job.manifest)
            running.update({found.owner: sum(share["images"] for share in found.shares.values())})
            leased |= {f"{job.id}:{number}" for number in found.shares}
        assert {owner: int(count) for owner, count in self.raw.hgetall("imagemill:running").items()} == +running
        assert set(self.raw.zrange("imagemill:leased", 0, -1)) == leased

    def repair_finds_nothing(self) -> None:
        before = everything(self.raw)
        assert self.ledger.repair() == 0
        self.ledger.relink()
        assert everything(self.raw) == before

    @invariant()
    def alarms_match_the_model(self) -> None:
        alarms = {f"begin {job.id}" for job in self.jobs if job.later and job.active}
        alarms |= {f"end {job.id}" for job in self.jobs if job.until} | {f"rise {job.id}" for job in self.jobs if job.rises}
        assert set(self.raw.zrange("imagemill:alarms", 0, -1)) == alarms

    def teardown(self) -> None:
        """From any state, one child can finish everything, and then nothing is left."""
        try:
            for place, job in enumerate(self.jobs):
                self.pause_or_resume(place, pause=False)
                self.time_passes(place, "begin")
                for share in list(job.shares.values()):
                    self.return_images(job, share)
                if job.manifest:
                    self.write_manifest_of(job, None)
            while (answer := self.take(0, 24, LANES)) != "none":
                assert answer in ("share", "manifest")
                for job in self.jobs:
                    for share in list(job.shares.values()):
                        self.record_images(job, share.images, failing=False)
                        self.return_images(job, share)
                    if job.manifest:
                        self.write_manifest_of(job, None)
            assert all(job.over for job in self.jobs)
            assert nothing_left(self.raw)
        finally:
            self.ledger.close()
            self.raw.close()


def test_no_image_is_lost_or_counted_twice(redis_server: EmbeddedRedis) -> None:
    machine = type("Machine", (Ledgers,), {"url": redis_server.url})
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine, settings=settings(max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=checks)
    )
