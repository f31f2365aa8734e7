"""Serves a node's metrics in a separate process: the node forks children, which a server's threads could block.

    python -m imagemill.worker.node.metrics_server NODE HOST PORT [GPU]

It ends when its standard input does, which is a pipe that the node's processes hold.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from imagemill.shared.errors import sentence
from imagemill.shared.settings import load_settings
from imagemill.worker.node import logs
from imagemill.worker.node.metrics import FOLDER

log = logging.getLogger(__name__)

Family = GaugeMetricFamily | CounterMetricFamily


class NodeMetrics(Collector):
    """What the node's processes have counted, and the state of its disks and its GPU; every sample has the label `node`."""

    def __init__(self, node: str, folders: dict[str, Path], gpu: Gpu | None) -> None:
        self._node, self._folders, self._gpu = node, folders, gpu
        self._counted = MultiProcessCollector(None)

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        for metric in (*self._counted.collect(), *self._disks(), *self._device(), self._build()):
            metric.samples = [sample._replace(labels={"node": self._node, **sample.labels}) for sample in metric.samples]
            yield metric

    def _disks(self) -> Iterator[Metric]:
        free = GaugeMetricFamily("imagemill_disk_free_bytes", "Free space of a folder's disk.", labels=["folder"])
        size = GaugeMetricFamily("imagemill_disk_size_bytes", "Size of a folder's disk.", labels=["folder"])
        for name, folder in self._folders.items():
            try:
                usage = shutil.disk_usage(folder)
            except OSError:  # such as a folder of models that does not exist yet
                continue
            free.add_metric([name], usage.free)
            size.add_metric([name], usage.total)
        yield from (free, size)

    def _device(self) -> Iterator[Metric]:
        return self._gpu.read() if self._gpu is not None else iter(())

    def _build(self) -> Metric:
        info = GaugeMetricFamily("imagemill_build_info", "The version of imagemill that the node runs.", labels=["version"])
        info.add_metric([version("imagemill")], 1)
        return info


class Gpu:
    """A GPU as the NVIDIA Management Library sees it. Anything the card doesn't report is left out."""

    def __init__(self, nvml: Any, handle: Any, name: str) -> None:
        self._nvml, self._handle, self._name = nvml, handle, name

    def read(self) -> Iterator[Metric]:
        """Memory, temperature, power and memory errors of the card."""
        nvml = self._nvml
        memory: list[tuple[str, str, Callable[[], float]]] = [
            ("device_memory_used_bytes", "GPU memory in use, by all processes.", lambda: self._ask("MemoryInfo").used),
            ("device_memory_limit_bytes", "GPU memory.", lambda: self._ask("MemoryInfo").total),
            ("gpu_temperature_celsius", "Temperature of the GPU.", lambda: self._ask("Temperature", nvml.NVML_TEMPERATURE_GPU)),
            ("gpu_power_watts", "Power that the card draws.", lambda: self._ask("PowerUsage") / 1000),
        ]
        for name, text, read in memory:
            yield from self._family(GaugeMetricFamily(f"imagemill_{name}", text, labels=["gpu"]), read)
        errors = CounterMetricFamily("imagemill_gpu_ecc_errors", "Memory errors that ECC could not correct.", labels=["gpu"])
        kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_AGGREGATE_ECC
        yield from self._family(errors, lambda: self._ask("TotalEccErrors", kind, since))

    def _ask(self, what: str, *arguments: Any) -> Any:
        return getattr(self._nvml, f"nvmlDeviceGet{what}")(self._handle, *arguments)

    def _family(self, family: Family, read: Callable[[], float]) -> Iterator[Metric]:
        try:
            family.add_metric([self._name], read())
        except self._nvml.NVMLError:
            return
        yield family


def find_gpu(visible: str = "") -> Gpu | None:
    """The GPU with this index or UUID; None without one, and if NVML can't be loaded, which is logged."""
    if not visible:
        return None
    try:
        import pynvml

        from imagemill.worker.hardware.memory import handle_of

        pynvml.nvmlInit()
        return Gpu(pynvml, handle_of(pynvml, visible), visible)
    except Exception as error:  # noqa: BLE001  # of the library or the driver; all other metrics do without
        fields = dict(action="metrics", reason=f"{type(error).__name__}: {sentence(error)}")
        log.warning("no metrics of the GPU", extra=fields)
        return None


def main() -> None:
    """Serve until the node ends, then remove what its processes wrote."""
    for number in (signal.SIGTERM, signal.SIGINT):  # they may reach all processes of a node, which drains meanwhile
        signal.signal(number, signal.SIG_IGN)
    node, host, port, *gpu = sys.argv[1:]
    settings = load_settings()
    logs.set_up(as_json=settings.log_json)
    folders = {"temporary": Path(tempfile.gettempdir()), "weights": settings.weights.folder.expanduser()}
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)  # its start is that of the node
    registry.register(NodeMetrics(node, folders, find_gpu(*gpu)))
    try:
        start_http_server(int(port), host, registry)
    except OSError as error:
        fields = dict(action="metrics", node=node, host=host, port=port, reason=sentence(error))
        log.error("metrics not served; the node works without them", extra=fields)
    sys.stdin.buffer.read()
    shutil.rmtree(os.environ[FOLDER], ignore_errors=True)


if __name__ == "__main__":
    main()
