"""`imagemill tune` finds the same batch size as a running node would, on a fake GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from imagemill.shared.errors import OperationFailed
from imagemill.shared.options.stylize import OpencvStylize
from imagemill.worker.hardware.memory import HostMemory
from imagemill.worker.line.batch_sizes import SHARE, BatchSizes
from imagemill.worker.operations.stylize.opencv import Stylize
from imagemill.worker.tuning.trials import BatchTrials
from tests.devices import SHORT, FakeGpu, Hungry


def trials_of(operation: Hungry, sizes: BatchSizes) -> BatchTrials:
    return BatchTrials(operation, OpencvStylize(), sizes, (20, 10))


@pytest.mark.parametrize(
    ("each", "base", "most", "largest"), [(30, 100, 64, 23), (30, 100, 16, 16), (700, 0, 64, 1), (10, 0, 64, 64)]
)
def test_trials_end_at_the_largest_batch_within_its_share_of_memory(each: int, base: int, most: int, largest: int) -> None:
    gpu = FakeGpu(1000)
    trials = list(trials_of(Hungry(gpu, each, base), BatchSizes(gpu, measures=True)).run(most, seconds=0))
    assert all(trial.fits and trial.images_per_second for trial in trials)
    assert max(trial.batch for trial in trials) == largest
    assert largest == most or base + (largest + 1) * each > SHARE * 1000
    assert [trial.peak_bytes for trial in trials] == [base + each * trial.batch for trial in trials]


@pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)
def test_trials_end_at_the_largest_batch_that_fits_when_peaks_are_unknown(make: Callable[[], Exception]) -> None:
    gpu = FakeGpu(11, error=make, blind=True)
    sizes = BatchSizes(gpu, measures=True)
    batches = trials_of(Hungry(gpu, each=1), sizes)
    fits = {trial.batch: trial.fits for trial in batches.run(64, seconds=0)}
    assert fits == {1: True, 2: True, 4: True, 8: True, 16: False, 12: False, 10: True, 11: True}
    assert (sizes.known(batches.kind).fits, sizes.known(batches.kind).fails) == (11, 12)


def test_one_trial_when_nothing_fits() -> None:
    gpu = FakeGpu(10)
    (trial,) = trials_of(Hungry(gpu, each=11), BatchSizes(gpu, measures=True)).run(64, seconds=0)
    assert (trial.batch, trial.fits, trial.peak_bytes) == (1, False, None)


def test_trials_measure_on_a_cpu_too() -> None:
    sizes = BatchSizes(HostMemory(), measures=True)
    trials = list(trials_of(Hungry(FakeGpu(100), each=1), sizes).run(4, seconds=0))
    assert [trial.batch for trial in trials] == [1, 2, 4]
    assert all(trial.fits and trial.peak_bytes is not None for trial in trials)


def test_trials_do_not_fetch_the_reference_image() -> None:
    options = OpencvStylize(style="colour-transfer", reference="s3://colours/one.png")
    sizes = BatchSizes(HostMemory(), measures=True)
    (trial,) = BatchTrials(Stylize(), options, sizes, (20, 10)).run(1, seconds=0)
    assert trial.fits


def test_trials_raise_errors_other_than_out_of_memory() -> None:
    gpu = FakeGpu(1, error=lambda: OperationFailed("the model failed"))
    with pytest.raises(OperationFailed):
        list(trials_of(Hungry(gpu, each=2), BatchSizes(gpu, measures=True)).run(4, seconds=0))
