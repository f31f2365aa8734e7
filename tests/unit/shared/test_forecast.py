"""The forecast of turns, against a simulation that hands out one image at a time."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared.forecast import Waiting, plan
from imagemill.shared.messages import PRIORITIES, Priority

WEIGHTS = {"ann": 1.0, "bob": 2.0, "cy": 0.5}


@st.composite
def lineups(draw: st.DrawFn) -> list[Waiting]:
    """Up to eight jobs of three owners, in all priorities."""
    fields = st.tuples(st.sampled_from(sorted(WEIGHTS)), st.sampled_from(PRIORITIES), st.integers(0, 60))
    drawn = draw(st.lists(fields, max_size=8))
    return [Waiting(f"job{n}", owner, WEIGHTS[owner], level, images) for n, (owner, level, images) in enumerate(drawn)]


def simulated(jobs: list[Waiting]) -> dict[str, int]:
    """How many images are handed out until each job's last is, if the owner with the lowest clock gets one at a time."""
    left, clocks = {job.job: job.images for job in jobs}, defaultdict[tuple[Priority, str], float](float)
    ends = {job.job: 0 for job in jobs if not job.images}
    for handed_out in range(1, sum(left.values()) + 1):
        open_jobs = [job for job in jobs if left[job.job]]
        level = min((job.priority for job in open_jobs), key=PRIORITIES.index)
        rivals = [job for job in open_jobs if job.priority == level]
        job = min(rivals, key=lambda job: clocks[level, job.owner])  # the first of an owner's jobs comes first
        clocks[level, job.owner] += 1 / job.weight
        left[job.job] -= 1
        if not left[job.job]:
            ends[job.job] = handed_out
    return ends


@given(lineups())
def test_plan_agrees_with_a_simulation_of_single_images(jobs: list[Waiting]) -> None:
    ends, turns = simulated(jobs), plan(jobs)
    slack = 2 * sum(WEIGHTS.values()) / min(WEIGHTS.values())  # images that an owner may be early or late
    for job in jobs:
        if job.images:
            assert turns[job.job].ends == pytest.approx(ends[job.job], abs=slack)


@given(lineups())
def test_lane_hands_out_every_image_and_never_rests(jobs: list[Waiting]) -> None:
    turns = plan(jobs)
    assert turns.keys() == {job.job for job in jobs}
    assert max((turn.ends for turn in turns.values()), default=0) == pytest.approx(sum(job.images for job in jobs))
    assert sorted(turn.position for turn in turns.values()) == list(range(len(jobs)))
    for job in jobs:
        span = turns[job.job].ends - turns[job.job].begins
        assert span >= job.images - 1e-6, "no job is faster than with the lane to itself"


@given(lineups())
def test_owner_s_jobs_follow_each_other_and_priorities_do_not_mix(jobs: list[Waiting]) -> None:
    turns = plan(jobs)
    for place, job in enumerate(jobs):
        mine = [other for other in jobs[:place] if (other.owner, other.priority) == (job.owner, job.priority)]
        if mine:
            assert turns[job.job].begins == pytest.approx(turns[mine[-1].job].ends)
            assert turns[job.job].position > turns[mine[-1].job].position
        higher = sum(other.images for other in jobs if PRIORITIES.index(other.priority) < PRIORITIES.index(job.priority))
        assert turns[job.job].begins >= higher - 1e-6


@given(lineups(), st.integers(1, 60))
def test_later_job_of_lower_priority_changes_nothing(jobs: list[Waiting], images: int) -> None:
    before = [job for job in jobs if job.priority != "low"]
    assert plan([*before, Waiting("late", "dee", 1.0, "low", images)]).items() >= plan(before).items()


def test_owners_share_by_weight() -> None:
    jobs = [Waiting("a", "ann", 1, "normal", 100), Waiting("b", "bob", 3, "normal", 150), Waiting("c", "bob", 3, "normal", 150)]
    turns = plan(jobs)
    assert [(turns[job].begins, turns[job].ends) for job in "abc"] == [(0, 400), (0, 200), (200, 400)]
    assert [turns[job].position for job in "abc"] == [0, 1, 2]
