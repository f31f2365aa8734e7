"""Command line and output of the GPU benchmarks."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable

from bench.figures import Figure


def parse_arguments(name: str, description: str, minutes: float = 8.0) -> argparse.Namespace:
    """`minutes` (the time limit), and `cpu` and `small`, which are always equal: both test the program without a GPU."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.gpu.{name}", description=description)
    parser.add_argument("--minutes", type=float, default=minutes, help="time limit; whatever exceeds it is skipped")
    parser.add_argument("--cpu", action="store_true", help="test this program on the CPU; requires --small")
    parser.add_argument("--small", action="store_true", help="use a small model; requires --cpu")
    arguments = parser.parse_args()
    if arguments.cpu != arguments.small:
        parser.error("use --cpu and --small together; they only test the program")
    return arguments


def check_torch(cpu: bool) -> bool:
    """Print the device and torch's version; False, with a message, if torch has no GPU to use."""
    import torch

    if not cpu and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no GPU; to test this program, use --cpu --small", file=sys.stderr)
        return False
    device = "CPU" if cpu else torch.cuda.get_device_name()
    print_line(device=device, torch=torch.__version__, date=time.strftime("%Y-%m-%d"))
    return True


def print_line(**fields: object) -> None:
    """Print a JSON object at once, as a run may be cut off."""
    print(json.dumps(fields), flush=True)


def print_figures(figures: Iterable[Figure]) -> int:
    """Print each figure as soon as it is measured; exit status 1 if a goal is missed."""
    held = []
    for figure in figures:
        held.append(figure["holds"])
        print_line(**figure)
    return int(False in held)
