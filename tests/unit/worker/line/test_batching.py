"""Batches: every sample comes out once, with others of its group, and a bad one does not hurt its neighbours."""

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
    """Skip garbage collection on out-of-memory: with everything the tests import it takes a second."""
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
    """Doubles numbers. At most `capacity` of them fit into memory, and those in `faults` raise."""

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
def test_every_sample_comes_out_once_oldest_group_first(steps: list[list[str] | None], limit: int) -> None:
    """A list adds an owner with these samples, None takes a batch; the rest is taken at the end."""
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
        assert len(batch) == limit or not left, "a batch must be as large as possible"
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


def test_image_whose_group_key_raises_leaves_nothing_behind() -> None:
    batcher: Batcher[int] = Batcher(Grouped(), BatchSizes(), 4)
    with pytest.raises(ValueError, match="belongs nowhere"):
        batcher.add(0, [Sample(("a", 0), None), Sample(("?", 0), None)])
    assert not batcher


# --- how long to wait for more samples ---


class Clock:
    """Replaces the `time` module; the test sets the time."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(batching, "time", clock)
    return clock


def waiting(limit: int, wait: float = 2.0) -> Batcher[int]:
    """A batcher on a device where `limit` samples of the groups a and b fit."""
    gpu = FakeGpu(1000 * limit)
    return Batcher(Grouped(), BatchSizes(gpu, {repr(name): Known({1: 800}, fits=limit) for name in "ab"}), 64, wait)


def test_batch_waits_until_full_but_no_longer_than_the_setting(clock: Clock) -> None:
    batcher = waiting(limit=3)
    assert batcher.patience(coming=True) is None, "there is nothing to take yet"
    assert batcher.patience(coming=False) == 0
    batcher.add(0, [Sample(("a", 0), None)])
    assert batcher.patience(coming=True) == 2
    clock.now += 1.5
    batcher.add(1, [Sample(("a", 1), None)])
    assert batcher.patience(coming=True) == 0.5, "the oldest counts"
    batcher.add(2, [Sample(("a", 2), None), Sample(("a", 3), None)])
    assert batcher.patience(coming=True) == 0, "it is full"
    assert [slot.owner for slot in batcher.take()] == [0, 1, 2]
    assert batcher.patience(coming=True) == 2, "the rest arrived last"
    clock.now += 3
    assert batcher.patience(coming=True) == 0
    assert len(batcher.take()) == 1


def test_no_wait_when_no_more_samples_can_arrive(clock: Clock) -> None:
    batcher = waiting(limit=3)
    batcher.add(0, [Sample(("a", 0), None)])
    assert batcher.patience(coming=False) == 0


def test_full_group_runs_after_overdue_groups_and_before_the_rest(clock: Clock) -> None:
    batcher = waiting(limit=2)
    batcher.add(0, [Sample(("a", 0), None)])
    batcher.add(1, [Sample(("b", 1), None)] * 4)
    assert batcher.patience(coming=True) == 0
    assert group(batcher.take()) == "b"
    clock.now += 2
    assert group(batcher.take()) == "a"
    assert group(batcher.take()) == "b"


def test_no_wait_without_a_gpu(clock: Clock) -> None:
    batcher: Batcher[int] = Batcher(Grouped(), BatchSizes(), 4, wait=60)
    batcher.add(0, [Sample(("a", 0), None)])
    assert batcher.patience(coming=True) == 0


@pytest.mark.parametrize(("batch", "own", "most"), [("quality", 64, 4), ("quality", 2, 2), ("throughput", 16, 16)])
def test_policy_and_engine_both_cap_the_batch(batch: str, own: int, most: int) -> None:
    policy = Policy.model_validate({"batch": batch})
    assert cap(policy, replace(Invert.spec, max_batch=own)) == most


# --- when a batch fails ---


def test_batch_that_fits_runs_once() -> None:
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
def test_batch_too_large_for_memory_is_halved_until_it_fits(count: int, capacity: int, calls: list[int]) -> None:
    operation = Doubling(capacity)
    parts = list(run_parts(operation, samples(count), BatchSizes()))
    assert [output for part in parts for output in part] == [2 * number for number in range(count)]
    assert [len(call) for call in operation.calls] == calls
    assert [len(part) for part in parts] == [size for size in calls if size <= capacity]


@pytest.mark.parametrize("shortage", [MemoryError("malloc"), OutOfMemory("the device is full")], ids=lambda e: type(e).__name__)
def test_sample_that_does_not_fit_alone_fails_alone(shortage: BaseException) -> None:
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
def test_other_errors_fail_only_their_own_sample(fault: BaseException, kind: type[ImageError]) -> None:
    operation = Doubling(faults={1: fault})
    outputs = run_batch(operation, samples(4), BatchSizes())
    error = outputs.pop(1)
    assert type(error) is kind
    assert str(fault) in error.message
    assert error.__traceback__ is None, "a traceback would keep the batch's arrays alive"
    assert outputs == [0, 4, 6]
    assert operation.calls == [[0, 1, 2, 3], [0], [1], [2], [3]]


@given(st.integers(1, 12), st.integers(1, 12), st.dictionaries(st.integers(0, 11), st.booleans()))
def test_only_bad_samples_fail_in_any_mix_of_faults(count: int, capacity: int, bad: dict[int, bool]) -> None:
    faults = {n: MemoryError() if memory else OperationFailed("no") for n, memory in bad.items()}
    outputs = run_batch(Doubling(capacity, dict(faults)), samples(count), BatchSizes())
    expected = {n: OutOfMemory if memory else OperationFailed for n, memory in bad.items()}
    assert [type(one) if isinstance(one, ImageError) else one for one in outputs] == [
        expected.get(n, 2 * n) for n in range(count)
    ]


class Forgetful(Doubling):
    """Drops the last output of every batch larger than `enough`."""

    def __init__(self, enough: int) -> None:
        super().__init__()
        self.enough = enough

    def run(self, samples: Sequence[Sample]) -> list[Any]:
        done = [2 * sample.data for sample in samples]
        return done[:-1] if len(samples) > self.enough else done


def test_wrong_number_of_outputs_is_given_to_no_sample() -> None:
    assert run_batch(Forgetful(1), samples(3), BatchSizes()) == [0, 2, 4], "samples run alone can't be mixed up"
    for error in run_batch(Forgetful(0), samples(3), BatchSizes()):
        assert isinstance(error, InternalError)
        assert error.message == "stylize returned 0 outputs for 1 samples"


@pytest.mark.parametrize("made", DEAD.values(), ids=DEAD)
def test_sticky_device_error_raises_device_lost_and_stops_using_the_device(made: Callable[[], Exception]) -> None:
    operation = Doubling(faults={1: made()})
    with pytest.raises(DeviceLost, match="stylize left the device in error"):
        run_batch(operation, samples(3), BatchSizes())
    assert len(operation.calls) == 1


@pytest.mark.parametrize(
    "fault", [ValueError("what is wrong"), OperationFailed("can't be done")], ids=lambda e: type(e).__name__
)
def test_broken_device_raises_device_lost_whatever_the_error(fault: Exception) -> None:
    gpu = FakeGpu(100)
    gpu.lost = True
    with pytest.raises(DeviceLost):
        run_batch(Doubling(faults={0: fault}), samples(1), BatchSizes(gpu))


@pytest.mark.parametrize("made", HARMLESS.values(), ids=HARMLESS)
def test_passing_device_error_fails_one_sample(made: Callable[[], Exception]) -> None:
    outputs = run_batch(Doubling(faults={1: made()}), samples(3), BatchSizes())
    assert isinstance(outputs.pop(1), InternalError)
    assert outputs == [0, 4]


class Holding(Doubling):
    """Runs out of memory with a large array in its frame, and checks on the next run whether that array is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[weakref.ref[Any]] = []

    def run(self, samples: Sequence[Sample]) -> list[Any]:
        assert all(held() is None for held in self.held), "the failed batch's memory is still held"
        tensor = torch.zeros(1000)
        self.held.append(weakref.ref(tensor))
        if len(samples) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().run(samples)


def test_memory_of_a_failed_batch_is_freed_before_the_next_run() -> None:
    assert run_batch(Holding(), samples(4), BatchSizes()) == [0, 2, 4, 6]


def test_time_limit_fails_no_sample() -> None:
    operation = Doubling(faults={1: SoftTimeLimitExceeded()})
    with pytest.raises(SoftTimeLimitExceeded):
        run_batch(operation, samples(3), BatchSizes())
    assert len(operation.calls) == 1
