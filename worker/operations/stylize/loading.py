"""Loading of models from local safetensors files only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def from_disk(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained`: local safetensors only, in half precision if they were pulled in it."""
    half = any(folder.rglob("*.fp16*.safetensors"))
    return dict(dtype=dtype, variant="fp16" if half else None, use_safetensors=True, local_files_only=True)
