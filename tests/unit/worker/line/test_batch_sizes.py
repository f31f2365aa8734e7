"""Batch sizes: as large as fits, found by measuring rather than failing, and updated when free memory changes."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared.errors import OutOfMemory
from imagemill.worker.hardware.board import Board
from imagemill.worker.hardware.memory import HostMemory
from imagemill.worker.line.batch_sizes import PATIENCE, SHARE, BatchSizes, Known, kind_of
from imagemill.worker.operations.base import Sample
from tests.batches import run_batch
from tests.devices import SHORT, FakeGpu, Frugal, Hungry

KIND = "'numbers'"


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Skip garbage collection on out-of-memory: with everything the tests import it takes a second."""
    gc.freeze()
    yield
    gc.unfreeze()


def work(operation: Hungry, sizes: BatchSizes, batches: int, most: int = 64) -> None:
    """Run batches of the allowed size; every sample must come out in order."""
    for _ in range(batches):
        count = sizes.limit(KIND, most)
        assert run_batch(operation, [Sample(n, None) for n in range(count)], sizes) == [2 * n for n in range(count)]


@given(each=st.integers(1, 400), base=st.integers(0, 300), held=st.integers(0, 500), most=st.integers(1, 64))
def test_batch_grows_to_its_share_of_free_memory_without_failing(each: int, base: int, held: int, most: int) -> None:
    gpu = FakeGpu(2000, held=held)
    operation, sizes = Hungry(gpu, each, base), BatchSizes(gpu)
    work(operation, sizes, 10, most)
    fits = max(1, min(most, int((SHARE * gpu.free() - base) // each)))
    assert operation.sizes[-1] == fits
    assert operation.sizes == sorted(operation.sizes), "no size was tried that did not fit"
    tried = list(dict.fromkeys(operation.sizes))
    assert all(size <= 4 for size in tried[1:2]), "one peak says little"
    assert all(later <= 16 * earlier for earlier, later in pairwise(tried))


def test_measured_peaks_allow_larger_steps() -> None:
    gpu = FakeGpu(100_000)
    operation, sizes = Hungry(gpu, each=10, base=50), BatchSizes(gpu)
    work(operation, sizes, 5)
    assert operation.sizes == [1, 4, 64, 64, 64]


def test_growth_is_how_much_larger_the_next_batch_may_be() -> None:
    gpu = FakeGpu(100_000)
    operation, sizes = Hungry(gpu, each=10, base=50), BatchSizes(gpu)
    growths = [sizes.growth(KIND, 32)]
    for _ in range(3):
        work(operation, sizes, 1, most=32)
        growths.append(sizes.growth(KIND, 32))
    assert growths == [1, 4, 8, 1]
    assert sizes.growth(KIND, 4) == 1, "another job's batches may not be as large"
    assert BatchSizes(known={KIND: Known(fits=1)}).growth(KIND, 32) == 1, "on a CPU, larger batches are no faster"


def test_without_peaks_sizes_only_double() -> None:
    gpu = FakeGpu(1000, blind=True)
    operation, sizes = Hungry(gpu, each=1), BatchSizes(gpu)
    work(operation, sizes, 5)
    assert operation.sizes == [1, 2, 4, 8, 16]


@given(
    capacity=st.integers(1, 40),
    later=st.integers(1, 40),
    most=st.integers(1, 48),
    made=st.sampled_from(list(SHORT.values())),
)
def test_size_settles_at_the_largest_that_fits_when_peaks_are_unknown(
    capacity: int, later: int, most: int, made: Callable[[], Exception]
) -> None:
    gpu = FakeGpu(100, held=100 - capacity, error=made, blind=True)
    operation, sizes = Hungry(gpu, each=1), BatchSizes(gpu)
    work(operation, sizes, 16, most)
    assert sizes.limit(KIND, most) == min(most, capacity)
    tried = len(operation.sizes)
    work(operation, sizes, 5, most)
    assert set(operation.sizes[tried:]) == {min(most, capacity)}, "the size must stay, without failing again"
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


def test_larger_size_is_retried_less_often_after_each_failure() -> None:
    gpu = FakeGpu(100, held=93, blind=True)
    operation, sizes = Hungry(gpu, each=1), BatchSizes(gpu)
    work(operation, sizes, 10)
    operation.sizes.clear()
    work(operation, sizes, 6 * PATIENCE)
    failures = [place for place, size in enumerate(operation.sizes) if size > 7]
    assert len(failures) == 2
    assert failures[1] - failures[0] > 2 * PATIENCE - 2


def test_no_measuring_and_largest_batches_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = HostMemory()
    monkeypatch.setattr(memory, "peak", lambda: pytest.fail("measured"))
    monkeypatch.setattr(memory, "free", lambda: pytest.fail("asked"))
    sizes = BatchSizes(memory)
    assert sizes.limit(KIND, 16) == 16
    assert run_batch(Hungry(FakeGpu(100), 1), [Sample(1, None)] * 3, sizes) == [2, 2, 2]
    assert sizes.limit(KIND, 16) == 16


def test_out_of_memory_is_remembered_without_a_gpu() -> None:
    operation, sizes = Hungry(FakeGpu(5, error=MemoryError), each=1), BatchSizes()
    work(operation, sizes, 8, most=16)
    assert sizes.limit(KIND, 16) == 5


def test_sizes_start_from_tuned_values() -> None:
    gpu = FakeGpu(1000)
    sizes = BatchSizes(gpu, {KIND: Known(peaks={1: 60, 16: 510}, fits=16)})
    assert sizes.limit(KIND, 64) == 25  # 30 bytes beside 30 for each
    gpu.held = 500
    assert sizes.limit(KIND, 64) == 12
    assert sizes.limit("another", 64) == 1


def test_tuned_values_keep_cpu_batches_within_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory()
    monkeypatch.setattr(memory, "free", lambda: 1000)
    assert BatchSizes(memory, {KIND: Known(peaks={1: 200}, fits=1)}).limit(KIND, 16) == 4


def test_children_that_share_a_gpu_learn_from_each_other() -> None:
    gpu, board = FakeGpu(1000), Board()
    one, other = (BatchSizes(gpu, board=board, name="inpaint/lama") for _ in range(2))
    stranger = BatchSizes(gpu, board=board, name="remove-background/rembg")
    operation = Hungry(gpu, each=20, base=50)
    for number in range(4):
        work(operation, (one, other)[number % 2], 1)
    assert operation.sizes == [1, 4, 37, 37]
    gpu.held = 650
    one.failed(KIND, 16)
    assert other.limit(KIND, 64) < 16
    assert stranger.limit(KIND, 64) == 1


def test_zero_peak_sets_no_limit() -> None:
    assert BatchSizes(HostMemory(), {KIND: Known(peaks={1: 0, 4: 0}, fits=4)}).limit(KIND, 16) == 16


def test_kind_is_the_model_and_footprint_or_else_the_group_key() -> None:
    operation = Hungry(FakeGpu(1), 1)
    kinds = {kind_of(operation, Sample(1, SimpleNamespace(model=model), footprint="512x512")) for model in ("sd15", "sdxl")}
    assert kinds == {"sd15 512x512", "sdxl 512x512"}
    assert kind_of(operation, Sample(1, None)) == KIND
    assert kind_of(operation, Sample(1, None, footprint="512x512 float16")) == "512x512 float16"


def test_run_above_90_percent_is_flagged_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    gpu = FakeGpu(1000, held=850)
    operation, sizes = Hungry(gpu, each=60), BatchSizes(gpu)
    with caplog.at_level(logging.WARNING, "imagemill.worker.line.batch_sizes"):
        work(operation, sizes, 3, most=1)
    assert (sizes.flagged, sizes.top) == (3, 0.91)
    (record,) = caplog.records
    assert (record.action, record.share, record.samples) == ("memory", 0.91, 1)  # type: ignore[attr-defined]


# --- when not even one fits ---


def test_sample_that_does_not_fit_runs_with_relief_that_ends_with_it() -> None:
    gpu = FakeGpu(100)
    operation, sizes = Frugal(gpu, each=150), BatchSizes(gpu)
    assert run_batch(operation, [Sample(1, None), Sample(2, None)], sizes) == [2, 4]
    assert operation.levels == [0, 0, 1, 1], "the second sample need not fail first"
    assert operation.level == 0
    gpu.held = -100
    assert run_batch(operation, [Sample(3, None)], sizes) == [6]
    assert operation.levels[-1] == 0, "memory was freed"
    assert sizes.limit(KIND, 8) == 1, "of 200 bytes 160 may be taken"


def test_sample_that_never_fits_fails_alone() -> None:
    gpu = FakeGpu(100)
    operation, sizes = Frugal(gpu, each=404), BatchSizes(gpu)
    (made,) = run_batch(operation, [Sample(1, None)], sizes)
    assert isinstance(made, OutOfMemory)
    assert operation.levels == [0, 1, 2]
    assert operation.level == 0


def test_relief_is_not_used_for_other_errors() -> None:
    gpu = FakeGpu(100, error=lambda: ValueError("no"))
    operation, sizes = Frugal(gpu, each=150), BatchSizes(gpu)
    run_batch(operation, [Sample(1, None)], sizes)
    assert operation.levels == [0]
