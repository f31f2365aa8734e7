"""Tuning ends at the batch that a node's own learning ends at, on a device that isn't there."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from imagemill.shared.errors import OperationFailed
from imagemill.shared.options.stylize import OpencvStylize
from imagemill.worker.hardware.memory import HostMemory
from imagemill.worker.line.batch_sizes import SHARE, BatchSizes
from imagemill.worker.operations.stylize.opencv import Stylize
from imagemill.worker.tuning.trials import Tuning
from tests.devices import SHORT, FakeGpu, Hungry


def tuning(operation: Hungry, sizes: BatchSizes) -> Tuning:
    return Tuning(operation, OpencvStylize(), sizes, (20, 10))


@pytest.mark.parametrize(
    ("each", "base", "most", "found"), [(30, 100, 64, 23), (30, 100, 16, 16), (700, 0, 64, 1), (10, 0, 64, 64)]
)
def test_it_ends_at_the_largest_that_takes_its_share(each: int, base: int, most: int, found: int) -> None:
    gpu = FakeGpu(1000)
    tries = list(tuning(Hungry(gpu, each, base), BatchSizes(gpu, measures=True)).tries(most, seconds=0))
    assert all(one.fits and one.images_per_second for one in tries)
    assert max(one.batch for one in tries) == found
    assert found == most or base + (found + 1) * each > SHARE * 1000
    assert [(one.batch, one.peak_bytes) for one in tries] == [(one.batch, base + each * one.batch) for one in tries]


@pytest.mark.parametrize("made", SHORT.values(), ids=SHORT)
def test_where_measuring_tells_nothing_it_ends_at_the_largest_that_fits(made: Callable[[], Exception]) -> None:
    gpu = FakeGpu(11, error=made, blind=True)
    sizes = BatchSizes(gpu, measures=True)
    one = tuning(Hungry(gpu, each=1), sizes)
    tries = {found.batch: found.fits for found in one.tries(64, seconds=0)}
    assert tries == {1: True, 2: True, 4: True, 8: True, 16: False, 12: False, 10: True, 11: True}
    assert (sizes.known(one.kind).fits, sizes.known(one.kind).fails) == (11, 12)


def test_nothing_fits() -> None:
    gpu = FakeGpu(10)
    (only,) = tuning(Hungry(gpu, each=11), BatchSizes(gpu, measures=True)).tries(64, seconds=0)
    assert (only.batch, only.fits, only.peak_bytes) == (1, False, None)


def test_on_a_cpu_it_measures_as_well() -> None:
    tries = list(tuning(Hungry(FakeGpu(100), each=1), BatchSizes(HostMemory(), measures=True)).tries(4, seconds=0))
    assert [one.batch for one in tries] == [1, 2, 4]
    assert all(one.fits and one.peak_bytes is not None for one in tries)


def test_a_reference_need_not_be_there() -> None:
    options = OpencvStylize(style="colour-transfer", reference="s3://colours/one.png")
    sizes = BatchSizes(HostMemory(), measures=True)
    (only,) = Tuning(Stylize(), options, sizes, (20, 10)).tries(1, seconds=0)
    assert only.fits


def test_any_other_failure_is_no_finding() -> None:
    def fail() -> Exception:
        return OperationFailed("this can't be done")

    gpu = FakeGpu(1, error=fail)
    with pytest.raises(OperationFailed):
        list(tuning(Hungry(gpu, each=2), BatchSizes(gpu, measures=True)).tries(4, seconds=0))
