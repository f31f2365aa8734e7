"""The GPU that a child sees, and its share of the cores."""

from __future__ import annotations

import os

import pytest

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.hardware.device import Device, pin, share_of_cores, visible_gpu, visible_gpus

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores every variable that `pin` sets."""
    for name in ("CUDA_VISIBLE_DEVICES", *THREADS, "MALLOC_ARENA_MAX", "HF_HUB_OFFLINE", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("gpu", "mask", "pinned"),
    [
        (0, None, "0"),
        (7, None, "7"),
        (0, "4,5,6", "4"),
        (2, "4,5,6", "6"),
        (1, " 4 , 5 ", "5"),
        (1, "4,GPU-8932f937-d72c,6", "GPU-8932f937-d72c"),
        (0, "MIG-GPU-1/1/0", "MIG-GPU-1/1/0"),
    ],
)
def test_gpu_index_counts_visible_gpus(gpu: int, mask: str | None, pinned: str) -> None:
    assert visible_gpu(gpu, mask) == pinned


@pytest.mark.parametrize(("gpu", "mask", "count"), [(2, "4,5", 2), (0, "", 0), (0, " ", 0), (0, "-1", 0), (1, "3,-1,4", 1)])
def test_hidden_gpu_is_refused(gpu: int, mask: str, count: int) -> None:
    assert len(visible_gpus(mask)) == count
    with pytest.raises(ConfigurationError, match=f"GPU {gpu} does not exist: CUDA_VISIBLE_DEVICES='{mask}' exposes {count}"):
        visible_gpu(gpu, mask)


def test_gpu_child_sees_one_gpu_and_its_share_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    pin(Device(gpu=1, threads=3))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    assert os.environ["HF_HUB_OFFLINE"] == "1", "a worker downloads no weights"
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == ("3", "1", "3")


@pytest.mark.parametrize("mask", [None, "0,1"])
def test_cpu_child_sees_no_gpu(mask: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    pin(Device(threads=2))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(("preset", "expected"), [(None, "1"), ("8", "8")])
def test_pin_keeps_malloc_arena_max_of_the_operator(preset: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if preset is not None:
        monkeypatch.setenv("MALLOC_ARENA_MAX", preset)
    pin(Device())
    assert os.environ["MALLOC_ARENA_MAX"] == expected


@pytest.mark.parametrize(("cores", "children", "share"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 8, 1), (1, 1, 1)])
def test_cores_are_shared_with_at_least_one_each(
    cores: int, children: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert share_of_cores(children) == share


def test_device_names() -> None:
    assert [Device().name, Device(gpu=0).name, Device(gpu=3).name] == ["cpu", "gpu0", "gpu3"]
