"""How well the line feeds the device: a whole worker compared with bare onnxruntime and a tutorial's worker.

    python -m bench.feeding [ROUNDS]

The network is U^2-Net as published, 44.0 M parameters, with random weights, which run as fast as the real ones. Photos
are distinct 12-megapixel JPEGs, results are PNGs of 1600 pixels. The source waits 100 ms per GET (0 or 500 ms where
that is compared), the store 50 ms per PUT. Celery, Redis and both workers are real processes that run throughout; each
round measures every side, in a different order.

Our job is about 10 s of work. It is timed from submission until its last image is recorded, so filling and draining the
line count.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np

from bench.figures import Figure, figure, print_figures
from bench.servers import Servers, photos

ROOT = Path(__file__).resolve().parent.parent
GET, PUT = 0.1, 0.05
BARE_SECONDS = 2.5
TUTORIAL_IMAGES = 3
JOB_SECONDS, LARGEST_JOB = 7.5, 64
"""A job has as many images as the bare loop does in 7.5 s, which takes the line about 10 s, but 64 at most."""
CALIBRATION_IMAGES = 15
SPREAD = 35.0
"""Puts 15 % of an image's alpha between 1 and 254 and 6 % between 5 and 250; for U^2-Net and photos it is 20 and 3 %."""


def run(rounds: int = 5) -> list[Figure]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = photos()
        models = _make_weights(folder / "weights", files)
        servers = stack.enter_context(Servers(files, put_delay=PUT))
        sides = {kind: _Sides(stack, servers, folder, kind, model) for kind, model in models.items()}
        rates: dict[str, list[dict[str, float]]] = {kind: [] for kind in sides}
        for number in range(rounds):
            for kind, side in sides.items():
                rates[kind].append(side.round(number))
    return [figure for kind, measured in rates.items() for figure in _figures(kind, measured)]


def _figures(kind: str, measured: list[dict[str, float]]) -> list[Figure]:
    """The ratios for one precision, then the rates behind them."""

    def ratio(name: str, top: str, bottom: str, goal: float | None = None) -> Figure:
        return figure(f"feeding, {kind}: {name}", [rates[top] / rates[bottom] for rates in measured], "x", goal)

    full = kind == "fp32"
    figures = [
        ratio("whole path / bare onnxruntime loop", "ours", "bare", 0.90 if full else 0.65),
        ratio("whole path / bare loop with an image per core, like the engine", "ours", "lanes"),
        ratio("whole path / a tutorial's worker", "ours", "tutorial", 3.3 if full else 6.0),
    ]
    if full:
        figures.append(ratio("500 ms per GET / 0 ms", "500 ms", "0 ms", 0.95))
    names = {
        "ours": "whole path",
        "bare": "bare onnxruntime loop",
        "lanes": "bare loop with an image per core",
        "tutorial": "a tutorial's worker",
    }
    for side, name in names.items():
        figures.append(figure(f"feeding, {kind}: {name}", [rates[side] for rates in measured], "images/s"))
    return figures


# --- weights ----------------------------------------------------------------------------------------------------------


def _make_weights(folder: Path, files: list[bytes]) -> dict[str, Path]:
    """The full-size network in fp32, and in INT8 from `imagemill models quantize`, without a check of its accuracy."""
    from imagemill.worker.models.files import model_file
    from imagemill.worker.models.quantize import quantize
    from tests.models import FULL_WIDTH, u2net_onnx

    original = u2net_onnx(folder / "rembg" / "u2net.onnx", width=FULL_WIDTH, spread=SPREAD)
    with tempfile.TemporaryDirectory() as images:
        for number in range(CALIBRATION_IMAGES):
            photo = cv2.imdecode(np.frombuffer(files[number % len(files)], np.uint8), cv2.IMREAD_REDUCED_COLOR_4)
            photo = photo[10 * number :, 13 * number :]  # so that all differ
            assert cv2.imwrite(str(Path(images, f"{number}.jpg")), photo)
        quantize("u2net", folder, Path(images), accept=0.0, faster=0.0)
    return {"fp32": original, "int8": model_file(folder, "rembg", "u2net", int8=True)}


# --- the sides --------------------------------------------------------------------------------------------------------


class _Sides:
    """All sides of one precision; their processes run until `stack` closes."""

    def __init__(self, stack: ExitStack, servers: Servers, folder: Path, kind: str, model: Path) -> None:
        from bench.nodes import OurNode, TutorialNode, environment
        from imagemill.producer.embedded_redis import EmbeddedRedis

        place = folder / kind
        place.mkdir()
        redis = stack.enter_context(EmbeddedRedis(place / "redis"))
        urls = [redis.url.removesuffix("/0") + f"/{number}" for number in range(2)]
        int8 = "true" if kind == "int8" else "false"
        settings = environment(urls[0], servers, folder / "weights", IMAGEMILL_ONNX__INT8=int8)
        self.kind, self.servers = kind, servers
        self.node = stack.enter_context(OurNode(settings, place))
        self.tutorial = stack.enter_context(TutorialNode(urls[1], servers, model, place))
        self.bare = stack.enter_context(Partner(["bare", str(model)], settings, place))
        self.images = max(8, min(LARGEST_JOB, round(JOB_SECONDS * self._bare())))
        self.tutorial.seconds(servers.fresh(1, delay=0))  # creates its session
        self.node.seconds(servers.fresh(4, delay=0))

    def round(self, number: int) -> dict[str, float]:
        """Images per second of each side."""
        sides = {
            "bare": self._bare,
            "lanes": lambda: self._bare(lanes=True),
            "ours": lambda: self._ours(GET),
            "tutorial": self._tutorial,
        }
        if self.kind == "fp32":
            sides |= {"0 ms": lambda: self._ours(0.0), "500 ms": lambda: self._ours(0.5)}
        order = Random(number).sample([*sides], len(sides))  # a side is slower after some others
        return {name: sides[name]() for name in order}

    def _ours(self, delay: float) -> float:
        return self.images / self.node.seconds(self.servers.fresh(self.images, delay=delay))

    def _tutorial(self) -> float:
        return TUTORIAL_IMAGES / self.tutorial.seconds(self.servers.fresh(TUTORIAL_IMAGES, delay=GET))

    def _bare(self, lanes: bool = False) -> float:
        answer = self.bare.ask(seconds=BARE_SECONDS, lanes=lanes)
        return float(answer["images"] / answer["seconds"])


class Partner:
    """This module in another process, which exchanges lines of JSON with this one."""

    def __init__(self, role: list[str], environment: dict[str, str], folder: Path) -> None:
        self._command, self._environment = [sys.executable, "-m", "bench.feeding", *role], environment
        self._log = folder / f"{role[0]}.log"

    def __enter__(self) -> Partner:
        pipe = subprocess.PIPE
        with self._log.open("ab") as log:
            self._process: Any = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdin=pipe, stdout=pipe, stderr=log, text=True
            )
        self.receive()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def send(self, **message: Any) -> None:
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        assert line, self._log.read_text(errors="replace")[-2000:]
        message: dict[str, Any] = json.loads(line)
        return message

    def ask(self, **message: Any) -> dict[str, Any]:
        self.send(**message)
        return self.receive()


def reply(**message: Any) -> None:
    """Send a message to the process that started this one."""
    print(json.dumps(message), flush=True)


def _run_bare(model: str) -> None:
    """onnxruntime in a loop over prepared tensors: one image on all cores or, with lanes, one on each core."""
    import onnxruntime

    from imagemill.worker.hardware.device import share_of_cores
    from imagemill.worker.imaging import codec
    from imagemill.worker.operations.remove_background.model_families import FAMILIES

    tensors = []
    for file in photos():
        pixels = codec.decode(file, codec.probe(file, max_pixels=64_000_000), edge=1600).pixels
        tensors.append(FAMILIES["u2net"].tensor(pixels)[None])
    cores, sessions = share_of_cores(1), {}
    for lanes, threads in ((False, cores), (True, 1)):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        sessions[lanes] = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    source, outputs = sessions[False].get_inputs()[0].name, [sessions[False].get_outputs()[0].name]

    def loop(session: Any, seconds: float) -> int:
        images, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds or images % len(tensors):
            session.run(outputs, {source: tensors[images % len(tensors)]})
            images += 1
        return images

    with ThreadPoolExecutor(cores) as pool:
        for session in sessions.values():
            loop(session, 0.1)
        reply(ready=True)
        for line in sys.stdin:
            message, start = json.loads(line), time.perf_counter()
            session, count = sessions[message["lanes"]], cores if message["lanes"] else 1
            loops = [pool.submit(loop, session, message["seconds"]) for _ in range(count)]
            images = sum(running.result() for running in loops)
            reply(images=images, seconds=time.perf_counter() - start)


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        _run_bare(sys.argv[2])
    else:
        print_figures(run)
