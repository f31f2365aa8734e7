"""Stand-ins for libraries that the measured code imports but never calls here, for machines that don't have them.

The network and the store are fake, and U^2-Net runs in torch, so neither libcurl nor boto3 nor onnxruntime need to travel.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

NAMES = ("boto3", "botocore", "brotli", "onnxruntime", "pycurl", "zstandard")

VERSION = "not installed"


class _Absent(ModuleType):
    """Whatever is imported from it is an exception's class, which may stand in `except` and does nothing else."""

    __version__ = VERSION

    def __getattr__(self, name: str) -> type[Exception]:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})


class _Finder(MetaPathFinder, Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self._names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def stand_in() -> list[str]:
    """Make those libraries importable that are not installed, and return their names. Hide torchvision."""
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # not needed, and one that doesn't match torch breaks imports
    absent = [name for name in NAMES if find_spec(name) is None]
    sys.meta_path.append(_Finder(absent))
    return absent
