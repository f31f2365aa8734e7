"""How well the line feeds the device: whole workers with the full-size network, beside onnxruntime and a tutorial's worker.

    python -m bench.feeding [ROUNDS]

The network is U^2-Net as published, 44.0 M parameters, with random weights: its speed is the real one's. Photos are
12-megapixel JPEGs, each with bytes of its own; results are PNGs of 1600 pixels. The source waits 100 ms per GET (0
and 500 where that is compared), the store 50 ms per PUT. Celery, Redis and both workers are really there, as
processes that stay for the whole run; each round takes every side, in an order of its own.

A job of ours is one chunk of about 10 s of work, half of what the producer cuts, timed from before its submission to
the record of its last image: filling and draining the line are in it.
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
from statistics import median
from threading import Event
from typing import Any

import cv2
import numpy as np

from bench.servers import Servers, photos

ROOT = Path(__file__).resolve().parent.parent
GET, PUT = 0.1, 0.05
BARE_SECONDS = 2.5
TUTORIAL_IMAGES = 3
JOB_SECONDS, LARGEST_JOB = 7.5, 64
"""Seconds of the bare loop's work in a job, which takes the line about 10, and most images."""
CALIBRATION_IMAGES = 15
SPREAD = 35.0
"""Leaves 15 % of an image's alpha between 1 and 254, and 6 % between 5 and 250; U^2-Net's own of photos: 20 and 3 %."""

Figure = dict[str, Any]


def run(rounds: int = 5) -> list[Figure]:
    """Measure `rounds` times; per figure its name, the median, goal, unit, whether the goal holds, and how many rounds."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = photos()
        models = _make_weights(folder / "weights", files)
        servers = stack.enter_context(Servers(files, put_delay=PUT))
        sides = {kind: _Sides(stack, servers, folder, kind, model) for kind, model in models.items()}
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in sides}
        for number in range(rounds):
            for kind, side in sides.items():
                found[kind].append(side.round(number))
    return [figure for kind, measured in found.items() for figure in _figures(kind, measured)]


def _figures(kind: str, measured: list[dict[str, float]]) -> list[Figure]:
    """The ratios of one precision, then the rates behind them."""

    def figure(what: str, goal: float | None, top: str, bottom: str | None = None) -> Figure:
        value = median(one[top] / (one[bottom] if bottom else 1.0) for one in measured)
        return {
            "name": f"feeding, {kind}: {what}",
            "value": float(f"{value:.4g}"),
            "goal": goal,
            "unit": "x" if bottom else "images/s",
            "holds": None if goal is None else value >= goal,
            "rounds": len(measured),
        }

    full = kind == "fp32"
    figures = [
        figure("whole path, times a bare onnxruntime loop", 0.90 if full else 0.65, "ours", "bare"),
        figure("whole path, times a bare loop with an image per core, as ours runs them", None, "ours", "lanes"),
        figure("whole path, times a tutorial's worker", 3.3 if full else 6.0, "ours", "tutorial"),
    ]
    if full:
        figures += [
            figure("500 ms per GET, times 0 ms", 0.95, "500 ms", "0 ms"),
            figure("through Celery, times the flow called directly", 0.98, "ours", "direct"),
        ]
    rates = {
        "ours": "whole path",
        "bare": "bare onnxruntime loop",
        "lanes": "the same, an image per core",
        "tutorial": "a tutorial's worker",
    }
    return figures + [figure(name, None, key) for key, name in rates.items()]


# --- weights ----------------------------------------------------------------------------------------------------------


def _make_weights(folder: Path, files: list[bytes]) -> dict[str, Path]:
    """The full-size network as fp32, and in 8 bits as `imagemill models quantize` makes it, whatever its masks are worth."""
    from imagemill.worker.models.files import model_file
    from imagemill.worker.models.quantize import quantize
    from tests.models import FULL_WIDTH, u2net_onnx

    original = u2net_onnx(folder / "rembg" / "u2net.onnx", width=FULL_WIDTH, spread=SPREAD)
    with tempfile.TemporaryDirectory() as images:
        for number in range(CALIBRATION_IMAGES):
            photo = cv2.imdecode(np.frombuffer(files[number % len(files)], np.uint8), cv2.IMREAD_REDUCED_COLOR_4)
            photo = photo[10 * number :, 13 * number :]  # no two alike
            assert cv2.imwrite(str(Path(images, f"{number}.jpg")), photo)
        quantize("u2net", folder, Path(images), accept=0.0)
    return {"fp32": original, "int8": model_file(folder, "rembg", "u2net", int8=True)}


# --- the sides --------------------------------------------------------------------------------------------------------


class _Sides:
    """All that is measured with one file of weights, its processes running until `stack` is left."""

    def __init__(self, stack: ExitStack, servers: Servers, folder: Path, kind: str, model: Path) -> None:
        from bench.nodes import Jobs, OurNode, TutorialNode, environment
        from imagemill.producer.embedded_redis import EmbeddedRedis

        place = folder / kind
        place.mkdir()
        redis = stack.enter_context(EmbeddedRedis(place / "redis"))
        urls = [redis.url.removesuffix("/0") + f"/{number}" for number in range(3)]
        int8 = "true" if kind == "int8" else "false"
        settings = [environment(url, servers, folder / "weights", IMAGEMILL_ONNX__INT8=int8) for url in urls[:2]]
        self.kind, self.servers = kind, servers
        self.node = stack.enter_context(OurNode(settings[0], place))
        self.tutorial = stack.enter_context(TutorialNode(urls[2], servers, model, place))
        self.bare = stack.enter_context(_Process(["bare", str(model)], settings[0], place))
        if kind == "fp32":
            self.direct, self._direct_jobs = stack.enter_context(_Process(["direct"], settings[1], place)), Jobs(urls[1])
        self.images = max(8, min(LARGEST_JOB, round(JOB_SECONDS * self._bare())))
        self.tutorial.seconds(servers.fresh(1, delay=0))  # it makes its session at its first image
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
            sides |= {"direct": self._direct, "0 ms": lambda: self._ours(0.0), "500 ms": lambda: self._ours(0.5)}
        order = Random(number).sample([*sides], len(sides))  # what runs before it slows a side down
        return {name: sides[name]() for name in order}

    def _ours(self, delay: float) -> float:
        return self.images / self.node.seconds(self.servers.fresh(self.images, delay=delay))

    def _tutorial(self) -> float:
        return TUTORIAL_IMAGES / self.tutorial.seconds(self.servers.fresh(TUTORIAL_IMAGES, delay=GET))

    def _bare(self, lanes: bool = False) -> float:
        said = self.bare.ask(seconds=BARE_SECONDS, lanes=lanes)
        return float(said["images"] / said["seconds"])

    def _direct(self) -> float:
        start = time.perf_counter()
        job = self._direct_jobs.submit(self.servers.fresh(self.images, delay=GET))
        self.direct.tell(job=job, images=self.images)
        self._direct_jobs.await_images(job)
        spent = time.perf_counter() - start
        self.direct.hear()
        return self.images / spent


class _Process:
    """This module as another process, which is told and answers in lines of JSON."""

    def __init__(self, role: list[str], environment: dict[str, str], folder: Path) -> None:
        self._command, self._environment = [sys.executable, "-m", "bench.feeding", *role], environment
        self._log = folder / f"{role[0]}.log"

    def __enter__(self) -> _Process:
        pipe = subprocess.PIPE
        with self._log.open("ab") as log:
            self._process: Any = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdin=pipe, stdout=pipe, stderr=log, text=True
            )
        self.hear()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def tell(self, **what: Any) -> None:
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        assert line, self._log.read_text(errors="replace")[-2000:]
        said: dict[str, Any] = json.loads(line)
        return said

    def ask(self, **what: Any) -> dict[str, Any]:
        self.tell(**what)
        return self.hear()


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def _run_bare(model: str) -> None:
    """onnxruntime in a loop over tensors that are there: one image on all cores, or, in lanes, one on each core."""
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
    source, wanted = sessions[False].get_inputs()[0].name, [sessions[False].get_outputs()[0].name]

    def loop(session: Any, seconds: float) -> int:
        images, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds or images % len(tensors):
            session.run(wanted, {source: tensors[images % len(tensors)]})
            images += 1
        return images

    with ThreadPoolExecutor(cores) as pool:
        for session in sessions.values():
            loop(session, 0.1)
        _say(ready=True)
        for line in sys.stdin:
            told, start = json.loads(line), time.perf_counter()
            loops = [pool.submit(loop, sessions[told["lanes"]], told["seconds"]) for _ in range(cores if told["lanes"] else 1)]
            images = sum(one.result() for one in loops)
            _say(images=images, seconds=time.perf_counter() - start)


def _run_direct() -> None:
    """A worker's child without Celery around it: chunks come by name, and its flow is called."""
    from imagemill.shared.broker import Publisher, make_app
    from imagemill.shared.messages import Chunk
    from imagemill.shared.settings import load_settings
    from imagemill.worker.hardware.device import Device, pin

    settings = load_settings()
    device = Device.of(settings, 1)
    pin(device)
    from imagemill.worker.node.child import Child

    child = Child(settings, device, node="direct", publisher=Publisher(make_app(settings)), stopping=Event().is_set)
    _say(ready=True)
    for line in sys.stdin:
        told = json.loads(line)
        chunk = Chunk(job=told["job"], number=0, images=told["images"])
        _say(outcome=child.work(chunk, task="direct", tell=lambda *_: None))


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        _run_bare(sys.argv[2])
    elif sys.argv[1:2] == ["direct"]:
        _run_direct()
    else:
        for one in run(*(int(argument) for argument in sys.argv[1:2])):
            print(json.dumps(one))
