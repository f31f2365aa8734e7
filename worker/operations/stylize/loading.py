"""Loading of models from local safetensors files only, and of what belongs to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

Part = TypeVar("Part")


class LoadPart(Protocol):
    """Makes room for a part of a model, and calls `load` (OpenModel.load_part)."""

    def __call__(self, part: str, size: int, load: Callable[[], Part]) -> Part:
        """`size` is in bytes. Raises ModelUnavailable."""


def load_at_once(part: str, size: int, load: Callable[[], Part]) -> Part:  # noqa: ARG001
    """Load a part for a model that is the only one."""
    return load()


def from_disk(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained`: local safetensors only, in half precision if they were pulled in it."""
    half = any(folder.rglob("*.fp16*.safetensors"))
    return dict(dtype=dtype, variant="fp16" if half else None, use_safetensors=True, local_files_only=True)


def check_finite(network: torch.nn.Module) -> None:
    """Raise ValueError if a weight is infinite or not a number, as in a damaged file or one for another precision."""
    wrong = next((name for name, weights in network.named_parameters() if not weights.isfinite().all()), None)
    if wrong is not None:
        raise ValueError(f"it has values that are not finite numbers, in {wrong}")
