"""Memory of each kind of device: real for main memory, with the libraries' functions replaced for GPUs."""

from __future__ import annotations

import gc
import logging
import os
import sys
import weakref
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import psutil
import pynvml
import pytest
import torch

from imagemill.shared.errors import ConfigurationError, DeviceLost
from imagemill.worker.hardware import memory as module
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.memory import HostMemory, NvmlMemory, TorchMemory, freeze, give_up_caches, memory_of

GB = 10**9


class Knot:
    """Refers to itself, so that only the garbage collector can free it."""

    def __init__(self) -> None:
        self.me = self


def test_what_was_alive_at_a_freeze_is_collected_only_on_request() -> None:
    knot = Knot()
    alive = weakref.ref(knot)
    freeze()
    try:
        del knot
        give_up_caches()
        assert alive() is not None, "it was collected"
        give_up_caches(frozen=True)
        assert alive() is None
        assert gc.get_freeze_count(), "the rest stays frozen"
    finally:
        gc.unfreeze()


# --- main memory ---


def test_host_memory_is_at_most_what_the_machine_has() -> None:
    assert 0 < HostMemory().free() <= psutil.virtual_memory().total


@pytest.mark.parametrize(("limit", "left"), [("5000000", 3_000_000), ("1000000", 0), ("max", None)])
def test_host_memory_respects_container_limit(
    limit: str, left: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    free = HostMemory().free()
    assert free == left if left is not None else free > 5_000_000


def test_host_peak_includes_memory_that_the_run_freed() -> None:
    with HostMemory().peak() as peak:
        np.ones(25_000_000)  # 200 MB
    assert 190e6 < peak.bytes < 300e6
    with HostMemory().peak() as later:
        pass
    assert later.bytes < 100e6, "earlier peaks are not counted again"
    assert 0 < later.share <= 1


# --- GPU memory as counted by torch ---


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """State of a 24 GB GPU: other processes hold 2 GB and torch reserves 5 GB, of which 1 GB is free for its next run."""
    state = SimpleNamespace(free=17 * GB, total=24 * GB, reserved=5 * GB, allocated=4 * GB, highest=9 * GB, error=None)

    def answer(value: Any) -> Any:
        if state.error:
            raise state.error
        return value

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: answer("NVIDIA RTX"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: answer((state.free, state.total)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: state.reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: state.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: state.highest)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: answer(None))

    def reset() -> None:
        state.highest = state.allocated

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: vars(state).update(fraction=share))
    return state


def test_torch_without_a_usable_gpu_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match=r"should run on the GPU, but .*use --cpu"):
        memory_of(Device(gpu=0), "torch")


def test_torch_counts_its_cache_as_free(cuda: SimpleNamespace) -> None:
    assert (TorchMemory().name, TorchMemory().free()) == ("NVIDIA RTX", 18 * GB)


def test_torch_counts_on_its_share_of_a_gpu_and_takes_no_more(cuda: SimpleNamespace) -> None:
    memory = memory_of(Device(gpu=0, siblings=2), "torch")
    assert (memory.free(), memory.total) == (8 * GB, 12 * GB)
    assert cuda.fraction == 0.5
    cuda.free = 1 * GB
    assert TorchMemory(0.5).free() == 2 * GB, "the others hold the rest"


def test_torch_peak_excludes_earlier_allocations_and_its_share_includes_other_processes(cuda: SimpleNamespace) -> None:
    with TorchMemory().peak() as peak:
        assert cuda.highest == cuda.allocated, "earlier peaks are not counted again"
        cuda.highest, cuda.reserved, cuda.free = 10 * GB, 11 * GB, 11 * GB
    assert (peak.bytes, peak.share) == (6 * GB, 0.5)


def test_torch_reports_device_lost_when_every_call_fails(cuda: SimpleNamespace) -> None:
    memory = TorchMemory()
    assert not memory.broken()
    cuda.error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert memory.broken()
    with pytest.raises(DeviceLost, match="illegal memory access"):
        memory.free()


# --- GPU memory as counted by the driver ---


class Driver:
    """Replaces pynvml: two GPUs and a MIG instance, each with `used` bytes in use of 10 GB, `own` of them by this process."""

    NVMLError = pynvml.NVMLError

    def __init__(self) -> None:
        self.used, self.lost, self.sampled = 3 * GB, False, Event()
        self.own: int | None = 1 * GB
        self.asked = Event()

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return ("GPU-11aa", "GPU-22bb")[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> str:  # noqa: N802
        return handle

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return f"NVIDIA {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        if self.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        self.sampled.set()
        return SimpleNamespace(total=10 * GB, used=self.used, free=10 * GB - self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:  # noqa: N802
        self.asked.set()
        others = [SimpleNamespace(pid=1, usedGpuMemory=2 * GB)]
        return [*others, SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.own)] if self.own else others


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)  # type: ignore[arg-type]
    return driver


def test_fake_driver_has_only_functions_of_pynvml() -> None:
    assert {name for name in vars(Driver) if name.startswith("nvml")} <= set(dir(pynvml))


@pytest.mark.parametrize(
    ("visible", "name"),
    [("1", "GPU-22bb"), ("0,1", "GPU-11aa"), ("GPU-22bb", "GPU-22bb"), ("GPU-2", "GPU-22bb"), ("MIG-7c/1/0", "MIG-7c/1/0")],
)
def test_nvml_selects_first_visible_gpu(visible: str, name: str, driver: Driver) -> None:
    assert NvmlMemory(visible).name == f"NVIDIA {name}"


def test_nvml_free_memory_respects_session_limit(driver: Driver) -> None:
    assert NvmlMemory("1").free() == 7 * GB
    assert NvmlMemory("1", limit=2 * GB).free() == 2 * GB


def test_nvml_counts_on_its_share_of_a_gpu(driver: Driver) -> None:
    assert NvmlMemory("1", share=0.5).free() == 5 * GB
    driver.used = 8 * GB
    assert NvmlMemory("1", share=0.5).free() == 2 * GB


@pytest.mark.parametrize(("own", "peak_bytes"), [(1 * GB, 2 * GB), (None, 4 * GB)])
def test_nvml_distinguishes_siblings_if_the_driver_does(own: int | None, peak_bytes: int, driver: Driver) -> None:
    driver.own = own
    memory = NvmlMemory("1", share=0.5)
    with memory.peak() as peak:
        driver.used = 7 * GB
        driver.own = own and 3 * GB
        for _ in range(2):  # the first sample has been recorded when the second comes
            driver.asked.clear()
            assert driver.asked.wait(20)
    assert (peak.bytes, peak.share) == (peak_bytes, 0.7)


def test_nvml_samples_memory_during_the_run(driver: Driver) -> None:
    memory = NvmlMemory("1")
    with memory.peak() as peak:
        driver.used = 8 * GB
        driver.sampled.clear()
        assert driver.sampled.wait(20)
        driver.sampled.clear()
        assert driver.sampled.wait(20), "the first sample has been recorded by now"
        driver.used = 5 * GB  # memory that the arena could not free
    assert (peak.bytes, peak.share) == (5 * GB, 0.8)
    with memory.peak() as peak:
        pass
    assert peak.bytes in (0, 2 * GB)


def test_nvml_reports_device_lost_when_the_driver_fails(driver: Driver) -> None:
    memory = NvmlMemory("1")
    driver.lost = True
    with pytest.raises(DeviceLost):
        memory.free()


# --- choosing between them ---


@pytest.mark.parametrize(
    ("device", "runtime", "kind"),
    [
        (Device(), "torch", HostMemory),
        (Device(gpu=0), "cpu", HostMemory),
        (Device(gpu=0, provider="cpu"), "onnxruntime", HostMemory),
        (Device(gpu=0, provider="cuda"), "onnxruntime", NvmlMemory),
        (Device(gpu=0), "torch", TorchMemory),
    ],
)
def test_memory_of_follows_device_and_runtime(
    device: Device,
    runtime: Literal["cpu", "onnxruntime", "torch"],
    kind: type,
    driver: Driver,
    cuda: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert type(memory_of(device, runtime)) is kind


def test_memory_of_falls_back_to_the_host_with_a_warning_when_nvml_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "imagemill.worker.hardware.memory"):
        memory = memory_of(Device(gpu=0, provider="cuda"), "onnxruntime")
    if isinstance(memory, NvmlMemory):
        pytest.skip("this machine has a GPU")
    assert isinstance(memory, HostMemory)
    (record,) = caplog.records
    assert "NVML" in record.reason  # type: ignore[attr-defined]
