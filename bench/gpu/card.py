"""The device under measurement: its time, memory and utilisation. In a dry run it is the CPU."""

from __future__ import annotations

import gc
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median
from threading import Event, Thread
from typing import Any
from unittest.mock import patch

import torch

from bench.figures import Figure, figure
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.errors import is_out_of_memory
from imagemill.worker.hardware.memory import give_up_caches, handle_of

GIB = 2**30


@dataclass
class Speed:
    """Amount per second, and the peak of the memory that torch had allocated, in bytes; 0 in a dry run."""

    rate: float
    peak: int


@dataclass
class Busy:
    """Share of the time that the driver saw a kernel running; None where the driver can't tell."""

    share: float | None = None


@dataclass
class Card:
    """`device` is what engines are loaded on; in a dry run, which is `small`, that is the CPU."""

    device: Device
    small: bool
    matmul: float | None = field(default=None, init=False)
    """TFLOP/s of a large matrix product in half precision, once measured: what this card reaches in practice."""

    @property
    def on_gpu(self) -> bool:
        return self.device.gpu is not None

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda" if self.on_gpu else "cpu")

    def facts(self) -> dict[str, str]:
        """What the results were measured on."""
        facts = {"date": time.strftime("%Y-%m-%d"), "card": "none (dry run on the CPU)", "driver": "none"}
        if self.on_gpu:
            total = torch.cuda.get_device_properties(0).total_memory / GIB
            facts |= {"card": f"{torch.cuda.get_device_name()} with {total:.0f} GiB", "driver": _driver()}
        compiler = "with" if shutil.which("gcc") or shutil.which("cc") or shutil.which("clang") else "WITHOUT"
        return facts | {
            "torch": f"{torch.__version__} {compiler} a C compiler",
            "Python": platform.python_version(),
            "cores": str(self.device.threads),
        }

    def measure_matmul(self) -> Iterator[Figure]:
        """How fast a large matrix product is; data sheets promise more."""
        side, rounds = (256, 2) if self.small else (8192, 30)
        left, right = (torch.randn(side, side, device=self.torch_device).to(torch.float16) for _ in range(2))

        def multiply() -> None:
            for _ in range(rounds):
                left @ right
            self.wait()

        self.matmul = rounds * 2 * side**3 / self.seconds(multiply) / 1e12
        yield figure(f"fp16 matrix product, {side} x {side}", self.matmul, "TFLOP/s")

    def share_used(self, name: str, rate: float, teraflop: float, goal: float | None = None) -> Iterator[Figure]:
        """The share of the matrix product's rate that a model reaches, if that is known."""
        if self.matmul:
            yield figure(f"{name}: share of the matrix product's rate", rate * teraflop / self.matmul, "", goal)

    def seconds(self, run: Callable[[], object], *, rounds: int = 3, enough: float = 6.0) -> float:
        """Median seconds of several runs after one that doesn't count; fewer if they take more than `enough` seconds."""
        run()
        times: list[float] = []
        while len(times) < (1 if self.small else rounds) and sum(times) < enough:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return median(times)

    def speed(self, run: Callable[[], object], amount: float, *, rounds: int = 3) -> Speed | None:
        """The speed of a run that processes this amount and ends with its results on the host; None if it does not fit."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = self.seconds(run, rounds=rounds)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return Speed(amount / seconds, torch.cuda.max_memory_allocated() if self.on_gpu else 0)
        give_up_caches()  # outside the except block, whose frames hold tensors
        return None

    def figures(self, name: str, speed: Speed | None, unit: str = "images/s") -> Iterator[Figure]:
        """The rows for a speed."""
        if speed is None:
            yield figure(f"{name}: out of memory", 0, unit)
            return
        yield figure(name, speed.rate, unit)
        if self.on_gpu:
            yield figure(f"{name}: peak memory", speed.peak / GIB, "GiB")

    def wait(self) -> None:
        """Until the device has nothing to do."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Free what nobody holds any more."""
        give_up_caches()
        gc.collect()

    @contextmanager
    def busy(self) -> Iterator[Busy]:
        """Sample the driver's utilisation meanwhile."""
        busy, samples, over = Busy(), list[int](), Event()
        sampler = Thread(target=_sample, args=(samples, over), daemon=True)
        if self.on_gpu:
            sampler.start()
        try:
            yield busy
        finally:
            over.set()
            if self.on_gpu:
                sampler.join(5.0)
            busy.share = sum(samples) / len(samples) / 100 if samples else None

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Leave out arguments that this torch doesn't have: isolate_recompiles came after 2.11, and one shape needs none.

        In a dry run, models are only traced: compiling C++ takes minutes and says nothing about a GPU.
        """
        build, known = torch.compile, torch.compile.__kwdefaults__

        def compile_it(model: Any = None, **options: Any) -> Any:
            options = {name: value for name, value in options.items() if name in known}
            return build(model, **options, **({} if self.on_gpu else {"backend": "eager"}))

        with patch.object(torch, "compile", compile_it):
            yield


def _driver() -> str:
    with suppress(Exception):  # neither the library nor the driver has to be there
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    return "unknown"


def _sample(samples: list[int], over: Event) -> None:
    with suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        handle = handle_of(pynvml, os.environ["CUDA_VISIBLE_DEVICES"])
        while not over.wait(0.1):
            samples.append(int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu))
