"""Faults planted on a worker's host, and what `imagemill doctor` says about them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.settings import Settings
from imagemill.worker.node.checks import host
from imagemill.worker.node.checks.gpu import check_builds
from tests.unit.worker.node.doctors import Doctor, findings, listed, problems, unreachable
from tests.workers import clean_environment

SMI = """#!/bin/sh
if [ "$1" = -L ]; then for i in $(seq {count}); do echo "GPU $i: NVIDIA L4 (UUID: GPU-$i)"; done; exit; fi
echo "==============NVSMI LOG=============="
echo "Driver Version                            : {driver}"
echo "CUDA Version                              : {cuda}"
"""
Plant = Callable[..., None]


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Puts a stand-in for nvidia-smi on the PATH."""

    def plant(count: int, driver: str = "570.86.15", cuda: str = "12.8") -> None:
        folder = tmp_path / "smi"
        folder.mkdir()
        (folder / "nvidia-smi").write_text(SMI.format(count=count, driver=driver, cuda=cuda))
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return plant


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Puts packages on Python's path that consist of their names and of what they say about their builds."""

    def plant(package: str, file: str, content: str, *names: str) -> None:
        site = tmp_path / "site"
        (site / package / file).parent.mkdir(parents=True, exist_ok=True)
        (site / package / "__init__.py").touch()
        (site / package / file).write_text(content)
        for name in names:
            (site / f"{name}-1.0.dist-info").mkdir()
            (site / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, package, raising=False)

    return plant


def settings(*engines: str) -> Settings:
    return Settings(_env_file=None, worker={"engines": engines})  # type: ignore[call-arg]


def builds(*engines: str) -> list[tuple[str, str, str]]:
    return [(finding.state, finding.found, finding.fix) for finding in check_builds(settings(*engines))]


TORCH = (
    "from typing import Optional\n__all__ = ['__version__', 'cuda']\n__version__ = '2.13.0'\ncuda: Optional[str] = {cuda!r}\n"
)
ONNX = "package_name = 'onnxruntime-gpu'\n__version__ = '1.31.1'\ncuda_version = '{cuda}'\n"


@pytest.mark.parametrize("built_for", ["13.0", "13.2"])
def test_driver_too_old_for_the_cuda_of_torch(built_for: str, gpus: Plant, installed: Plant) -> None:
    gpus(2, "535.183.01", "12.2")
    installed("torch", "version.py", TORCH.format(cuda=built_for))
    ((state, found, fix),) = builds("lama")
    assert state == "failed"
    assert found == f"torch was built for CUDA {built_for}, but the driver 535.183.01 supports only CUDA 12.2"
    assert "update the NVIDIA driver" in fix


def test_driver_too_old_for_the_cuda_of_onnxruntime(gpus: Plant, installed: Plant) -> None:
    gpus(1, "470.57.02", "11.4")
    installed("onnxruntime", "capi/build_and_package_info.py", ONNX.format(cuda="12.8"))
    ((state, found, _),) = builds("rembg")
    assert (state, "onnxruntime was built for CUDA 12.8" in found) == ("failed", True)


@pytest.mark.parametrize("built_for", ["12.8", "12.6", "11.8"])
def test_driver_that_suits_torch(built_for: str, gpus: Plant, installed: Plant) -> None:
    gpus(2, "550.54.15", "12.4")
    installed("torch", "version.py", TORCH.format(cuda=built_for))
    ((state, _, fix),) = builds("diffusion", "lama")
    assert (state, fix) == ("ok", "")


def test_builds_for_cpus_on_a_host_with_gpus(gpus: Plant, installed: Plant) -> None:
    gpus(1)
    installed("torch", "version.py", TORCH.format(cuda=None))
    installed("onnxruntime", "capi/build_and_package_info.py", "package_name = 'onnxruntime'\n__version__ = '1.31.1'\n")
    onnx, torch = builds("rembg", "lama")
    assert (onnx[0], onnx[1]) == ("warning", "this host has GPUs, but onnxruntime is a build for CPUs only")
    assert "pip install 'imagemill[rembg-gpu]'" in onnx[2]
    assert (torch[0], torch[1]) == ("warning", "this host has GPUs, but torch is a build for CPUs only")
    assert "builds for CUDA 12.8" in torch[2]
    assert builds("opencv") == []


def test_driver_without_cuda(gpus: Plant, installed: Plant) -> None:
    gpus(1, cuda="N/A")
    installed("torch", "version.py", TORCH.format(cuda="12.8"))
    ((state, found, fix),) = builds("lama")
    assert (state, found) == ("warning", "nvidia-smi lists GPUs, but no version of CUDA")
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in fix


def test_two_builds_of_onnxruntime(installed: Plant) -> None:
    info = "capi/build_and_package_info.py"
    installed("onnxruntime", info, ONNX.format(cuda="12.8"), "onnxruntime", "onnxruntime_gpu")
    ((state, found, fix),) = builds("rembg")
    assert (state, "both installed" in found) == ("failed", True)
    assert fix.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install")


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from imagemill.worker.node import doctor; sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=clean_environment(), timeout=60)


def test_fewer_gpus_than_expected(gpus: Plant, doctor: Doctor, redis_server: EmbeddedRedis) -> None:
    gpus(7)
    result = doctor(redis_server.url, "--json", CUDA_VISIBLE_DEVICES=None, IMAGEMILL_WORKER__EXPECT_GPUS="8")
    assert result.exit_code == 3, "Redis responds, but S3 does not"
    (problem,) = [problem for problem in problems(result) if problem[0] == "gpu"]
    assert problem[1:3] == ("failed", "7 of 8 expected GPUs are present")
    assert "nvidia-smi -L" in problem[3]


@pytest.mark.parametrize("content", [None, b"not a model"])
def test_model_that_is_missing_or_damaged(
    content: bytes | None, doctor: Doctor, redis_server: EmbeddedRedis, tmp_path: Path
) -> None:
    file = tmp_path / "weights" / "rembg" / "u2netp.onnx"
    if content is not None:
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
    result = doctor(
        *(redis_server.url, "--json"),
        IMAGEMILL_WORKER__ENGINES='["rembg"]',
        IMAGEMILL_WEIGHTS__FOLDER=str(tmp_path / "weights"),
    )
    (problem,) = [problem for problem in problems(result) if problem[0] == "models" and "pull" in problem[3]]
    if content is None:
        assert problem[1:3] == ("failed", f"no model of the engine rembg is in {file.parent}")
    else:
        assert problem[1:] == ("warning", "u2netp is damaged, or not the published file", "imagemill models pull u2netp")


def nearly_full(folder: Path, monkeypatch: pytest.MonkeyPatch, **change: int) -> None:
    """Have the system say that a folder's file system has little space left."""
    ask = os.statvfs

    def stand_in(path: os.PathLike[str] | str) -> object:
        real = ask(path)
        if Path(path) != folder:
            return real
        plain = {name: getattr(real, name) for name in dir(real) if name.startswith("f_")}
        return SimpleNamespace(**(plain | change))

    monkeypatch.setattr(os, "statvfs", stand_in)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"f_frsize": 4096, "f_bavail": 256}, "has 1.0 MiB free"),
        ({"f_frsize": 4096, "f_bavail": 2**30, "f_files": 2**20, "f_favail": 3}, "has 4096.0 GiB free and room for 3 files"),
    ],
)
def test_disk_of_results_that_is_nearly_full(
    change: dict[str, int],
    found: str,
    doctor: Doctor,
    redis_server: EmbeddedRedis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    nearly_full(results, monkeypatch, **change)
    result = doctor(redis_server.url, "--json", IMAGEMILL_FILES__WRITE_ROOTS=f'["{results}"]')
    (problem,) = [problem for problem in problems(result) if str(results) in problem[2]]
    assert problem[:3] == ("disk", "warning", f"{results} {found}")
    assert f"du -xh {results}" in problem[3]


def test_folder_of_results_that_does_not_exist(doctor: Doctor, redis_server: EmbeddedRedis, tmp_path: Path) -> None:
    missing = tmp_path / "results"
    result = doctor(redis_server.url, "--json", IMAGEMILL_FILES__WRITE_ROOTS=f'["{missing}"]')
    (problem,) = [problem for problem in problems(result) if problem[0] == "disk"]
    assert problem[1:3] == ("failed", f"{missing} is not a folder")
    assert problem[3].startswith(f"mkdir -p {missing}")


def test_output_folder_outside_the_write_roots(doctor: Doctor, redis_server: EmbeddedRedis, tmp_path: Path) -> None:
    result = doctor(redis_server.url, "--json", "--output", tmp_path.as_uri())
    (problem,) = [problem for problem in problems(result) if problem[0] == "disk"]
    assert problem[1] == "failed"
    assert "IMAGEMILL_FILES__WRITE_ROOTS" in problem[3]
    allowed = doctor(
        *(redis_server.url, "--json", "--output", tmp_path.as_uri()), IMAGEMILL_FILES__WRITE_ROOTS=f'["{tmp_path}"]'
    )
    assert f"{tmp_path.as_uri()} is a folder that results may be written to" in [one["found"] for one in listed(allowed)]


def test_shared_memory_that_is_too_small(doctor: Doctor, redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    nearly_full(host.SHARED_MEMORY, monkeypatch, f_frsize=4096, f_bavail=16)
    found = findings(doctor(redis_server.url, "--json"))["memory"]
    assert found["state"] == "warning"
    assert found["found"].startswith(f"{host.SHARED_MEMORY} has 0.1 MiB free")
    assert "docker run --shm-size 64m" in found["fix"]


def test_host_without_a_workers_packages() -> None:
    """As in the tools image."""
    packages = ("numpy", "cv2", "pycurl", "PIL", "psutil", "isal", "simplejpeg", "certifi", "idna", "onnxruntime", "torch")
    code = f"import sys; sys.modules.update(dict.fromkeys({packages})); from imagemill.producer.cli import main; main()"
    environment = clean_environment(IMAGEMILL_REDIS_URL=unreachable())
    command = [sys.executable, "-c", code, "doctor", "--json", "--output", "file:///results"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert result.returncode == 3, result.stderr
    assert "run imagemill doctor on the workers' hosts" in result.stdout
    assert '"models"' not in result.stdout
