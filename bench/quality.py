"""The quality gate: does the drift check find what was planted, and what does measuring cost.

    python -m bench.quality [ROUNDS]

Drift: 200 photos in one look, of which 5 are spoilt: two tinted, two in another style, one blurred. The photos are cut
from five of scikit-image's, mirrored, lightened and darkened at random; each round has others. Looks, measures and
judgement are those that jobs get: the opencv engine, the check and the report's outliers.

Cost: CPU time of the check, for a cut-out beside that of reading its 12-megapixel JPEG and writing its PNG.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import skimage
from PIL import Image

from imagemill.producer.outliers import outliers
from imagemill.shared.engines import parse_options
from imagemill.shared.messages import Item, ItemResult, Job, Row, compact, row
from imagemill.shared.quality import Measures
from imagemill.worker.checking.measures import lab
from imagemill.worker.checking.quality import check
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging import codec
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.operations import registry
from imagemill.worker.operations.base import Evidence, Inputs, Spec, Work

IMAGES, PLANTED, EDGE = 200, 5, 320
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "motorcycle_left")
REFERENCES = {"https://bench.example/a.png": "astronaut", "https://bench.example/b.png": "retina"}
TRANSFER, OTHER_TRANSFER = ({"style": "colour-transfer", "reference": address} for address in REFERENCES)
LOOKS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "colour-transfer": (TRANSFER, OTHER_TRANSFER, {"style": "pencil-sketch"}),
    "detail": ({"style": "detail"}, {"style": "stylization"}, {"style": "pencil-sketch"}),
    "stylization": ({}, {"style": "pencil-sketch"}, OTHER_TRANSFER),
}
"""A look, and two others that strays have."""
BLUR = EDGE / 128  # pixels
FIRST_SEED = 100  # those below 20 were used to find the limits
TINTS = ((0, 0, -16), (0, -16, 0))  # in CIELAB: blue, green

Figure = dict[str, Any]


def run(rounds: int = 5) -> list[Figure]:
    """Measure `rounds` times; per figure its name, value, goal, unit, whether the goal holds, and how many rounds."""
    found, wrong = [], []
    jobs = [(look, seed) for seed in range(FIRST_SEED, FIRST_SEED + rounds) for look in LOOKS]
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        for rows, planted in pool.map(job, *zip(*jobs, strict=True)):
            named = set(outliers(rows))
            found.append(len(named & planted))
            wrong.append(len(named - planted))
    cv2.setNumThreads(1)
    made = f"drift, {rounds} x {len(LOOKS)} jobs of {IMAGES}"
    return [
        _figure(f"{made}: planted outliers found, of {PLANTED} (least)", min(found), PLANTED, "", rounds, least=True),
        _figure(f"{made}: found in all, of {len(found) * PLANTED}", sum(found), None, "", rounds, least=True),
        _figure(f"{made}: others named (most)", max(wrong), 0, "", rounds, least=False),
        *_costs(rounds),
    ]


def _figure(name: str, value: float, goal: float | None, unit: str, rounds: int, *, least: bool) -> Figure:
    holds = None if goal is None else (value >= goal if least else value <= goal)
    return {"name": name, "value": float(f"{value:.4g}"), "goal": goal, "unit": unit, "holds": holds, "rounds": rounds}


# --- drift ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stray:
    """How an image is spoilt: by other options, or afterwards."""

    options: dict[str, Any]
    spoil: Callable[[Pixels], Pixels] = lambda pixels: pixels


def job(look: str, seed: int) -> tuple[list[Row], set[int]]:
    """The rows of a job as its worker records them, and which of them were planted."""
    own, *others = LOOKS[look]
    strays = [Stray(own, lambda pixels, tint=tint: tinted(pixels, tint)) for tint in TINTS]
    strays += [Stray(other) for other in others]
    strays.append(Stray(own, lambda pixels: np.asarray(cv2.GaussianBlur(pixels, (0, 0), BLUR), np.uint8)))
    rng = np.random.default_rng(seed)
    places = dict(zip(rng.choice(IMAGES, PLANTED, replace=False).tolist(), strays, strict=True))
    operation = registry.create("stylize", "opencv")
    operation.load(Device(threads=1))
    rows = []
    for index in range(IMAGES):
        stray = places.get(index, Stray(own))
        item = Item(index=index, source=f"https://bench.example/{index}.png")
        measures = styled(operation, Picture(photo(rng)), item, stray)
        rows.append(row(item, ItemResult(index=index, state="done", quality=measures), ended=True))
    return rows, set(places)


def styled(operation: Any, picture: Picture, item: Item, stray: Stray) -> Measures | None:
    """What is measured of an image, as in the flow."""
    options = parse_options("stylize", "opencv", stray.options)
    spec = Job.model_validate({"operation": "stylize", "output": {"url": "s3://bench/x"}, "options": options})
    work = operation.prepare(picture, Inputs(item, options, None, lambda url: Picture(_shipped(REFERENCES[url]))))
    result = operation.finish(work, operation.run(work.samples))
    return check(Picture(stray.spoil(result.pixels)), picture, work, operation.spec, spec).measures


def photo(rng: np.random.Generator) -> Pixels:
    """A square part of a photo, RGB [320, 320, 3]."""
    pixels = _shipped(PHOTOS[rng.integers(len(PHOTOS))])
    side = int(min(pixels.shape[:2]) * rng.uniform(0.5, 0.95))
    top, left = (rng.integers(length - side + 1) for length in pixels.shape[:2])
    part = pixels[top : top + side, left : left + side][:, :: rng.choice([-1, 1])]
    small = cv2.resize(np.ascontiguousarray(part), (EDGE, EDGE), interpolation=cv2.INTER_AREA)
    return np.clip(small * rng.uniform(0.85, 1.15) + rng.uniform(-12, 12), 0, 255).astype(np.uint8)


def tinted(pixels: Pixels, tint: tuple[int, int, int]) -> Pixels:
    shifted = lab(pixels) + np.array(tint, np.float32)
    return np.rint(np.clip(cv2.cvtColor(shifted, cv2.COLOR_LAB2RGB), 0, 1) * 255).astype(np.uint8)


def _shipped(name: str) -> Pixels:
    (path,) = (Path(skimage.__file__).parent / "data").glob(f"{name}.*")
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


# --- cost -------------------------------------------------------------------------------------------------------------


def _beside(result: Pixels, source: Pixels, large: Pixels, rounds: int) -> Figure:
    spec = Job.model_validate({"operation": "remove-background", "output": {"url": "s3://bench/x"}})
    made, file = Spec("remove-background", "opencv", makes_alpha=True), codec.encode(Picture(large), format="jpeg", quality=90)
    header = codec.probe(file.data, max_pixels=64_000_000)
    ratios = []
    for _ in range(rounds + 1):
        start = time.process_time()
        codec.decode(file.data, header, edge=1600)
        codec.encode(Picture(result), format="png", quality=90)
        middle = time.process_time()
        check(Picture(result), Picture(source), Work([]), made, spec)
        ratios.append((time.process_time() - middle) / (middle - start))
    name = "check of a cut-out / its decoding and encoding, CPU"
    return _figure(name, median(ratios[1:]), None, "", rounds, least=False)


def _costs(rounds: int) -> list[Figure]:
    photo = np.ascontiguousarray(np.pad(_shipped("astronaut"), ((0, 688), (0, 1088), (0, 0)), mode="symmetric"))
    y, x = np.mgrid[-1:1:1200j, -1:1:1600j]
    alpha = (np.clip((1 - np.hypot(x / 0.7, y / 0.9)) * 40, 0, 1) * 255).astype(np.uint8)
    large = np.ascontiguousarray(np.tile(photo, (3, 3, 1))[:3000, :4000])
    hole = np.zeros(large.shape[:2], np.uint8)
    hole[1000:1400, 1000:1600] = 255
    sides = {
        "a cut-out of 1600 x 1200": (np.dstack([photo, alpha]), photo, Evidence(), "remove-background"),
        "a styled image of 1600 x 1200": (photo, photo, Evidence(), "stylize"),
        "an inpainting of 4000 x 3000, 2 % filled": (large, large, Evidence(comparable=False, hole=hole), "inpaint"),
    }
    figures = [_beside(*sides["a cut-out of 1600 x 1200"][:2], large, 10 * rounds)]
    for name, (result, source, evidence, operation) in sides.items():
        spec = Job.model_validate({"operation": operation, "output": {"url": "s3://bench/x"}})
        made = Spec(spec.operation, "opencv", makes_alpha=operation == "remove-background", restyles=operation == "stylize")
        work = Work([], evidence=evidence)
        times = []
        for _ in range(10 * rounds + 1):
            start = time.process_time()
            checked = check(Picture(result), Picture(source), work, made, spec)
            times.append(1000 * (time.process_time() - start))
        bare = ItemResult(index=0, state="done")
        grown = len(compact(bare.model_copy(update={"quality": checked.measures}))) - len(compact(bare))
        figures += [
            _figure(f"check of {name}: CPU", median(times[1:]), None, "ms", rounds, least=False),
            _figure(f"check of {name}: Redis", grown, None, "bytes", rounds, least=False),
        ]
    return figures


if __name__ == "__main__":
    for figure in run(*(int(argument) for argument in sys.argv[1:2])):
        print(json.dumps(figure))
