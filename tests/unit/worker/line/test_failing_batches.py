"""When a batch fails: it is made smaller or run one by one, and only bad samples fail."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import pytest
import torch
from billiard.exceptions import SoftTimeLimitExceeded
from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared.errors import (
    ConfigurationError,
    DeviceLost,
    ImageError,
    InternalError,
    ModelUnavailable,
    OperationFailed,
    OutOfMemory,
)
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.batching import run_parts
from imagemill.worker.operations.base import Sample
from tests.batches import run_batch
from tests.devices import DEAD, HARMLESS, FakeGpu
from tests.fakes import Invert


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Skip garbage collection on out-of-memory: with everything the tests import it takes a second."""
    gc.freeze()
    yield
    gc.unfreeze()


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


def too_large() -> ModelUnavailable:
    """As raised when there is no memory for a model."""
    error = ModelUnavailable("the model is not here")
    error.__cause__ = MemoryError("malloc")
    return error


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
    [
        (OperationFailed("this one can't be done"), OperationFailed),
        (ZeroDivisionError("by zero"), InternalError),
    ],
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


@pytest.mark.parametrize(
    "fault",
    [ConfigurationError("the model is not here"), ModelUnavailable("the model is not here"), too_large()],
    ids=["configuration", "unavailable", "too large"],
)
def test_model_that_cannot_be_used_is_tried_once_per_batch(fault: BaseException) -> None:
    operation = Doubling(faults={0: fault})
    outputs = run_batch(operation, samples(4), BatchSizes())
    assert [(type(error), error.message) for error in outputs] == [(ModelUnavailable, "the model is not here")] * 4
    assert operation.calls == [[0, 1, 2, 3]]


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
