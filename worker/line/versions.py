"""The versions of everything installed here that affects a result."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    *("imagemill", "isal", "numpy", "opencv-python-headless", "pillow", "pillow-heif", "pillow-jxl-plugin", "simplejpeg"),
    *("onnxruntime", "torch", "diffusers", "transformers", "peft"),
)


@cache
def versions() -> dict[str, str]:
    """The installed packages that affect a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
