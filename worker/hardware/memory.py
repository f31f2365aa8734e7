"""The memory of what a child works on: how much is free, and how much a run took at its peak."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol

import psutil

from imagemill.shared.errors import ConfigurationError, DeviceLost, sentence
from imagemill.worker.hardware.device import Device, give_back, visible_gpus
from imagemill.worker.operations.base import Spec

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.002
"""Between two looks at a GPU's memory during a run of onnxruntime, which takes tens of milliseconds on a GPU."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass
class Peak:
    """What a run took: `bytes` beyond what was in use before it, and the share of all the memory then in use, by anybody."""

    bytes: int = 0
    share: float = 0.0


class Memory(Protocol):
    """Of one device, as its runtime sees it. Raises DeviceLost where the device does not answer.

    `name` is the device's, as its maker has it. `grows` says whether larger batches are faster there, so that it is
    worth while to find out how large they may be, and to wait until one is full.
    """

    name: str
    grows: bool

    def free(self) -> int:
        """Bytes that the next run may take."""

    def peak(self) -> AbstractContextManager[Peak]:
        """A context manager that gives a Peak, to be read after it has ended."""

    def broken(self) -> bool:
        """Whether the device answers this process with errors only."""


def memory_of(device: Device, spec: Spec) -> Memory:
    """The memory that an engine's runs take on a device."""
    if device.gpu is None or spec.runtime == "cpu" or (spec.runtime == "onnxruntime" and device.provider == "cpu"):
        return HostMemory()
    if spec.runtime == "torch":
        return TorchMemory()
    try:
        return NvmlMemory(os.environ.get("CUDA_VISIBLE_DEVICES", str(device.gpu)), device.memory_limit)
    except Exception as error:  # noqa: BLE001  # of the library or the driver: the engine may work all the same
        told = dict(action="load", engine=spec.engine, reason=f"{type(error).__name__}: {sentence(error)}")
        log.warning("the GPU's memory can't be looked at; batches are as large as the engine allows", extra=told)
        return HostMemory()


def give_up_caches() -> None:
    """Collect what is garbage, and hand to the device what torch keeps for later. Not inside an `except` block, whose
    frames hold the tensors."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # of a broken device, which is found out elsewhere
            torch.cuda.empty_cache()


class HostMemory:
    """The machine's own. In CPU work nothing is gained by batches, so nobody measures them but `imagemill tune`."""

    name = "cpu"
    grows = False

    def free(self) -> int:
        """What the machine has, or what is left of this container's limit."""
        left = int(psutil.virtual_memory().available)
        with suppress(OSError, ValueError):  # no cgroup of version 2, or `max`
            limit, used = (int((CGROUP / f"memory.{what}").read_text()) for what in ("max", "current"))
            left = min(left, max(0, limit - used))
        return left

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        """Of the whole process: other threads' memory is in it, and what malloc kept from before is not."""
        give_back()
        found, before = Peak(), psutil.Process().memory_info().rss
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM, the highest that RSS has been
        yield found
        found.bytes = max(0, _highest_rss() - before)
        found.share = psutil.virtual_memory().percent / 100

    def broken(self) -> bool:
        return False


def _highest_rss() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


class TorchMemory:
    """A GPU's, by torch's own counts: it keeps what was freed for its next run, which others see as used."""

    grows = True

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            built = f"it is built for CUDA {torch.version.cuda}" if torch.version.cuda else "it is built without CUDA"
            raise ConfigurationError(f"the torch that is installed finds no GPU that it can use ({built}); try --cpu")
        self._cuda = torch.cuda
        with _answering():
            self.name = str(torch.cuda.get_device_name())

    def free(self) -> int:
        with _answering():
            free, _total = self._cuda.mem_get_info()
            return int(free + self._cuda.memory_reserved() - self._cuda.memory_allocated())

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        found, before = Peak(), self._cuda.memory_allocated()
        self._cuda.reset_peak_memory_stats()
        yield found
        highest = self._cuda.max_memory_allocated()
        found.bytes = max(0, highest - before)
        with _answering():
            free, total = self._cuda.mem_get_info()
        found.share = (total - free - self._cuda.memory_reserved() + highest) / total

    def broken(self) -> bool:
        try:
            self._cuda.synchronize()  # says again what went wrong before, if it is there to stay
        except RuntimeError:
            return True
        return False


class NvmlMemory:
    """A GPU's, by its driver's counts, for runtimes that keep none of their own. `visible` is CUDA_VISIBLE_DEVICES.

    A run is watched by a thread, since memory goes back at its end. `limit` is what a session may take.
    """

    grows = True

    def __init__(self, visible: str, limit: int | None = None) -> None:
        import pynvml

        self._nvml, self._limit = pynvml, limit
        pynvml.nvmlInit()
        self._handle = _handle(pynvml, visible)
        name = pynvml.nvmlDeviceGetName(self._handle)
        self.name = name.decode() if isinstance(name, bytes) else str(name)
        self._least = self._used()

    def free(self) -> int:
        found = int(self._info().free)
        return found if self._limit is None else min(found, self._limit)

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        # What an arena could not give back after the last run is taken again by this one: counted from the least.
        self._least = min(self._least, self._used())
        seen, over = [self._least], Event()

        def watch() -> None:
            with suppress(DeviceLost):  # said by the next `free`
                while not over.wait(LOOK_SECONDS):
                    seen.append(self._used())

        watcher, found = Thread(target=watch, name="memory", daemon=True), Peak()
        watcher.start()
        try:
            yield found
        finally:
            over.set()
            watcher.join()
        found.bytes = max(seen) - self._least
        found.share = max(seen) / int(self._info().total)

    def broken(self) -> bool:
        return False  # the driver is well when a context is not; what onnxruntime says must do

    def _used(self) -> int:
        return int(self._info().used)

    def _info(self) -> Any:
        try:
            return self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except self._nvml.NVMLError as error:
            raise DeviceLost(f"the GPU does not answer: {sentence(error)}") from error


def _handle(nvml: Any, visible: str) -> Any:
    """NVML's handle of the first visible device: an index, or the beginning of a GPU's or MIG instance's UUID."""
    wanted = visible_gpus(visible)[0]
    if wanted.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(wanted))
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if nvml.nvmlDeviceGetUUID(handle).startswith(wanted):
            return handle
    return nvml.nvmlDeviceGetHandleByUUID(wanted)


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DeviceLost(f"the GPU does not answer: {sentence(error)}") from error
