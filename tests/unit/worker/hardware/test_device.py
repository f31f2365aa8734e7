"""Which GPU a child sees, and its share of the cores."""

from __future__ import annotations

import os

import pytest

from imagemill.worker.hardware.device import Device, pin, share_of_cores, visible_gpu, visible_gpus

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `pin` sets is as it was afterwards."""
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
def test_a_gpu_is_counted_among_those_that_are_visible(gpu: int, mask: str | None, pinned: str) -> None:
    assert visible_gpu(gpu, mask) == pinned


@pytest.mark.parametrize(("gpu", "mask", "left"), [(2, "4,5", 2), (0, "", 0), (0, " ", 0), (0, "-1", 0), (1, "3,-1,4", 1)])
def test_a_gpu_that_the_mask_hides_is_not_there(gpu: int, mask: str, left: int) -> None:
    assert len(visible_gpus(mask)) == left
    with pytest.raises(ValueError, match=f"there is no GPU {gpu}: CUDA_VISIBLE_DEVICES={mask} leaves {left}"):
        visible_gpu(gpu, mask)


def test_a_child_of_a_gpu_sees_that_gpu_and_keeps_to_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    pin(Device(gpu=1, threads=3))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    assert os.environ["HF_HUB_OFFLINE"] == "1", "a worker fetches no weights"
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == ("3", "1", "3")


@pytest.mark.parametrize("mask", [None, "0,1"])
def test_a_child_of_the_cpu_sees_no_gpu(mask: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    pin(Device(threads=2))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(("operator", "kept"), [(None, "1"), ("8", "8")])
def test_the_operators_own_number_of_arenas_stays(operator: str | None, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if operator is not None:
        monkeypatch.setenv("MALLOC_ARENA_MAX", operator)
    pin(Device())
    assert os.environ["MALLOC_ARENA_MAX"] == kept


@pytest.mark.parametrize(("cores", "children", "share"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 8, 1), (1, 1, 1)])
def test_cores_are_shared_and_nobody_gets_none(cores: int, children: int, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert share_of_cores(children) == share


def test_names_of_devices() -> None:
    assert [Device().name, Device(gpu=0).name, Device(gpu=3).name] == ["cpu", "gpu0", "gpu3"]
