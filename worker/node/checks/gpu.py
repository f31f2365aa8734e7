"""Checks of GPUs: are they there, and does the driver fit what is installed?

They read version numbers from files and ask nvidia-smi: importing torch takes seconds, and this process must not create a CUDA
context.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from imagemill.shared.engines import ENGINES
from imagemill.shared.settings import Settings
from imagemill.worker.node.checks.finding import Finding
from imagemill.worker.node.supervisor import find_gpus

BUILDS = {"onnxruntime": "capi/build_and_package_info.py", "torch": "version.py"}
"""The file in each package that says for which CUDA it was built."""
EXTRAS = {"rembg": "onnxruntime", "lama": "torch", "diffusion": "torch"}
"""The package that each extra runs its models on."""
INSTALL = {
    "onnxruntime": "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'imagemill[rembg-gpu]'",
    "torch": "pip uninstall -y torch && pip install torch, from the package index of PyTorch's builds for CUDA {cuda}",
}


def check_gpu(_settings: Settings) -> Iterator[Finding]:
    """Which GPUs does this host have?"""
    gpus = find_gpus()
    if gpus:
        yield Finding("gpu", "ok", f"{len(gpus)} GPUs")
    elif os.path.exists("/proc/driver/nvidia"):  # noqa: PTH110
        yield Finding("gpu", "warning", "the driver is loaded, but nvidia-smi lists no GPU", "run nvidia-smi")
    else:
        yield Finding("gpu", "ok", "no GPU; the opencv engines don't need one")


def check_builds(settings: Settings) -> Iterator[Finding]:
    """Are the runtimes of the configured engines built for CUDA, and for one that the driver supports?"""
    if all(_installed(name) for name in ("onnxruntime", "onnxruntime-gpu")):
        found = "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other's files"
        yield Finding("gpu", "failed", found, INSTALL["onnxruntime"])
    files = {package: file for package in sorted(_packages(settings)) if (file := _build_file(package)) is not None}
    if not files or not find_gpus():
        return
    driver = driver_and_cuda()
    if driver is None:
        fix = "run nvidia-smi -q; in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        yield Finding("gpu", "warning", "nvidia-smi lists GPUs, but no version of CUDA", fix)
        return
    for package, file in files.items():
        yield from _suits(package, cuda_of(file), *driver)


def _suits(package: str, cuda: str | None, driver: str, supported: str) -> Iterator[Finding]:
    """Every CUDA with the driver's major version runs on it, and every earlier one."""
    if cuda is None:
        fix = INSTALL[package].format(cuda=supported)
        yield Finding("gpu", "warning", f"this host has GPUs, but {package} is a build for CPUs only", fix)
    elif _major(cuda) > _major(supported):
        found = f"{package} was built for CUDA {cuda}, but the driver {driver} supports only CUDA {supported}"
        fix = f"update the NVIDIA driver (nvidia-smi shows it), or install a build of {package} for CUDA {supported}"
        yield Finding("gpu", "failed", found, fix)
    else:
        yield Finding("gpu", "ok", f"{package} for CUDA {cuda}; the driver {driver} supports CUDA {supported}")


def _packages(settings: Settings) -> set[str]:
    """The runtimes that the configured engines need on a GPU."""
    engines = {row.extra for row in ENGINES if row.name in settings.worker.engines}
    packages = {EXTRAS[extra] for extra in engines if extra in EXTRAS}
    return packages - ({"onnxruntime"} if settings.onnx.provider == "cpu" else set())


def driver_and_cuda() -> tuple[str, str] | None:
    """The versions of the driver and of the latest CUDA that it supports, from nvidia-smi; None if it doesn't say."""
    try:
        report = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, timeout=20, check=True).stdout  # noqa: S607
    except (OSError, subprocess.SubprocessError):
        return None
    driver = re.search(r"^Driver Version\s*:\s*([\d.]+)", report, re.MULTILINE)
    cuda = re.search(r"^CUDA (?:UMD )?Version\s*:\s*(\d+\.\d+)", report, re.MULTILINE)
    return (driver[1], cuda[1]) if driver and cuda else None


def _build_file(package: str) -> Path | None:
    """The file that says for which CUDA an installed package was built; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / BUILDS[package]
    return file if file.is_file() else None


def cuda_of(file: Path) -> str | None:
    """The version of CUDA that such a file names; None for a build for CPUs."""
    line = re.search(r"^cuda(?:_version)?\b[^=\n]*=\s*['\"]([\d.]+)['\"]", file.read_text(encoding="utf-8"), re.MULTILINE)
    return line[1] if line else None


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _major(version: str) -> int:
    return int(version.partition(".")[0])
