"""What a node reports about its GPU, read from a stand-in for NVIDIA's library."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from imagemill.worker.node.metrics_server import Gpu, find_gpu


class NvmlError(Exception):
    pass


def unknown(*_: Any) -> None:
    raise NvmlError("not supported")


def library(**more: Any) -> Any:
    """The functions of pynvml that are called, for a card of 80 GB without ECC."""
    calls = {
        "NVMLError": NvmlError,
        "NVML_TEMPERATURE_GPU": 0,
        "NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1,
        "NVML_AGGREGATE_ECC": 1,
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=20e9, total=80e9),
        "nvmlDeviceGetTemperature": lambda *_: 61,
        "nvmlDeviceGetPowerUsage": lambda _: 250_500,
        "nvmlDeviceGetTotalEccErrors": unknown,
    }
    return SimpleNamespace(**(calls | more))


def read(nvml: Any) -> dict[str, float]:
    samples = [sample for metric in Gpu(nvml, "handle", "3").read() for sample in metric.samples]
    assert all(sample.labels == {"gpu": "3"} for sample in samples)
    return {sample.name: sample.value for sample in samples}


def test_gpu_metrics_leave_out_what_the_card_does_not_report() -> None:
    assert read(library()) == {
        "imagemill_device_memory_used_bytes": 20e9,
        "imagemill_device_memory_limit_bytes": 80e9,
        "imagemill_gpu_temperature_celsius": 61,
        "imagemill_gpu_power_watts": 250.5,
    }


def test_memory_errors_are_those_that_could_not_be_corrected() -> None:
    nvml = library(nvmlDeviceGetTotalEccErrors=lambda _, kind, since: 7 if (kind, since) == (1, 1) else 0)
    assert read(nvml)["imagemill_gpu_ecc_errors_total"] == 7


def test_node_without_a_gpu_or_a_driver_has_no_gpu() -> None:
    assert find_gpu() is None
    assert find_gpu("99") is None  # no such GPU, or no driver
