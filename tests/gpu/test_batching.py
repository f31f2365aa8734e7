"""Batch sizes on a real GPU whose memory runs out or is freed, and a GPU in error. Skipped without a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import pytest
import torch

from imagemill.worker.hardware.memory import TorchMemory
from imagemill.worker.line.batch_sizes import SHARE, BatchSizes
from imagemill.worker.operations.base import Sample, Spec
from tests.batches import run_batch
from tests.fakes import Invert
from tests.workers import ROOT, clean_environment

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

MB = 2**20
KIND = "'pictures'"
EACH = 512 * MB
"""Bytes that one sample takes, in two tensors of equal size."""
ROOM = 4096 * MB


class Convolution(Invert):
    """Doubles each sample by way of large intermediate tensors."""

    spec = Spec("stylize", "opencv", max_batch=64, runtime="torch")

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def group_key(self, sample: Sample) -> Hashable:
        return "pictures"

    def run(self, samples: Sequence[Sample]) -> list[Any]:
        self.sizes.append(len(samples))
        numbers = torch.tensor([float(sample.data) for sample in samples], device="cuda")
        wide = numbers[:, None].expand(-1, EACH // 8).contiguous()
        return [float(value) for value in (wide * 2).amax(1).cpu()]


@pytest.fixture
def ballast() -> Iterator[list[torch.Tensor]]:
    """Memory in use elsewhere, which leaves `ROOM` bytes free; clear the list to free it."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 2 * ROOM:
        pytest.skip("the GPU has too little free memory")
    held = [torch.empty(free - ROOM, dtype=torch.uint8, device="cuda")]
    yield held
    held.clear()
    torch.cuda.empty_cache()


def work(operation: Convolution, sizes: BatchSizes, batches: int) -> None:
    for _ in range(batches):
        count = sizes.limit(KIND, 64)
        assert run_batch(operation, [Sample(n, None) for n in range(count)], sizes) == [2.0 * n for n in range(count)]


def test_batch_that_exceeds_memory_is_halved_until_it_fits(ballast: list[torch.Tensor]) -> None:
    operation, sizes = Convolution(), BatchSizes(TorchMemory())
    assert run_batch(operation, [Sample(n, None) for n in range(32)], sizes) == [2.0 * n for n in range(32)]
    assert operation.sizes[0] == 32
    assert max(operation.sizes[1:]) == 16
    assert operation.sizes[-1] <= ROOM // EACH
    assert not sizes.memory.broken()


def test_batch_size_is_learned_without_running_out_and_grows_when_memory_is_freed(ballast: list[torch.Tensor]) -> None:
    operation, sizes = Convolution(), BatchSizes(TorchMemory())
    work(operation, sizes, 6)
    assert operation.sizes == sorted(operation.sizes), "sizes must not shrink, as they would after a failure"
    assert abs(operation.sizes[-1] - SHARE * ROOM / EACH) <= 1
    assert 0.9 * EACH < sizes.known(KIND).peaks[1] < 1.2 * EACH
    ballast.clear()
    torch.cuda.empty_cache()
    small = operation.sizes[-1]
    work(operation, sizes, 1)
    assert operation.sizes[-1] == 2 * small


def test_device_side_assert_is_reported_as_device_lost() -> None:
    program = """
import torch
from imagemill.shared.errors import DeviceLost
from tests.fakes import Invert
from imagemill.worker.line.batch_sizes import BatchSizes
from tests.batches import run_batch
from imagemill.worker.hardware.memory import TorchMemory
from imagemill.worker.operations.base import Sample

class DeviceAssert(Invert):
    def group_key(self, sample):
        return "all"
    def run(self, samples):
        return torch.zeros(4, device="cuda")[torch.tensor([99], device="cuda")].cpu().tolist()

sizes = BatchSizes(TorchMemory())
try:
    run_batch(DeviceAssert(), [Sample(1, None)], sizes)
except DeviceLost as error:
    print("lost:", error.message)
print("broken:", sizes.memory.broken())
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "lost: " in done.stdout, done.stderr
    assert "CUDA error: device-side assert triggered" in done.stdout
    assert "broken: True" in done.stdout


def test_driver_and_torch_report_the_same_gpu() -> None:
    pytest.importorskip("pynvml")
    from imagemill.worker.hardware.memory import NvmlMemory

    driver = NvmlMemory("0")
    assert driver.name == TorchMemory().name
    with driver.peak() as peak:
        taken = torch.empty(1024 * MB, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        del taken
        torch.cuda.empty_cache()
    assert peak.bytes >= 0
    assert 0 < peak.share <= 1
