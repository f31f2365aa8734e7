"""Finding the GPUs of a host; tests/integration/test_supervisor.py runs nodes on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagemill.worker.node.supervisor import find_gpus

TWO = "GPU 0: NVIDIA H200 (UUID: GPU-8932f937)\n  MIG 1g.18gb Device 0: (UUID: MIG-1)\nGPU 1: NVIDIA H200 (UUID: GPU-e02f)\n"


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def fake_nvidia_smi(path: Path, lines: str, status: int = 0) -> None:
    """Create an `nvidia-smi` that prints `lines` for `-L` and fails otherwise."""
    script = path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\n[ "$*" = "-L" ] || exit 9\nprintf %s "{lines}"\nexit {status}\n')
    script.chmod(0o755)


@pytest.mark.parametrize(
    ("lines", "status", "found"), [(TWO, 0, [0, 1]), ("", 0, []), ("No devices were found", 6, []), (TWO, 9, [])]
)
def test_find_gpus_counts_the_gpus_that_nvidia_smi_lists(lines: str, status: int, found: list[int], path: Path) -> None:
    fake_nvidia_smi(path, lines, status)
    assert find_gpus() == found


def test_find_gpus_returns_none_without_nvidia_smi() -> None:
    assert find_gpus() == []


def test_find_gpus_returns_none_when_nvidia_smi_cannot_run(path: Path) -> None:
    fake_nvidia_smi(path, TWO)
    (path / "nvidia-smi").chmod(0o644)
    assert find_gpus() == []


@pytest.mark.parametrize(
    ("mask", "found"),
    [("4,5,6", [0, 1, 2]), ("GPU-8932f937, GPU-e02f", [0, 1]), ("", []), (" ", []), ("-1", []), ("1,-1,2", [0])],
)
def test_find_gpus_respects_cuda_visible_devices(
    mask: str, found: list[int], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvidia_smi(path, TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert find_gpus() == found
