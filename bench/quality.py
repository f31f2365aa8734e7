"""The quality check: whether drift detection finds planted outliers, and what the check costs.

    python -m bench.quality [ROUNDS]

Drift: 200 photos in one look, of which 5 are spoilt: two tinted, two in another style, one blurred. The photos are
crops of five of scikit-image's, mirrored, lightened and darkened at random, and differ from round to round. The opencv
engine, the check and the report's outliers are the same as in jobs.

Cost: CPU time of the check; for a cut-out also relative to decoding its 12-megapixel JPEG and encoding its PNG.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import skimage
from PIL import Image

from bench.figures import Figure, figure, print_figures
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
"""Options of each look, and of the two styles of its outliers."""
BLUR = EDGE / 128  # pixels
FIRST_SEED = 100  # those below 20 were used to find the limits
TINTS = ((0, 0, -16), (0, -16, 0))  # in CIELAB: blue, green


def run(rounds: int = 5) -> list[Figure]:
    hits, false_alarms = [], []
    jobs = [(look, seed) for seed in range(FIRST_SEED, FIRST_SEED + rounds) for look in LOOKS]
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        for rows, planted in pool.map(job, *zip(*jobs, strict=True)):
            reported = set(outliers(rows))
            hits.append(len(reported & planted))
            false_alarms.append(len(reported - planted))
    cv2.setNumThreads(1)
    name = f"drift, {rounds} x {len(LOOKS)} jobs of {IMAGES}"
    return [
        figure(f"{name}: planted outliers found, of {PLANTED} (minimum)", min(hits), "", PLANTED, rounds=rounds),
        figure(f"{name}: planted outliers found in total, of {len(hits) * PLANTED}", sum(hits), rounds=rounds),
        figure(f"{name}: false alarms (maximum)", max(false_alarms), "", 0, at_most=True, rounds=rounds),
        *_costs(rounds),
    ]


# --- drift ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stray:
    """How an image is spoilt: by other options, or by a change to its result."""

    options: dict[str, Any]
    spoil: Callable[[Pixels], Pixels] = lambda pixels: pixels


def job(look: str, seed: int) -> tuple[list[Row], set[int]]:
    """The rows of a job as a worker records them, and the indexes of the planted outliers."""
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
        rows.append(row(item, ItemResult(index=index, state="done", quality=measures)))
    return rows, set(places)


def styled(operation: Any, picture: Picture, item: Item, stray: Stray) -> Measures | None:
    """The measures of an image, taken as in the flow."""
    options = parse_options("stylize", "opencv", stray.options)
    spec = Job.model_validate({"operation": "stylize", "output": {"url": "s3://bench/x"}, "options": options})
    work = operation.prepare(picture, Inputs(item, options, None, lambda url: Picture(_shipped(REFERENCES[url]))))
    result = operation.finish(work, operation.run(work.samples))
    return check(Picture(stray.spoil(result.pixels)), picture, work, operation.spec, spec).measures


def photo(rng: np.random.Generator) -> Pixels:
    """A random square crop of a photo, RGB uint8 [320, 320, 3]."""
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


def _relative_cost(result: Pixels, source: Pixels, large: Pixels, rounds: int) -> Figure:
    spec = Job.model_validate({"operation": "remove-background", "output": {"url": "s3://bench/x"}})
    engine = Spec("remove-background", "opencv", makes_alpha=True)
    file = codec.encode(Picture(large), format="jpeg", quality=90)
    header = codec.probe(file.data, max_pixels=64_000_000)
    ratios = []
    for _ in range(rounds + 1):
        start = time.process_time()
        codec.decode(file.data, header, edge=1600)
        codec.encode(Picture(result), format="png", quality=90)
        middle = time.process_time()
        check(Picture(result), Picture(source), Work([], plan=None), engine, spec)
        ratios.append((time.process_time() - middle) / (middle - start))
    return figure("check of a cut-out / its decoding and encoding, CPU", ratios[1:])


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
        "an inpainted image of 4000 x 3000, 2 % filled": (large, large, Evidence(comparable=False, hole=hole), "inpaint"),
    }
    figures = [_relative_cost(*sides["a cut-out of 1600 x 1200"][:2], large, 10 * rounds)]
    for name, (result, source, evidence, operation) in sides.items():
        spec = Job.model_validate({"operation": operation, "output": {"url": "s3://bench/x"}})
        engine = Spec(spec.operation, "opencv", makes_alpha=operation == "remove-background", restyles=operation == "stylize")
        work = Work([], plan=None, evidence=evidence)
        times = []
        for _ in range(10 * rounds + 1):
            start = time.process_time()
            checked = check(Picture(result), Picture(source), work, engine, spec)
            times.append(1000 * (time.process_time() - start))
        bare = ItemResult(index=0, state="done")
        added = len(compact(bare.model_copy(update={"quality": checked.measures}))) - len(compact(bare))
        figures += [figure(f"check of {name}: CPU", times[1:], "ms"), figure(f"check of {name}: Redis", added, "bytes")]
    return figures


if __name__ == "__main__":
    print_figures(run)
