"""Batches: every sample comes out once, in company of its own kind, and a bad one spares its neighbours."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from billiard.exceptions import SoftTimeLimitExceeded
from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared.errors import DeviceLost, ImageError, InternalError, OperationFailed, OutOfMemory
from imagemill.shared.messages import Policy
from imagemill.worker.line import batching
from imagemill.worker.line.batch_sizes import BatchSizes, Known
from imagemill.worker.line.batching import Batcher, Slot, cap, run_parts
from imagemill.worker.operations.base import Sample
from tests.batches import run_batch
from tests.devices import DEAD, HARMLESS, FakeGpu
from tests.fakes import Invert

NAMES = st.sampled_from("abcd")


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """When memory runs out garbage is collected, which takes a second over all that the tests have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


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


# --- how long to wait for company ---


class Clock:
    """Stands for the `time` module; it is as late as one says."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(batching, "time", clock)
    return clock


def waiting(limit: int, wait: float = 2.0) -> Batcher[int]:
    """On a device where `limit` samples fit of the groups a and b."""
    gpu = FakeGpu(1000 * limit)
    return Batcher(Grouped(), BatchSizes(gpu, {repr(name): Known({1: 800}, fits=limit) for name in "ab"}), 64, wait)


def test_a_batch_waits_until_it_is_full_but_no_longer_than_was_set(clock: Clock) -> None:
    batcher = waiting(limit=3)
    assert batcher.patience(coming=True) is None, "there is nothing to take"
    assert batcher.patience(coming=False) == 0
    batcher.add(0, [Sample(("a", 0), None)])
    assert batcher.patience(coming=True) == 2
    clock.now += 1.5
    batcher.add(1, [Sample(("a", 1), None)])
    assert batcher.patience(coming=True) == 0.5, "the oldest counts"
    batcher.add(2, [Sample(("a", 2), None), Sample(("a", 3), None)])
    assert batcher.patience(coming=True) == 0, "it is full"
    assert [slot.owner for slot in batcher.take()] == [0, 1, 2]
    assert batcher.patience(coming=True) == 2, "what is left came last"
    clock.now += 3
    assert batcher.patience(coming=True) == 0
    assert len(batcher.take()) == 1


def test_nobody_waits_for_company_that_does_not_come(clock: Clock) -> None:
    batcher = waiting(limit=3)
    batcher.add(0, [Sample(("a", 0), None)])
    assert batcher.patience(coming=False) == 0


def test_a_full_group_goes_before_one_that_may_wait_and_after_one_that_has_waited(clock: Clock) -> None:
    batcher = waiting(limit=2)
    batcher.add(0, [Sample(("a", 0), None)])
    batcher.add(1, [Sample(("b", 1), None)] * 4)
    assert batcher.patience(coming=True) == 0
    assert group(batcher.take()) == "b"
    clock.now += 2
    assert group(batcher.take()) == "a"
    assert group(batcher.take()) == "b"


def test_without_a_gpu_nobody_waits(clock: Clock) -> None:
    batcher: Batcher[int] = Batcher(Grouped(), BatchSizes(), 4, wait=60)
    batcher.add(0, [Sample(("a", 0), None)])
    assert batcher.patience(coming=True) == 0


@pytest.mark.parametrize(("batch", "own", "most"), [("quality", 64, 4), ("quality", 2, 2), ("throughput", 16, 16)])
def test_the_policy_and_the_engine_both_limit_a_batch(batch: str, own: int, most: int) -> None:
    policy = Policy.model_validate({"batch": batch})
    assert cap(policy, replace(Invert.spec, max_batch=own)) == most


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
    parts = list(run_parts(operation, samples(count), BatchSizes()))
    assert [output for part in parts for output in part] == [2 * number for number in range(count)]
    assert [len(call) for call in operation.calls] == calls
    assert [len(part) for part in parts] == [size for size in calls if size <= capacity]


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


@pytest.mark.parametrize("made", DEAD.values(), ids=DEAD)
def test_a_device_in_error_is_no_images_fault_and_nothing_more_is_asked_of_it(made: Callable[[], Exception]) -> None:
    operation = Doubling(faults={1: made()})
    with pytest.raises(DeviceLost, match="stylize left the device in error"):
        run_batch(operation, samples(3), BatchSizes())
    assert len(operation.calls) == 1


@pytest.mark.parametrize(
    "fault", [ValueError("what is wrong"), OperationFailed("can't be done")], ids=lambda e: type(e).__name__
)
def test_whatever_was_raised_a_device_that_answers_with_errors_only_is_lost(fault: Exception) -> None:
    gpu = FakeGpu(100)
    gpu.lost = True
    with pytest.raises(DeviceLost):
        run_batch(Doubling(faults={0: fault}), samples(1), BatchSizes(gpu))


@pytest.mark.parametrize("made", HARMLESS.values(), ids=HARMLESS)
def test_a_fault_that_ends_with_its_batch_costs_one_image(made: Callable[[], Exception]) -> None:
    outputs = run_batch(Doubling(faults={1: made()}), samples(3), BatchSizes())
    assert isinstance(outputs.pop(1), InternalError)
    assert outputs == [0, 4]


class Holding(Doubling):
    """Fails for memory with a large array in its frame, and looks whether that is still there at the next run."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[weakref.ref[Any]] = []

    def run(self, samples: Sequence[Sample]) -> list[Any]:
        assert all(held() is None for held in self.held), "the failed batch's memory is still taken"
        tensor = torch.zeros(1000)
        self.held.append(weakref.ref(tensor))
        if len(samples) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().run(samples)


def test_the_memory_of_a_failed_batch_is_free_before_the_next_try() -> None:
    assert run_batch(Holding(), samples(4), BatchSizes()) == [0, 2, 4, 6]


def test_a_chunk_whose_time_is_up_is_no_images_fault() -> None:
    operation = Doubling(faults={1: SoftTimeLimitExceeded()})
    with pytest.raises(SoftTimeLimitExceeded):
        run_batch(operation, samples(3), BatchSizes())
    assert len(operation.calls) == 1
