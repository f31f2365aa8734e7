"""How soon a node works: from import to first image, for the engine alone and for one that imports rembg whole.

Each start is a process of its own, the two sides by turns; the model is U2Net's small sibling, so that what is measured
is the start and not the model.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.models import u2net_onnx

GOAL = 0.5
MODEL = "u2netp"
WIDTH = 10  # 1.1 M parameters, as u2netp has

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
    """From before the first import to after the first image, in a new process; the interpreter's own start is not in it."""
    environment = {**os.environ, "U2NET_HOME": str(weights / "rembg"), "MODEL_CHECKSUM_DISABLED": "1"}
    command = [sys.executable, "-W", "ignore", "-c", TIMED.format(program), str(weights), MODEL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def run(rounds: int = 5) -> list[dict[str, Any]]:
    """The figures, for a table of benchmarks."""
    with tempfile.TemporaryDirectory() as folder:
        u2net_onnx(Path(folder) / "rembg" / f"{MODEL}.onnx", width=WIDTH)
        seconds(OURS, Path(folder)), seconds(THEIRS, Path(folder))  # files into the page cache, numba's code into its own
        pairs = [(seconds(OURS, Path(folder)), seconds(THEIRS, Path(folder))) for _ in range(rounds)]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    name = "start of a rembg node, import to first image"
    return [
        {
            "name": f"{name}: engine / rembg whole",
            "value": ratio,
            "goal": GOAL,
            "unit": "",
            "holds": ratio <= GOAL,
            "rounds": rounds,
        },
        {"name": f"{name}: engine", "value": ours, "goal": None, "unit": "s", "holds": None, "rounds": rounds},
        {"name": f"{name}: rembg whole", "value": theirs, "goal": None, "unit": "s", "holds": None, "rounds": rounds},
    ]


if __name__ == "__main__":
    for figure in run():
        print(f"{figure['name']}: {figure['value']:.3f} {figure['unit']}".rstrip())
