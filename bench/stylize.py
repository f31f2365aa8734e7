"""How well the line feeds Stable Diffusion: a whole node compared with bare diffusers loops on the same cores.

    python -m bench.stylize [ROUNDS]

The pipeline comes from tests/pipelines.py: the real architecture at a fraction of the width. It runs at 512 x 512 with
10 steps and guidance, which takes seconds per image on a core. Photos are 12-megapixel JPEGs, results have a long edge
of 512 pixels; the source waits 100 ms per GET, the store 50 ms per PUT. On both sides each core has a process with one
thread, like the engine on CPUs. On the bare side it loops over diffusers' own pipeline with prepared tensors and
embeddings. Its processes are pinned and set up like a node's, memory allocator included; otherwise they take a third
longer.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from bench.feeding import Partner, reply
from bench.figures import Figure, figure, print_figures
from bench.nodes import OurNode, cpu_of, environment
from bench.servers import Servers, photos
from imagemill.shared.messages import Job, Output
from imagemill.shared.options.stylize import DiffusionStylize

IMAGES_PER_CORE = 2
LOOK: dict[str, Any] = {"prompt": "a product on white", "negative_prompt": "blurry", "steps": 10, "strength": 0.5, "cfg": 7.5}
SPEC = Job(
    operation="stylize",
    output=Output(url="s3://results/look", format="jpeg"),
    options=DiffusionStylize.model_validate({**LOOK, "long_edge": 512}),
)


def run(rounds: int = 5) -> list[Figure]:
    from imagemill.producer.embedded_redis import EmbeddedRedis
    from tests.pipelines import pipeline_folder

    cores = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        weights = pipeline_folder(folder / "weights")
        servers = stack.enter_context(Servers(photos(), put_delay=0.05))
        redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
        settings = {
            **environment(redis.url, servers, weights),
            "IMAGEMILL_WORKER__ENGINES": '["diffusion"]',
            "IMAGEMILL_WORKER__OPERATIONS": '["stylize"]',
        }
        loops = [stack.enter_context(_Bare(str(weights), settings, folder / f"bare{core}")) for core in range(cores)]
        node = stack.enter_context(OurNode(settings, folder, SPEC, cores))
        images = IMAGES_PER_CORE * cores

        def ours() -> tuple[float, float]:
            before, seconds = node.cpu(), node.seconds(servers.fresh(images, delay=0.1))
            return images / seconds, (node.cpu() - before) / images

        def bare() -> tuple[float, float]:
            before, start = sum(loop.cpu() for loop in loops), time.perf_counter()
            for loop in loops:
                loop.send(images=IMAGES_PER_CORE)
            for loop in loops:
                loop.receive()
            seconds = time.perf_counter() - start
            return images / seconds, (sum(loop.cpu() for loop in loops) - before) / images

        results = [_round({"bare": bare, "ours": ours}, number) for number in range(rounds)]
        step_ratios = [loops[0].ask(steps=4)["ratio"] for _ in range(rounds)]
    rates = {side: [result[side][0] for result in results] for side in ("bare", "ours")}
    rate_ratios = [ours / bare for ours, bare in zip(rates["ours"], rates["bare"], strict=True)]
    cpu_ratios = [result["bare"][1] / result["ours"][1] for result in results]
    return [
        figure("stylize: whole path / bare diffusers loops", rate_ratios, "x", 0.95),
        figure("stylize: CPU of a bare loop / of the whole path (little affected by other load)", cpu_ratios, "x"),
        figure("stylize: device step / bare call of the pipeline", step_ratios, "x"),
        figure("stylize: whole path", rates["ours"], "images/s"),
        figure("stylize: bare diffusers loops", rates["bare"], "images/s"),
    ]


def _round(sides: dict[str, Callable[[], tuple[float, float]]], number: int) -> dict[str, tuple[float, float]]:
    """Images per second and CPU seconds per image of each side."""
    order = list(sides) if number % 2 == 0 else list(sides)[::-1]
    return {name: sides[name]() for name in order}


class _Bare(Partner):
    """The bare loop in another process."""

    def __init__(self, weights: str, environment: dict[str, str], folder: Path) -> None:
        folder.mkdir()
        super().__init__(["bare", weights], environment, folder)
        self._command = [sys.executable, "-m", "bench.stylize", "bare", weights]

    def cpu(self) -> float:
        """CPU seconds used so far."""
        return cpu_of(self._process.pid)


def _run_bare(weights: Path) -> None:
    import diffusers
    import torch

    from imagemill.worker.hardware.device import Device, pin
    from imagemill.worker.models.catalogue import MODELS, repository
    from imagemill.worker.models.repositories import folder_of
    from imagemill.worker.operations.stylize.controls import edges_of
    from imagemill.worker.operations.stylize.pipeline import Canvas, Pipeline
    from tests.unit.worker.operations.conformance import scene

    pin(Device(threads=1))
    torch.set_num_threads(1)
    base, control = (folder_of(weights, repository(name)) for name in MODELS["sd15-canny"])
    pipe = diffusers.StableDiffusionControlNetImg2ImgPipeline.from_pretrained(
        base, controlnet=diffusers.ControlNetModel.from_pretrained(control), safety_checker=None
    )
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pixels = scene(512, 512)
    edges = edges_of(pixels, 100, 200)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    control_image = torch.from_numpy(edges)[None, None].expand(-1, 3, -1, -1) / 255
    prompt, negative = pipe.encode_prompt(LOOK["prompt"], "cpu", 1, True, LOOK["negative_prompt"])
    options = SPEC.options
    assert isinstance(options, DiffusionStylize)

    def call(schedule: int) -> Any:
        return pipe(
            image=image,
            control_image=control_image,
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            strength=LOOK["strength"],
            num_inference_steps=schedule,
            guidance_scale=LOOK["cfg"],
            generator=torch.Generator().manual_seed(42),
            output_type="pt",
        )

    engine, canvas = Pipeline("sd15-canny", Device(weights=weights)), Canvas(pixels, (edges,), 42)
    reply(ready=True)
    for line in sys.stdin:
        message = json.loads(line)
        if "images" in message:
            for _ in range(message["images"]):
                call(options.timesteps)
            reply(done=True)
        else:  # alternate the engine's device step and a bare call
            few = options.model_copy(update={"steps": message["steps"]})
            spent: dict[str, list[float]] = {"ours": [], "bare": []}
            for turn in range(10):
                name, start = ("ours", "bare")[turn % 2], time.process_time()
                if name == "ours":
                    engine.run([canvas], few)
                else:
                    call(few.timesteps)
                spent[name].append(time.process_time() - start)
            reply(ratio=median(spent["bare"][1:]) / median(spent["ours"][1:]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        _run_bare(Path(sys.argv[2]))
    else:
        print_figures(run)
