"""A stand-in for the published model u2netp, for processes that check what they download."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tests.workers import ROOT

PATH = "/danielgatis/rembg/releases/download/v0.0.0/u2netp.onnx"
"""Of the model on a mirror."""


def python_path(model: bytes, folder: Path) -> str:
    """A PYTHONPATH for processes whose catalogue has the checksum of `model`; `folder` is for a module that they load.

    Python imports `sitecustomize` before anything else, so the children of these processes use that checksum too.
    """
    lines = [
        "from dataclasses import replace",
        "from imagemill.worker.models import catalogue",
        f"checksum = 'sha256:{hashlib.sha256(model).hexdigest()}'",
        "weights = (replace(row, checksum=checksum) if row.name == 'u2netp' else row for row in catalogue.WEIGHTS)",
        "catalogue.WEIGHTS = tuple(weights)",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    return os.pathsep.join([str(folder), str(ROOT / "src"), str(ROOT)])
