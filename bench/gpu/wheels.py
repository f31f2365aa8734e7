"""Collect the wheels that `python3 -m bench.gpu` needs besides torch, for a machine without network.

    python3 -m bench.gpu.wheels [FOLDER] [--python 3.12]        the version is that of the machine with the GPU

They are for Linux on x86-64 and have the versions in constraints.txt. OpenCV's own wheel takes 61 MB, most of it for video
and neural networks, so its source is built without those. That takes a C++ compiler and a quarter of an hour of two cores,
and the result needs a glibc as new as the one it was built with, at most 2.35.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 60.0
"""Most megabytes in all."""

PACKAGES = (
    *("numpy", "pillow", "simplejpeg", "isal", "psutil", "nvidia-ml-py"),
    *("diffusers", "transformers", "tokenizers", "safetensors", "huggingface-hub", "importlib-metadata", "zipp"),
    *("regex", "pyyaml", "packaging", "tqdm", "requests", "charset-normalizer", "urllib3", "certifi"),
    *("httpx2", "httpcore2", "h11", "anyio", "idna", "truststore"),
    *("pydantic", "pydantic-core", "pydantic-settings", "annotated-types", "typing-inspection", "python-dotenv"),
    *("billiard", "redis"),
)
"""What is imported. Metadata name more, such as libraries for downloads, so these are installed without dependencies."""

SQUEEZED = ("numpy", "opencv", "pillow")
"""The largest with machine code."""

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64", "manylinux2010_x86_64")

OPENCV = "opencv-python-headless"
BUILD = {
    "BUILD_LIST": "core,imgproc,python3",
    "CPU_DISPATCH": "AVX2,AVX512_SKX",
    # The C++ library of the machine with the GPU may be older.
    "CMAKE_MODULE_LINKER_FLAGS": "'-static-libstdc++ -static-libgcc'",
    # IPP would be downloaded; the rest is for modules that are left out.
    **dict.fromkeys(("WITH_IPP", "WITH_ADE", "WITH_FFMPEG", "WITH_LAPACK", "WITH_OPENCL", "WITH_ITT"), "OFF"),
    **dict.fromkeys(("WITH_PROTOBUF", "WITH_FLATBUFFERS", "WITH_V4L", "BUILD_TESTS", "BUILD_PERF_TESTS"), "OFF"),
}
"""CMake's options: the two modules that are used, and what they need. Without Intel's IPP, some functions are slower."""


def collect(folder: Path, python: str) -> None:
    """Download the wheels, and build OpenCV's unless it is there."""
    platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    _pip("download", "--only-binary=:all:", f"--python-version={python}", *platforms, f"--dest={folder}", *PACKAGES)
    if not any(folder.glob("opencv*.whl")):
        with tempfile.TemporaryDirectory(prefix="imagemill-opencv-") as place:
            build_opencv(Path(place), folder)
    for name in SQUEEZED:
        for wheel in folder.glob(f"{name}*.whl"):
            squeeze(wheel)


def build_opencv(place: Path, folder: Path) -> None:
    """Build OpenCV's wheel in `place`. It works with any Python from 3.7, as it has the stable ABI."""
    _pip("download", f"--no-binary={OPENCV}", f"--dest={place}", OPENCV)
    (archive,) = place.glob("*.tar.gz")
    shutil.unpack_archive(archive, place)
    (source,) = (path for path in place.iterdir() if path.is_dir())
    setup = source / "setup.py"
    # Its type hints can't be generated without the modules that are left out, and it refuses to go without.
    text = setup.read_text().replace('r"python/cv2/py.typed"', "")
    setup.write_text(text.replace('["python/cv2" + r"/typing/.*\\.py"]', "[]"))
    options = " ".join(f"-D{name}={value}" for name, value in BUILD.items())
    cores = str(len(os.sched_getaffinity(0)))
    environment = {"CMAKE_ARGS": options, "ENABLE_HEADLESS": "1", "CMAKE_BUILD_PARALLEL_LEVEL": cores}
    _pip("wheel", f"--wheel-dir={folder}", str(source), environment=environment)


def squeeze(wheel: Path) -> None:
    """Compress a wheel's files by LZMA, which takes a quarter less; Python's zipfile, and so pip, reads that as well."""
    new = wheel.with_suffix(".new")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(new, "w", zipfile.ZIP_LZMA) as target:
        for entry in source.infolist():
            target.writestr(entry, source.read(entry), zipfile.ZIP_LZMA)
    new.replace(wheel)


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--constraint", str(ROOT / "constraints.txt"), *arguments[1:]]
    subprocess.run(command, check=True, env=os.environ | (environment or {}))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu.wheels", description="Collect the wheels for bench.gpu.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "gpu-wheels", help="default: gpu-wheels")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python", default=here, help=f"Python version of the machine with the GPU; default: {here}")
    arguments = parser.parse_args()
    collect(arguments.folder, arguments.python)
    sizes = {path.name: path.stat().st_size / 1e6 for path in sorted(arguments.folder.glob("*.whl"))}
    for name, size in sorted(sizes.items(), key=lambda entry: -entry[1]):
        print(f"{size:6.2f} MB  {name}")
    total = sum(sizes.values())
    print(f"{total:6.2f} MB  in all, of at most {LARGEST:g}")
    return int(total > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
