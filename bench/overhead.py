"""CPU time per image outside the model, and per upload to S3, compared with the way tutorials do it.

    python -m bench.overhead [ROUNDS]

The model is a null model: it has U^2-Net's input and outputs, and returns the same soft ellipse for every image in
almost no time. Both workers are real, with Celery and Redis; the CPU time of all their processes counts.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.figures import Figure, figure, print_figures
from bench.servers import Servers, photos

OURS, TUTORIAL, PUTS = 32, 6, 60
"""Images on our side, images on the tutorial's side, and uploads, per round."""
OBJECT = 150_000
"""Bytes per upload."""


def run(rounds: int = 5) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder, Servers(photos(), put_delay=0.0) as servers:
        return [*_images(Path(folder), servers, rounds), *_puts(servers, rounds)]


# --- images -----------------------------------------------------------------------------------------------------------


def _images(folder: Path, servers: Servers, rounds: int) -> list[Figure]:
    from bench.nodes import OurNode, TutorialNode, environment
    from imagemill.producer.embedded_redis import EmbeddedRedis

    model = null_model(folder / "weights" / "rembg" / "u2net.onnx")
    cpu: dict[str, list[float]] = {"ours": [], "tutorial": [], "scaled": []}
    with EmbeddedRedis(folder / "redis") as redis:
        settings = environment(redis.url, servers, folder / "weights")
        url = redis.url.removesuffix("/0") + "/1"
        with OurNode(settings, folder) as ours, TutorialNode(url, servers, model, folder) as tutorial:
            sides: dict[str, tuple[Any, int, Callable[[list[str]], float]]] = {
                "ours": (ours, OURS, ours.seconds),
                "tutorial": (tutorial, TUTORIAL, tutorial.seconds),
                "scaled": (tutorial, TUTORIAL, lambda urls: tutorial.seconds(urls, scaled_decode=True)),
            }
            for number in range(rounds + 1):
                for side, (node, images, work) in sides.items():
                    before = node.cpu()
                    work(servers.fresh(images if number else 4, delay=0.0))
                    if number:  # the first round fills caches
                        cpu[side].append(1000 * (node.cpu() - before) / images)
    name = "CPU per image with a null model"
    tutorial_ratios, scaled_ratios = (
        [theirs / ours for theirs, ours in zip(cpu[side], cpu["ours"], strict=True)] for side in ("tutorial", "scaled")
    )
    return [
        figure(f"{name}: a tutorial's worker / ours", tutorial_ratios, "x", 7.0),
        figure(f"{name}: a tutorial's worker with scaled decoding / ours", scaled_ratios, "x"),
        figure(f"{name}: ours", cpu["ours"], "ms"),
    ]


def null_model(path: Path) -> Path:
    """Save a model with U^2-Net's input, [batch, 3, 320, 320], and outputs, [batch, 1, 320, 320], that returns an ellipse."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    down, across = np.mgrid[-1:1:320j, -1:1:320j]
    ellipse = np.clip((1 - np.hypot(across / 0.7, down / 0.9)) * 40, 0, 1).astype(np.float32)[None, None]
    constants = {"ellipse": ellipse, "none": np.zeros(1, np.float32), "first": np.array([0]), "axes": np.array([1])}
    constants["next"] = np.array([1])
    nodes = [
        helper.make_node("Slice", ["input.1", "first", "next", "axes"], ["red"]),  # keeps the batch dimension
        helper.make_node("Mul", ["red", "none"], ["zero"]),
        helper.make_node("Add", ["zero", "ellipse"], ["1959"]),
        *(helper.make_node("Identity", ["1959"], [str(name)]) for name in range(1960, 1966)),
    ]
    graph = helper.make_graph(
        nodes,
        "null",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, ["batch", 3, 320, 320])],
        [helper.make_tensor_value_info(str(name), TensorProto.FLOAT, ["batch", 1, 320, 320]) for name in range(1959, 1966)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


# --- uploads ----------------------------------------------------------------------------------------------------------


def _puts(servers: Servers, rounds: int) -> list[Figure]:
    """CPU time of this process, with one thread."""
    import boto3

    from bench.nodes import KEYS
    from imagemill.shared.settings import S3Settings
    from imagemill.worker.transfer.network import Network
    from imagemill.worker.transfer.s3_requests import S3Requests
    from imagemill.worker.transfer.store import S3Store

    os.environ.update(KEYS)
    settings, body = S3Settings(endpoint_url=servers.s3), np.random.default_rng(0).bytes(OBJECT)
    network = Network()
    store = S3Store("s3://results/cut", S3Requests(settings, network), settings)

    def ours() -> None:
        network.call(store.put("image.png", body, "image/png"))

    def new_client(maker: Any = boto3) -> None:
        client = maker.client("s3", endpoint_url=servers.s3, region_name="us-east-1")
        client.put_object(Bucket="results", Key="image.png", Body=body, ContentType="image/png")

    def new_session() -> None:
        new_client(boto3.Session())

    sides: list[tuple[Callable[[], None], int]] = [(ours, PUTS), (new_client, PUTS // 6), (new_session, 3)]
    cpu: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 1):
        for (put, times), spent in zip(sides, cpu, strict=True):
            start = time.process_time()
            for _ in range(times):
                put()
            if number:
                spent.append(1000 * (time.process_time() - start) / times)
    client_ratios, session_ratios = ([theirs / mine for theirs, mine in zip(side, cpu[0], strict=True)] for side in cpu[1:])
    name = "S3 put of 150 kB, CPU"
    return [
        figure(f"{name}: a new client per call / ours", client_ratios, "x", 8.0),
        figure(f"{name}: a new session and client per call / ours", session_ratios, "x"),
        figure(f"{name}: ours", cpu[0], "ms"),
    ]


if __name__ == "__main__":
    print_figures(run)
