"""The GPU that a child sees, and its share of the cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imagemill.shared.errors import ConfigurationError
from imagemill.shared.settings import Settings, WorkerSettings
from imagemill.worker.hardware import device, model_memory
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


@pytest.mark.parametrize(
    ("cores", "children", "nodes", "quota", "share"),
    [
        (8, 1, 1, None, 8),
        (8, 2, 1, None, 4),
        (8, 3, 1, None, 2),
        (2, 8, 1, None, 1),
        (1, 1, 1, None, 1),
        (32, 1, 8, None, 4),
        (32, 1, 1, "max 100000", 32),
        (32, 1, 1, "400000 100000", 4),
        (32, 2, 1, "400000 100000", 2),
        (32, 1, 8, "800000 100000", 4),
        (32, 1, 8, "50000 100000", 1),
    ],
)
def test_cores_are_shared_with_at_least_one_each(
    cores: int, children: int, nodes: int, quota: str | None, share: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota)
    monkeypatch.setattr(device, "CPU_QUOTA", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert share_of_cores(children, nodes) == share


@pytest.mark.parametrize(
    ("settings", "gpus", "threads"),
    [({}, 1, 32), ({"gpu": 2}, 8, 4), ({"gpu": 2}, 1, 32), ({"gpu": 0, "expect_gpus": 8}, 1, 4), ({"expect_gpus": 8}, 1, 32)],
)
def test_nodes_of_a_host_share_its_cores(
    settings: dict[str, int], gpus: int, threads: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "CPU_QUOTA", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    worker = WorkerSettings.model_validate(settings)
    assert Device.of(Settings(_env_file=None, worker=worker), 1, gpus=gpus).threads == threads  # type: ignore[call-arg]


def test_device_names() -> None:
    assert [Device().name, Device(gpu=0).name, Device(gpu=3).name] == ["cpu", "gpu0", "gpu3"]


@pytest.mark.parametrize(
    ("given", "gpu", "limit"),
    [
        (5_000, None, 5_000),
        (0, 0, 0),
        (None, None, 1_000_000),  # a quarter of 16 MB, of which four children get a part each
        (None, 0, None),  # known once the child has its GPU
    ],
)
def test_memory_for_models_is_as_set_or_a_part_of_what_there_is(
    given: int | None, gpu: int | None, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "main_memory", lambda: 16_000_000)
    settings = Settings(_env_file=None, worker=WorkerSettings(gpu=gpu, model_memory=given))  # type: ignore[call-arg]
    assert Device.of(settings, 4).models.limit == limit


@pytest.mark.parametrize(("content", "limited"), [("3000000", True), ("max", False), (None, False)])
def test_main_memory_is_the_containers_if_less(
    content: str | None, limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "memory.max"
    if content is not None:
        file.write_text(f"{content}\n")
    monkeypatch.setattr(model_memory, "CGROUP_LIMIT", file)
    assert (model_memory.main_memory() == 3_000_000) is limited
