"""Batches: every sample comes out once, in company of its own kind, and a bad one spares its neighbours."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ImageError, InternalError, OperationFailed, OutOfMemory
from tests.fakes import Invert
from worker.batch_size import BatchSizes
from worker.batching import Batcher, Slot, run_batch
from worker.operations.base import Sample

NAMES = st.sampled_from("abcd")


class Grouped(Invert):
    """A sample's data is (group, number)."""

    def group_key(self, sample: Sample) -> Hashable:
        if sample.data[0] == "?":
            raise ValueError("this sample belongs nowhere")
        return sample.data[0]


class Doubling(Invert):
    """Doubles numbers; at most `capacity` fit into memory at a time, and what is in `faults` raises."""

    def __init__(self, capacity: int = 100, faults: dict[int, BaseException] | None = None) -> None:
        self.capacity, self.faults = capacity, faults or {}
        self.calls: list[list[int]] = []

    def group_key(self, sample: Sample) -> Hashable:
        return "numbers"

    def run(self, samples: Sequence[Sample]) -> list[Any]:
        numbers = [sample.data for sample in samples]
        self.calls.append(numbers)
        if len(numbers) > self.capacity:
            raise OutOfMemory("the batch is too large")
        for number in numbers:
            if number in self.faults:
                raise self.faults[number]
        return [2 * number for number in numbers]


def samples(count: int) -> list[Sample]:
    return [Sample(number, None) for number in range(count)]


def group(batch: list[Slot[int]]) -> str:
    (name,) = {slot.sample.data[0] for slot in batch}
    return str(name)


# --- what shares a batch ---


@given(st.lists(st.lists(NAMES, max_size=6) | st.none()), st.integers(1, 4))
def test_every_sample_comes_out_once_with_its_own_kind_and_the_group_that_waited_longest_first(
    steps: list[list[str] | None], limit: int
) -> None:
    """A list adds an owner with these samples, None takes a batch; at the end all is taken."""
    batcher: Batcher[int] = Batcher(Grouped(), BatchSizes(), limit)
    came: list[tuple[int, int, str]] = []
    out: list[tuple[int, int, str]] = []
    waiting: list[str] = []  # groups by how long they have waited for their turn

    def take() -> None:
        batch = batcher.take()
        assert 1 <= len(batch) <= limit
        name = group(batch)
        assert name == waiting.pop(0)
        out.extend((slot.owner, slot.place, slot.sample.data[0]) for slot in batch)
        left = [one for one in came if one[2] == name and one not in out]
        assert len(batch) == limit or not left, "nothing is held back"
        waiting.extend([name] if left else [])

    for owner, names in enumerate(steps):
        if names is not None:
            batcher.add(owner, [Sample((name, owner), None) for name in names])
            came.extend((owner, place, name) for place, name in enumerate(names))
            waiting.extend(name for name in dict.fromkeys(names) if name not in waiting)
        elif batcher:
            take()
    while batcher:
        take()
    assert sorted(out) == sorted(came)
    for name in "abcd":
        assert [one for one in out if one[2] == name] == [one for one in came if one[2] == name], "first come, first served"


def test_an_image_whose_samples_belong_nowhere_leaves_nothing_behind() -> None:
    batcher: Batcher[int] = Batcher(Grouped(), BatchSizes(), 4)
    with pytest.raises(ValueError, match="belongs nowhere"):
        batcher.add(0, [Sample(("a", 0), None), Sample(("?", 0), None)])
    assert not batcher


# --- when a batch fails ---


def test_a_batch_that_fits_runs_once() -> None:
    operation = Doubling()
    assert run_batch(operation, samples(4), BatchSizes()) == [0, 2, 4, 6]
    assert operation.calls == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("count", "capacity", "calls"),
    [
        (8, 4, [8, 4, 4]),
        (8, 3, [8, 4, 2, 2, 2, 2]),
        (7, 4, [7, 4, 3]),
        (5, 2, [5, 3, 2, 2, 1]),
        (3, 1, [3, 2, 1, 1, 1]),
    ],
)
def test_a_batch_too_large_for_memory_is_halved_until_it_fits(count: int, capacity: int, calls: list[int]) -> None:
    operation = Doubling(capacity)
    assert run_batch(operation, samples(count), BatchSizes()) == [2 * number for number in range(count)]
    assert [len(call) for call in operation.calls] == calls


@pytest.mark.parametrize("shortage", [MemoryError("malloc"), OutOfMemory("the device is full")], ids=lambda e: type(e).__name__)
def test_an_image_that_does_not_fit_alone_fails_alone(shortage: BaseException) -> None:
    operation = Doubling(faults={5: shortage})
    outputs = run_batch(operation, samples(8), BatchSizes())
    error = outputs.pop(5)
    assert isinstance(error, OutOfMemory)
    assert "stylize ran out of memory" in error.message
    assert outputs == [0, 2, 4, 6, 8, 12, 14]
    assert [len(call) for call in operation.calls] == [8, 4, 4, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(OperationFailed("this one can't be done"), OperationFailed), (ZeroDivisionError("by zero"), InternalError)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_any_other_error_isolates_its_image_at_once(fault: BaseException, kind: type[ImageError]) -> None:
    operation = Doubling(faults={1: fault})
    outputs = run_batch(operation, samples(4), BatchSizes())
    error = outputs.pop(1)
    assert type(error) is kind
    assert str(fault) in error.message
    assert error.__traceback__ is None, "a traceback would keep the batch's arrays alive"
    assert outputs == [0, 4, 6]
    assert operation.calls == [[0, 1, 2, 3], [0], [1], [2], [3]]


@settings(max_examples=25)  # when memory runs out garbage is collected, which takes a while here
@given(st.integers(1, 12), st.integers(1, 12), st.dictionaries(st.integers(0, 11), st.booleans()))
def test_only_the_bad_ones_fail_whatever_is_wrong_with_them(count: int, capacity: int, bad: dict[int, bool]) -> None:
    faults = {n: MemoryError() if memory else OperationFailed("no") for n, memory in bad.items()}
    outputs = run_batch(Doubling(capacity, dict(faults)), samples(count), BatchSizes())
    expected = {n: OutOfMemory if memory else OperationFailed for n, memory in bad.items()}
    assert [type(one) if isinstance(one, ImageError) else one for one in outputs] == [
        expected.get(n, 2 * n) for n in range(count)
    ]


class Forgetful(Doubling):
    """Loses the last output of every batch of more than `enough`."""

    def __init__(self, enough: int) -> None:
        super().__init__()
        self.enough = enough

    def run(self, samples: Sequence[Sample]) -> list[Any]:
        done = [2 * sample.data for sample in samples]
        return done[:-1] if len(samples) > self.enough else done


def test_outputs_that_could_belong_to_any_image_are_given_to_none() -> None:
    assert run_batch(Forgetful(1), samples(3), BatchSizes()) == [0, 2, 4], "alone there is no doubt"
    for error in run_batch(Forgetful(0), samples(3), BatchSizes()):
        assert isinstance(error, InternalError)
        assert error.message == "stylize returned 0 outputs for 1 samples"


def test_a_chunk_whose_time_is_up_is_no_images_fault() -> None:
    operation = Doubling(faults={1: SoftTimeLimitExceeded()})
    with pytest.raises(SoftTimeLimitExceeded):
        run_batch(operation, samples(3), BatchSizes())
    assert len(operation.calls) == 1
