"""Sizes of batches: as large as fits, found by measuring and not by failing, and found anew when memory comes and goes."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared.errors import OutOfMemory
from imagemill.worker.hardware.memory import HostMemory
from imagemill.worker.line.batch_sizes import PATIENCE, SHARE, BatchSizes, Known, kind_of
from imagemill.worker.operations.base import Sample
from tests.batches import run_batch
from tests.devices import SHORT, FakeGpu, Frugal, Hungry

KIND = "'numbers'"


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """When memory runs out garbage is collected, which takes a second over all that the tests have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def work(operation: Hungry, sizes: BatchSizes, batches: int, most: int = 64) -> None:
    """So many batches as large as they may be; every image must come out, in its order."""
    for _ in range(batches):
        count = sizes.limit(KIND, most)
        assert run_batch(operation, [Sample(n, None) for n in range(count)], sizes) == [2 * n for n in range(count)]


@given(each=st.integers(1, 400), base=st.integers(0, 300), held=st.integers(0, 500), most=st.integers(1, 64))
def test_a_batch_grows_until_it_takes_its_share_of_the_free_memory_and_never_fails(
    each: int, base: int, held: int, most: int
) -> None:
    gpu = FakeGpu(2000, held=held)
    operation, sizes = Hungry(gpu, each, base), BatchSizes(gpu)
    work(operation, sizes, 10, most)
    fits = max(1, min(most, int((SHARE * gpu.free() - base) // each)))
    assert operation.sizes[-1] == fits
    assert operation.sizes == sorted(operation.sizes), "nothing was tried that did not fit"
    assert all(later <= 2 * earlier for earlier, later in zip(operation.sizes, operation.sizes[1:], strict=False))


@given(
    capacity=st.integers(1, 40),
    later=st.integers(1, 40),
    most=st.integers(1, 48),
    made=st.sampled_from(list(SHORT.values())),
)
def test_where_measuring_tells_nothing_it_settles_at_the_largest_that_fits_and_again_when_memory_comes_and_goes(
    capacity: int, later: int, most: int, made: Callable[[], Exception]
) -> None:
    gpu = FakeGpu(100, held=100 - capacity, error=made, blind=True)
    operation, sizes = Hungry(gpu, each=1), BatchSizes(gpu)
    work(operation, sizes, 16, most)
    assert sizes.limit(KIND, most) == min(most, capacity)
    tried = len(operation.sizes)
    work(operation, sizes, 5, most)
    assert set(operation.sizes[tried:]) == {min(most, capacity)}, "it stays there, without failing again"
    gpu.held = 100 - later
    work(operation, sizes, PATIENCE + 16, most)
    assert sizes.limit(KIND, most) in (min(most, later), min(most, later) + 1)
    assert max(operation.sizes[-3:]) >= min(most, later)


def test_freed_memory_is_used_at_once() -> None:
    gpu = FakeGpu(100, held=90, blind=True)
    operation, sizes = Hungry(gpu, each=1), BatchSizes(gpu)
    work(operation, sizes, 10)
    assert sizes.limit(KIND, 64) == 10
    gpu.held = 70
    operation.sizes.clear()
    work(operation, sizes, 2)
    assert operation.sizes == [11, 22]


def test_what_fits_is_tried_for_more_now_and_then_and_more_seldom_each_time_that_fails() -> None:
    gpu = FakeGpu(100, held=93, blind=True)
    operation, sizes = Hungry(gpu, each=1), BatchSizes(gpu)
    work(operation, sizes, 10)
    operation.sizes.clear()
    work(operation, sizes, 6 * PATIENCE)
    failures = [place for place, size in enumerate(operation.sizes) if size > 7]
    assert len(failures) == 2
    assert failures[1] - failures[0] > 2 * PATIENCE - 2


def test_without_a_gpu_batches_are_as_large_as_the_engine_allows_and_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = HostMemory()
    monkeypatch.setattr(memory, "peak", lambda: pytest.fail("measured"))
    monkeypatch.setattr(memory, "free", lambda: pytest.fail("asked"))
    sizes = BatchSizes(memory)
    assert sizes.limit(KIND, 16) == 16
    assert run_batch(Hungry(FakeGpu(100), 1), [Sample(1, None)] * 3, sizes) == [2, 2, 2]
    assert sizes.limit(KIND, 16) == 16


def test_without_a_gpu_a_shortage_is_remembered_all_the_same() -> None:
    operation, sizes = Hungry(FakeGpu(5, error=MemoryError), each=1), BatchSizes()
    work(operation, sizes, 8, most=16)
    assert sizes.limit(KIND, 16) == 5


def test_what_was_tuned_is_where_it_begins() -> None:
    gpu = FakeGpu(1000)
    sizes = BatchSizes(gpu, {KIND: Known(peaks={1: 60, 16: 510}, fits=16)})
    assert sizes.limit(KIND, 64) == 25  # 30 bytes beside 30 for each
    gpu.held = 500
    assert sizes.limit(KIND, 64) == 12
    assert sizes.limit("another", 64) == 1


def test_on_a_cpu_what_was_tuned_keeps_batches_within_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory()
    monkeypatch.setattr(memory, "free", lambda: 1000)
    assert BatchSizes(memory, {KIND: Known(peaks={1: 200}, fits=1)}).limit(KIND, 16) == 4


def test_what_was_seen_to_take_nothing_limits_nothing() -> None:
    assert BatchSizes(HostMemory(), {KIND: Known(peaks={1: 0, 4: 0}, fits=4)}).limit(KIND, 16) == 16


def test_a_kind_is_what_the_sample_says_or_else_its_group() -> None:
    operation = Hungry(FakeGpu(1), 1)
    assert kind_of(operation, Sample(1, None)) == KIND
    assert kind_of(operation, Sample(1, None, footprint="512x512 float16")) == "512x512 float16"


def test_a_run_above_nine_tenths_is_flagged_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    gpu = FakeGpu(1000, held=850)
    operation, sizes = Hungry(gpu, each=60), BatchSizes(gpu)
    with caplog.at_level(logging.WARNING, "imagemill.worker.line.batch_sizes"):
        work(operation, sizes, 3, most=1)
    assert (sizes.flagged, sizes.top) == (3, 0.91)
    (said,) = caplog.records
    assert (said.action, said.share, said.samples) == ("memory", 0.91, 1)  # type: ignore[attr-defined]


# --- when not even one fits ---


def test_one_that_does_not_fit_is_done_with_measures_that_end_with_it() -> None:
    gpu = FakeGpu(100)
    operation, sizes = Frugal(gpu, each=150), BatchSizes(gpu)
    assert run_batch(operation, [Sample(1, None), Sample(2, None)], sizes) == [2, 4]
    assert operation.levels == [0, 0, 1, 1], "the second image need not fail first"
    assert operation.level == 0
    gpu.held = -100
    assert run_batch(operation, [Sample(3, None)], sizes) == [6]
    assert operation.levels[-1] == 0, "memory was freed"
    assert sizes.limit(KIND, 8) == 1, "of 200 bytes 160 may be taken"


def test_one_that_does_not_fit_whatever_is_done_fails_alone() -> None:
    gpu = FakeGpu(100)
    operation, sizes = Frugal(gpu, each=404), BatchSizes(gpu)
    (made,) = run_batch(operation, [Sample(1, None)], sizes)
    assert isinstance(made, OutOfMemory)
    assert operation.levels == [0, 1, 2]
    assert operation.level == 0


def test_relief_is_left_alone_for_any_other_fault() -> None:
    gpu = FakeGpu(100, error=lambda: ValueError("no"))
    operation, sizes = Frugal(gpu, each=150), BatchSizes(gpu)
    run_batch(operation, [Sample(1, None)], sizes)
    assert operation.levels == [0]
