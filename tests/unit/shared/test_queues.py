"""Queues: their names, which node reads which, and in which order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared.engines import engines_of
from imagemill.shared.messages import PRIORITIES
from imagemill.shared.options.base import OPERATIONS
from imagemill.shared.queues import (
    CANARY_TASK,
    MANIFEST_TASK,
    PriorityRoundRobin,
    manifest_queue,
    node_queue,
    offered,
    queue_name,
    rank,
    task_name,
    worker_queues,
)

ALL = [
    queue_name(operation, engine, priority)
    for operation in OPERATIONS
    for engine in engines_of(operation)
    for priority in PRIORITIES
]


def test_names_of_queues_and_tasks() -> None:
    assert queue_name("stylize", "opencv") == queue_name("stylize", "opencv", "normal") == "imagemill.stylize.opencv"
    assert queue_name("inpaint", "lama", "high") == manifest_queue("inpaint", "lama") == "imagemill.inpaint.lama.high"
    assert queue_name("inpaint", "lama", "low") == "imagemill.inpaint.lama.low"
    assert task_name("remove-background") == "imagemill.remove-background"
    assert node_queue("gpu3@host") == "imagemill.node.gpu3@host"


def test_names_are_unique() -> None:
    assert len(set(ALL)) == len(ALL)
    names = [CANARY_TASK, MANIFEST_TASK, *map(task_name, OPERATIONS)]
    assert len(set(names)) == len(names)
    assert not set(names) & set(ALL)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_rank_depends_on_the_priority_only(operation: str) -> None:
    for engine in (*engines_of(operation), "high-res", "low-memory"):
        ranks = [rank(queue_name(operation, engine, priority)) for priority in PRIORITIES]  # type: ignore[arg-type]
        assert ranks == [0, 1, 2]


def test_offered_contains_only_valid_pairs() -> None:
    assert offered(("stylize", "inpaint"), ["opencv"]) == [("stylize", "opencv"), ("inpaint", "opencv")]
    assert offered(OPERATIONS, ["none-such"]) == []
    assert offered((), ["opencv"]) == []


def test_worker_queues_contain_every_queue_by_priority() -> None:
    engines = sorted({engine for operation in OPERATIONS for engine in engines_of(operation)})
    queues = worker_queues(OPERATIONS, engines)
    assert set(queues) == set(ALL)
    assert all(manifest_queue(operation, engine) in queues for operation, engine in offered(OPERATIONS, engines))
    assert [rank(queue) for queue in queues] == sorted(map(rank, queues))


# --- the order in which a node reads its queues --------------------------------------------

QUEUES = st.lists(st.sampled_from(ALL), unique=True)


def take(cycle: PriorityRoundRobin, filled: set[str]) -> str | None:
    """Act as a consumer: take from the first queue that has a message, and return its name."""
    for queue in cycle.consume(len(ALL)):
        if queue in filled:
            return cycle.rotate(queue)
    return None


@given(QUEUES, st.lists(st.sets(st.sampled_from(ALL))))
def test_higher_priority_comes_first(queues: list[str], situations: list[set[str]]) -> None:
    cycle = PriorityRoundRobin(queues)
    for filled in situations:
        urgent = min(map(rank, filled & set(queues)), default=None)
        taken = take(cycle, filled)
        assert (None if taken is None else rank(taken)) == urgent


@given(QUEUES, st.lists(st.sampled_from(ALL)), st.sets(st.sampled_from(ALL), min_size=1))
def test_queues_of_equal_priority_take_turns(queues: list[str], before: list[str], filled: set[str]) -> None:
    cycle = PriorityRoundRobin(queues)
    for queue in before:
        cycle.rotate(queue)
    served = filled & set(queues)
    equals = [queue for queue in served if rank(queue) == min(map(rank, served))]
    turns = Counter(take(cycle, filled) for _ in range(3 * len(equals)))
    assert turns == dict.fromkeys(equals, 3)


@given(QUEUES, QUEUES)
def test_update_replaces_the_queues(first: list[str], second: list[str]) -> None:
    cycle = PriorityRoundRobin(first)
    cycle.update(second)
    assert sorted(cycle.consume(len(ALL))) == sorted(second)
    assert cycle.consume(2) == cycle.consume(len(ALL))[:2]
    assert cycle.rotate("not among them") == "not among them"
    assert PriorityRoundRobin().consume(1) == []
