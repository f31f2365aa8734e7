"""Memory of the device that a child works on: how much is free, and the peak of each run."""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal, Protocol

import psutil

from imagemill.shared.errors import DeviceLost, sentence
from imagemill.worker.hardware.device import Device, give_back, visible_gpus

log = logging.getLogger(__name__)

SAMPLING_SECONDS = 0.002
"""Interval between samples of a GPU's memory while onnxruntime runs, which takes tens of milliseconds."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass
class Peak:
    """Peak memory of a run: `bytes` allocated by the run, and the `share` (0 to 1) of the device in use by all processes."""

    bytes: int = 0
    share: float = 0.0


class Memory(Protocol):
    """The memory of one device, as its runtime counts it. Methods raise DeviceLost if the device does not respond.

    `name` is the manufacturer's name of the device, `total` this child's part of a GPU's memory in bytes. `grows` is true if
    larger batches are faster on it, which makes it worthwhile to learn how large they can be, and to wait until they are
    full.
    """

    name: str
    total: int = 0
    grows: bool = True

    def free(self) -> int:
        """Bytes available to the next run."""

    def peak(self) -> AbstractContextManager[Peak]:
        """Measure a run; the Peak is filled in on leaving the context."""

    def broken(self) -> bool:
        """Whether every further call of this process to the device will fail; False if there is no way to tell."""
        return False


def memory_of(device: Device, runtime: Literal["cpu", "onnxruntime", "torch"]) -> Memory:
    """The memory used on a device by engines with this runtime."""
    if device.gpu is None or runtime == "cpu" or (runtime == "onnxruntime" and device.provider == "cpu"):
        return HostMemory()
    if runtime == "torch":
        return TorchMemory(1 / device.siblings)
    try:
        return NvmlMemory(os.environ.get("CUDA_VISIBLE_DEVICES", str(device.gpu)), device.memory_limit, 1 / device.siblings)
    except Exception as error:  # noqa: BLE001  # of the NVML library or the driver; the engine may work without them
        fields = dict(action="load", reason=f"{type(error).__name__}: {sentence(error)}")
        log.warning("GPU memory can't be monitored; batches are as large as the engine allows", extra=fields)
        return HostMemory()


def freeze() -> None:
    """Make the garbage collector ignore everything that is alive now: modules, and models that stay open.

    Otherwise it scans them again and again, and holds up everything else for 0.1 s each time, as often as once a second.
    """
    gc.collect()
    gc.freeze()


def give_up_caches(*, frozen: bool = False) -> None:
    """Collect garbage and empty torch's GPU cache. Call it outside `except` blocks, whose frames keep tensors alive.

    Pass `frozen` to collect what was alive at `freeze`, too; that takes longer.
    """
    if frozen:
        gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # the device is broken, which is detected elsewhere
            torch.cuda.empty_cache()


class HostMemory(Memory):
    """Main memory. Batches are no faster on a CPU, so only `imagemill tune` measures them."""

    name = "cpu"
    grows = False

    def free(self) -> int:
        """Available memory of the machine, or of the container if less."""
        left = int(psutil.virtual_memory().available)
        with suppress(OSError, ValueError):  # not cgroup v2, or the limit is `max`
            limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
            left = min(left, max(0, limit - used))
        return left

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        """The peak of the whole process: includes other threads, excludes memory that malloc kept from earlier runs."""
        give_back()
        peak, before = Peak(), psutil.Process().memory_info().rss
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM, the peak resident set size
        yield peak
        peak.bytes = max(0, _peak_rss() - before)
        peak.share = psutil.virtual_memory().percent / 100


def _peak_rss() -> int:
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak[1]) * 1024 if peak else int(psutil.Process().memory_info().rss)


class TorchMemory(Memory):
    """GPU memory as counted by torch, which caches freed memory for its next run; to the driver, the cache is in use.

    Of a GPU that is shared with other children, torch refuses to allocate more than this process's `share` (0 to 1).
    """

    def __init__(self, share: float = 1.0) -> None:
        import torch

        from imagemill.worker.hardware.torch_device import require_cuda

        require_cuda("the engine", "the GPU")
        self._cuda, self._share = torch.cuda, share
        with _device_lost_on(RuntimeError):
            self.name = str(torch.cuda.get_device_name())
            self.total = int(share * torch.cuda.mem_get_info()[1])
            if share < 1:
                torch.cuda.set_per_process_memory_fraction(share)

    def free(self) -> int:
        with _device_lost_on(RuntimeError):
            free, total = self._cuda.mem_get_info()
            allocated = self._cuda.memory_allocated()
            return int(max(0, min(free + self._cuda.memory_reserved(), self._share * total) - allocated))

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        peak, before = Peak(), self._cuda.memory_allocated()
        self._cuda.reset_peak_memory_stats()
        yield peak
        highest = self._cuda.max_memory_allocated()
        peak.bytes = max(0, highest - before)
        with _device_lost_on(RuntimeError):
            free, total = self._cuda.mem_get_info()
        peak.share = (total - free - self._cuda.memory_reserved() + highest) / total

    def broken(self) -> bool:
        try:
            self._cuda.synchronize()  # repeats an earlier error if it is permanent
        except RuntimeError:
            return True
        return False


class NvmlMemory(Memory):
    """GPU memory as counted by the driver, for runtimes without counters. `visible` is CUDA_VISIBLE_DEVICES.

    A thread samples it during a run, since memory is freed at the end. `limit` is the most a session may allocate. The
    driver does not report broken contexts; onnxruntime's own errors have to do. Of a GPU that is shared with other children,
    this process counts on its `share` (0 to 1) only. What the others allocate during a run counts as its own, unless the
    driver can tell them apart, which it can't in a container; then batches become smaller than they might be.
    """

    def __init__(self, visible: str, limit: int | None = None, share: float = 1.0) -> None:
        import pynvml

        self._nvml, self._limit, self._share = pynvml, limit, share
        pynvml.nvmlInit()
        self._handle = handle_of(pynvml, visible)
        self.name = str(pynvml.nvmlDeviceGetName(self._handle))
        self.total = int(share * self._info().total)
        self._lowest = self._used()

    def free(self) -> int:
        info = self._info()
        free = min(int(info.free), int(self._share * info.total))
        return free if self._limit is None else min(free, self._limit)

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        # Memory that an arena kept after the last run is reused by this one, so count from the lowest use so far.
        self._lowest = min(self._lowest, self._used())
        highest, finished = self._lowest, Event()

        def sample() -> None:
            nonlocal highest
            with suppress(DeviceLost):  # raised again by the next `free`
                while not finished.wait(SAMPLING_SECONDS):
                    highest = max(highest, self._used())

        sampler, peak = Thread(target=sample, name="memory", daemon=True), Peak()
        sampler.start()
        try:
            yield peak
        finally:
            finished.set()
            sampler.join()
        peak.bytes = highest - self._lowest
        info = self._info()
        peak.share = (int(info.used) - self._used() + highest) / int(info.total)

    def _used(self) -> int:
        """Bytes in use: by this process if it shares the GPU and the driver knows, otherwise by all."""
        if self._share < 1:
            with _device_lost_on(self._nvml.NVMLError):
                processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
            for process in processes:
                if process.pid == os.getpid() and process.usedGpuMemory is not None:
                    return int(process.usedGpuMemory)
        return int(self._info().used)

    def _info(self) -> Any:
        with _device_lost_on(self._nvml.NVMLError):
            return self._nvml.nvmlDeviceGetMemoryInfo(self._handle)


def handle_of(nvml: Any, visible: str) -> Any:
    """NVML's handle of the first visible device, given as an index or the beginning of a UUID of a GPU or MIG instance."""
    device = visible_gpus(visible)[0]
    if device.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(device))
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if nvml.nvmlDeviceGetUUID(handle).startswith(device):
            return handle
    return nvml.nvmlDeviceGetHandleByUUID(device)


@contextmanager
def _device_lost_on(failure: type[Exception]) -> Iterator[None]:
    try:
        yield
    except failure as error:
        raise DeviceLost(f"the GPU does not respond: {sentence(error)}") from error
