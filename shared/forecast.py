"""When waiting jobs will get their turn: the ledger's order, played forward as if images were a fluid.

Higher priorities first; within a priority, owners side by side in proportion to their weights; within an owner, jobs in the
order of submission. All results are in images that the lane hands out from now on; divided by its images per second, they
are seconds. Nothing that happens later is foreseen: new jobs, pauses, deadlines, nodes that come and go, and the work of the
same nodes in other lanes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from imagemill.shared.messages import PRIORITIES, Priority


@dataclass(frozen=True)
class Waiting:
    """A job in line, with the images that are still to be handed out."""

    job: str
    owner: str
    weight: float
    priority: Priority
    images: int


@dataclass(frozen=True)
class Turn:
    """What a lane hands out before a job: `position` jobs begin earlier, after `begins` images. All is out after `ends`."""

    position: int
    begins: float
    ends: float


def plan(jobs: Sequence[Waiting]) -> dict[str, Turn]:
    """The turn of each job of a lane. Those of an owner come in the order of submission; ties keep the given order."""
    spans: dict[str, tuple[float, float]] = {}
    before = 0.0
    for priority in PRIORITIES:
        mine = [job for job in jobs if job.priority == priority]
        spans |= {job: (before + begins, before + ends) for job, (begins, ends) in _side_by_side(mine).items()}
        before += sum(job.images for job in mine)
    rank = {job.job: PRIORITIES.index(job.priority) for job in jobs}
    order = sorted(spans, key=lambda job: (rank[job], spans[job][0]))  # stable
    return {job: Turn(position, *spans[job]) for position, job in enumerate(order)}


def _side_by_side(jobs: Iterable[Waiting]) -> dict[str, tuple[float, float]]:
    """Begin and end of jobs of one priority, in images of all owners.

    By virtual time v, an owner has been given weight * v images, or all there are.
    """
    queues: dict[str, list[Waiting]] = defaultdict(list)
    for job in jobs:
        queues[job.owner].append(job)
    totals = sorted((sum(job.images for job in queue) / queue[0].weight, queue[0].weight) for queue in queues.values())
    served = [0.0, *accumulate(time * weight for time, weight in totals)]  # images of the first n owners to be through
    weights = [*accumulate((weight for _, weight in reversed(totals)), initial=0.0)][::-1]  # of the others

    def handed_out(time: float) -> float:
        through = bisect_left(totals, (time,))
        return served[through] + time * weights[through]

    spans: dict[str, tuple[float, float]] = {}
    for queue in queues.values():
        times = [images / queue[0].weight for images in accumulate((job.images for job in queue), initial=0)]
        for job, begins, ends in zip(queue, times, times[1:], strict=False):
            spans[job.job] = handed_out(begins), handed_out(ends)
    return {job.job: spans[job.job] for job in jobs}
