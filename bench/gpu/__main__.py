"""Measure Stable Diffusion with a ControlNet, LaMa and U^2-Net on an NVIDIA GPU, bare and through the line.

    python3 -m bench.gpu [--minutes 8] [--out FOLDER]      exit status 1 if a goal is missed or a section fails
    python3 -m bench.gpu --cpu --small                     a dry run: everything at tiny size on the CPU, to test this program

It needs torch 2.11 or newer and the wheels of bench/gpu/wheels.py, but no network. Weights are random. Results are written
after every figure to results-gpu.json and RESULTS.md in `--out`, by default bench/ or, in a dry run, a temporary folder.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = (2, 11)
LAST = 15.0
"""Seconds kept for starting and ending."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu", description="Measure the neural engines on a GPU.")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit; sections that exceed it are skipped")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--cpu", action="store_true", help="test this program on the CPU; requires --small")
    parser.add_argument("--small", action="store_true", help="use tiny models; requires --cpu")
    parser.add_argument("--only", action="append", metavar="TEXT", help="only sections whose name contains this; repeatable")
    arguments = parser.parse_args()
    if arguments.cpu != arguments.small:
        parser.error("use --cpu and --small together; they only test the program")
    prepare_process(gpu=None if arguments.cpu else 0)
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH:
        parser.error(f"this needs torch 2.11 or newer, and here is {torch.__version__}")
    if not arguments.cpu and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no GPU; to test this program, use --cpu --small")
    return measure(arguments)


def prepare_process(gpu: int | None) -> None:
    """What a node does before it imports torch. The checkout itself is enough: imagemill need not be installed."""
    sys.path.insert(0, str(ROOT / "src"))
    from bench.gpu.absent import stand_in

    stand_in()
    from imagemill.worker.hardware.device import Device, pin

    pin(Device(gpu=gpu, threads=cores(gpu)))
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)  # running out of memory is part of the programme
    warnings.filterwarnings("ignore")


def cores(gpu: int | None) -> int:
    """All cores; one in a dry run, which may share them with other work."""
    return 1 if gpu is None else len(os.sched_getaffinity(0))


def measure(arguments: argparse.Namespace) -> int:
    """Run the sections and write the report."""
    from bench.gpu.card import Card
    from bench.gpu.programme import programme
    from bench.gpu.report import Report
    from bench.gpu.sections import run_sections
    from imagemill.worker.hardware.device import Device

    gpu = None if arguments.cpu else 0
    card = Card(Device(gpu=gpu, threads=cores(gpu)), arguments.small)
    out = arguments.out or (Path(tempfile.mkdtemp(prefix="imagemill-gpu-")) if arguments.cpu else ROOT / "bench")
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out, card.facts())
    with tempfile.TemporaryDirectory(prefix="imagemill-weights-", ignore_cleanup_errors=True) as folder:
        sections = [
            section
            for section in programme(card, Path(folder))
            if not arguments.only or any(text in section.name for text in arguments.only)
        ]
        if not sections:
            names = "; ".join(section.name for section in programme(card, Path(folder)))
            print(f"no section's name contains {' or '.join(arguments.only)}; there are: {names}", file=sys.stderr)
            return 2
        run_sections(sections, report, arguments.minutes * 60 - LAST, card.free)
    print(f"Results: {report.json} and {report.rows}")
    return report.status(goals=not arguments.cpu)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # threads of a section that was stopped may still wait for the device
