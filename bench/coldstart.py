"""How fast a node starts, from import to first image: the rembg engine compared with the rembg library.

    python -m bench.coldstart [ROUNDS]

Each start is a new process, and the two sides alternate. The model is u2netp, U2Net's small version, so that the start
dominates and not the model.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.figures import Figure, figure, print_figures
from tests.models import u2net_onnx

GOAL = 0.5
MODEL = "u2netp"
WIDTH = 10  # 1.1 M parameters, like u2netp

OURS = """
from pathlib import Path
import sys
import numpy as np
from imagemill.shared.messages import Item
from imagemill.shared.engines import parse_options
from imagemill.worker.hardware.device import Device, share_of_cores
from imagemill.worker.operations import registry
from imagemill.worker.operations.base import Inputs
from imagemill.worker.imaging.picture import Picture

operation = registry.create("remove-background", "rembg")
operation.load(Device(threads=share_of_cores(1), weights=Path(sys.argv[1])))
options = parse_options("remove-background", "rembg", {"model": sys.argv[2]})
pixels = np.random.default_rng(0).integers(0, 256, (400, 600, 3), np.uint8)
work = operation.prepare(Picture(pixels), Inputs(Item(index=0, source="https://bench.example/one.png"), options))
made = operation.finish(work, operation.run(work.samples)).pixels
assert made.shape == (400, 600, 4)
"""
THEIRS = """
import sys
import numpy as np
import rembg

session = rembg.new_session(sys.argv[2], providers=["CPUExecutionProvider"])
pixels = np.random.default_rng(0).integers(0, 256, (400, 600, 3), np.uint8)
made = rembg.remove(pixels, session=session)
assert made.shape == (400, 600, 4)
"""
TIMED = "import time as _time\n_start = _time.perf_counter()\n{}\nprint(_time.perf_counter() - _start)"


def seconds(program: str, weights: Path) -> float:
    """Time from the first import to the first image in a new process, without the interpreter's start."""
    environment = {**os.environ, "U2NET_HOME": str(weights / "rembg"), "MODEL_CHECKSUM_DISABLED": "1"}
    command = [sys.executable, "-W", "ignore", "-c", TIMED.format(program), str(weights), MODEL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def run(rounds: int = 5) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        u2net_onnx(Path(folder) / "rembg" / f"{MODEL}.onnx", width=WIDTH)
        seconds(OURS, Path(folder)), seconds(THEIRS, Path(folder))  # fill the page cache and numba's cache
        pairs = [(seconds(OURS, Path(folder)), seconds(THEIRS, Path(folder))) for _ in range(rounds)]
    name = "start of a rembg node, import to first image"
    return [
        figure(f"{name}: engine / rembg library", [ours / theirs for ours, theirs in pairs], "", GOAL, at_most=True),
        figure(f"{name}: engine", [ours for ours, _ in pairs], "s"),
        figure(f"{name}: rembg library", [theirs for _, theirs in pairs], "s"),
    ]


if __name__ == "__main__":
    print_figures(run)
