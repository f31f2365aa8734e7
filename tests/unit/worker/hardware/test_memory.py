"""What each device tells of its memory: real for the machine's own, with the libraries' functions replaced for GPUs."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pynvml
import pytest
import torch

from imagemill.shared.errors import ConfigurationError, DeviceLost
from imagemill.worker.hardware import memory as module
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.memory import HostMemory, NvmlMemory, TorchMemory, memory_of
from tests.fakes import Invert

GB = 10**9
ONNX, TORCH = replace(Invert.spec, runtime="onnxruntime"), replace(Invert.spec, runtime="torch")


# --- the machine's own ---


def test_the_machines_memory_is_what_the_system_has_available() -> None:
    before = psutil.virtual_memory().total
    assert 0 < HostMemory().free() <= before


@pytest.mark.parametrize(("most", "left"), [("5000000", 3_000_000), ("1000000", 0), ("max", None)])
def test_a_containers_limit_counts(most: str, left: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{most}\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    free = HostMemory().free()
    assert free == left if left is not None else free > 5_000_000


def test_the_peak_of_a_run_is_what_it_took_though_it_gave_it_back() -> None:
    with HostMemory().peak() as peak:
        np.ones(25_000_000)  # 200 MB
    assert 190e6 < peak.bytes < 300e6
    with HostMemory().peak() as later:
        pass
    assert later.bytes < 100e6, "an earlier peak is not counted again"
    assert 0 < later.share <= 1


# --- a GPU by torch's counts ---


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The state of a GPU of 24 GB of which others hold 2, and torch 5, of which 1 is free for its next run."""
    state = SimpleNamespace(free=17 * GB, total=24 * GB, reserved=5 * GB, allocated=4 * GB, highest=9 * GB, error=None)

    def ask(value: Any) -> Any:
        if state.error:
            raise state.error
        return value

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: ask("NVIDIA RTX"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ask((state.free, state.total)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: state.reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: state.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: state.highest)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: ask(None))

    def reset() -> None:
        state.highest = state.allocated

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    return state


def test_a_torch_that_can_use_no_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match=r"finds no GPU that it can use .*; try --cpu"):
        memory_of(Device(gpu=0), TORCH)


def test_what_torch_keeps_for_later_is_free_for_its_next_run(cuda: SimpleNamespace) -> None:
    assert (TorchMemory().name, TorchMemory().free()) == ("NVIDIA RTX", 18 * GB)


def test_torchs_peak_is_beyond_what_was_there_and_the_share_counts_others_too(cuda: SimpleNamespace) -> None:
    with TorchMemory().peak() as peak:
        assert cuda.highest == cuda.allocated, "an earlier peak is not counted again"
        cuda.highest, cuda.reserved, cuda.free = 10 * GB, 11 * GB, 11 * GB
    assert (peak.bytes, peak.share) == (6 * GB, 0.5)


def test_a_gpu_that_answers_torch_with_errors_is_lost(cuda: SimpleNamespace) -> None:
    memory = TorchMemory()
    assert not memory.broken()
    cuda.error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert memory.broken()
    with pytest.raises(DeviceLost, match="illegal memory access"):
        memory.free()


# --- a GPU by its driver's counts ---


class Driver:
    """Stands for pynvml: two GPUs and a MIG instance, of which the second's memory is in `used`."""

    NVMLError = pynvml.NVMLError

    def __init__(self) -> None:
        self.used, self.lost, self.looked = 3 * GB, False, Event()

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
        self.looked.set()
        return SimpleNamespace(total=10 * GB, used=self.used, free=10 * GB - self.used)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)  # type: ignore[arg-type]
    return driver


def test_the_driver_is_asked_as_its_library_has_it() -> None:
    assert {name for name in vars(Driver) if name.startswith("nvml")} <= set(dir(pynvml))


@pytest.mark.parametrize(
    ("visible", "name"),
    [("1", "GPU-22bb"), ("0,1", "GPU-11aa"), ("GPU-22bb", "GPU-22bb"), ("GPU-2", "GPU-22bb"), ("MIG-7c/1/0", "MIG-7c/1/0")],
)
def test_the_gpu_is_the_one_that_this_process_sees(visible: str, name: str, driver: Driver) -> None:
    assert NvmlMemory(visible).name == f"NVIDIA {name}"


def test_what_is_free_and_no_more_than_a_session_may_take(driver: Driver) -> None:
    assert NvmlMemory("1").free() == 7 * GB
    assert NvmlMemory("1", limit=2 * GB).free() == 2 * GB


def test_a_run_is_watched_while_it_lasts(driver: Driver) -> None:
    memory = NvmlMemory("1")
    with memory.peak() as peak:
        driver.used = 8 * GB
        driver.looked.clear()
        assert driver.looked.wait(20)
        driver.looked.clear()
        assert driver.looked.wait(20), "what was seen first is noted by now"
        driver.used = 5 * GB  # what its arena could not give back
    assert (peak.bytes, peak.share) == (5 * GB, 0.8)
    with memory.peak() as peak:
        pass
    assert peak.bytes in (0, 2 * GB)


def test_a_gpu_that_fell_off_the_bus_is_lost(driver: Driver) -> None:
    memory = NvmlMemory("1")
    driver.lost = True
    with pytest.raises(DeviceLost):
        memory.free()


# --- which of them ---


@pytest.mark.parametrize(
    ("device", "spec", "kind"),
    [
        (Device(), TORCH, HostMemory),
        (Device(gpu=0), Invert.spec, HostMemory),
        (Device(gpu=0, provider="cpu"), ONNX, HostMemory),
        (Device(gpu=0, provider="cuda"), ONNX, NvmlMemory),
        (Device(gpu=0), TORCH, TorchMemory),
    ],
)
def test_memory_is_asked_where_the_engine_runs(
    device: Device, spec: Any, kind: type, driver: Driver, cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert type(memory_of(device, spec)) is kind


def test_without_the_drivers_library_it_is_said_and_the_engine_works(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "imagemill.worker.hardware.memory"):
        found = memory_of(Device(gpu=0, provider="cuda"), ONNX)
    if isinstance(found, NvmlMemory):
        pytest.skip("this machine has a GPU")
    assert isinstance(found, HostMemory)
    (said,) = caplog.records
    assert "NVML" in said.reason  # type: ignore[attr-defined]
