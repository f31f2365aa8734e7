"""How much of LaMa's work tiles save, compared with the whole image and with IOPaint's crops; memory; seams.

    python -m bench.inpaint [ROUNDS]

The network is LaMa's generator as published, 51.0 M parameters, with random weights, as its speed depends only on the
size of the picture. Each way to split a 24-megapixel image is therefore timed by its tile sizes: the network is timed
at SIDES, and the time per pixel interpolated for the sizes in between. A pass over the whole image would take 18 GB,
so it is extrapolated from the largest side. Only our side plans and pastes; that time is measured and added.

Peak memory is that of a real worker process on JPEGs with masks, in excess of the idle process.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from skimage import data

from bench.figures import Figure, figure, print_figures
from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from imagemill.shared.engines import parse_options
from imagemill.shared.messages import Item, Job
from imagemill.shared.settings import load_settings
from imagemill.worker.hardware.device import Device, share_of_cores
from imagemill.worker.imaging import codec
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.operations.base import Inputs
from imagemill.worker.operations.inpaint.lama import Lama
from imagemill.worker.operations.inpaint.lama_model import LamaModel
from imagemill.worker.operations.inpaint.tiles import CONTEXT, plan
from tests.fills import Continues
from tests.generators import FULL, lama_file
from tests.workers import WorkerProcess, clean_environment

HEIGHT, WIDTH = 4000, 6000
SIDES = (256, 448, 512, 1024)
SHARE = 0.02
MEMORY = {12: (3000, 4000), 48: (6000, 8000), 100: (8200, 12200)}
"""(height, width) by megapixels."""
LARGEST_PART = 832  # side in pixels of the largest hole that fits into one tile

Cost = Callable[[int, int], float]


def run(rounds: int = 5) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        weights = lama_file(Path(folder) / "weights" / "lama" / "lama.safetensors", **FULL).parents[1]
        figures = _memory(Path(folder), weights)  # first, before this process loads a model
        device = Device(threads=share_of_cores(1), weights=weights)
        session = LamaModel(weights / "lama" / "lama.safetensors", device)
        _seconds(session)  # warm up every shape
        costs = [_seconds(session) for _ in range(rounds)]
        figures += _ways(costs) + _batches(session, rounds)
        operation = Lama()
        operation.load(device)
        return figures + _areas(operation, rounds) + [_step()]


# --- masks ------------------------------------------------------------------------------------------------------------


def compact(height: int, width: int, count: int, share: float = SHARE) -> Grey:
    """`count` evenly spaced discs that cover a share of the image."""
    hole = np.zeros((height, width), np.uint8)
    radius = round((share * height * width / count / np.pi) ** 0.5)
    across = -(-count // 2)
    for number in range(count):
        x, y = (number % across + 0.5) * width / across, (number // across * 2 + 1) * height / (4 if count > 1 else 2)
        cv2.circle(hole, (round(x), round(y)), radius, 255, cv2.FILLED)
    return hole


def scratch(height: int, width: int) -> Grey:
    """A line from one corner almost to the opposite one."""
    hole = np.zeros((height, width), np.uint8)
    cv2.line(hole, (0, height // 20), (width - 1, height - height // 20), 255, 12)
    return hole


def cable(height: int, width: int) -> Grey:
    """A sagging line from the left edge to the right one."""
    hole, x = np.zeros((height, width), np.uint8), np.arange(width)
    y = height * (0.1 + 0.5 * x / width + 0.3 * np.sin(np.pi * x / width))
    cv2.polylines(hole, [np.stack([x, y], axis=1).astype(np.int32)[:, None]], False, 255, 24)
    return hole


def caption(height: int, width: int) -> Grey:
    """Two lines of text at the bottom."""
    hole = np.zeros((height, width), np.uint8)
    for at, text in (
        (0.9, "Spring collection, seen at the harbour on a cloudy morning"),
        (0.95, "Photo: A. N. Other / Agency, 2026"),
    ):
        cv2.putText(hole, text, (width // 12, round(height * at)), cv2.FONT_HERSHEY_DUPLEX, width / 1300, 255, width // 500)
    return hole


def crops(hole: Grey) -> list[tuple[int, int]]:
    """(height, width) of IOPaint's crops: the box of each outline plus CONTEXT on all sides, padded to multiples of 8."""
    outlines, _ = cv2.findContours(hole, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    boxes = [cv2.boundingRect(outline) for outline in outlines]
    return [
        (-(-min(high + 2 * CONTEXT, hole.shape[0]) // 8) * 8, -(-min(wide + 2 * CONTEXT, hole.shape[1]) // 8) * 8)
        for _, _, wide, high in boxes
    ]


# --- ways to split an image --------------------------------------------------------------------------------------


def _ways(costs: list[Cost]) -> list[Figure]:
    name = f"inpaint, 24 MP ({WIDTH} x {HEIGHT}), CPU"
    whole = [cost(HEIGHT, WIDTH) for cost in costs]
    figures = []
    for masks, hole, goal in (
        (f"{SHARE:.0%} in 10 compact holes", compact(HEIGHT, WIDTH, 10), 1.0),
        (f"{SHARE:.0%} in one compact hole", compact(HEIGHT, WIDTH, 1), 1.0),
        ("a scratch across", scratch(HEIGHT, WIDTH), 3.0),
        ("a cable across", cable(HEIGHT, WIDTH), 3.0),
        ("a caption", caption(HEIGHT, WIDTH), 3.0),
    ):
        tiles, around = plan(hole), _around(hole)
        sizes = [tile.size for tile in (*tiles.tiles, *tiles.guides.values())]
        ours = [around + sum(cost(*size) for size in sizes) for cost in costs]
        theirs = [sum(cost(*size) for size in crops(hole)) for cost in costs]
        if goal == 1.0:
            ratios = [whole_seconds / our_seconds for whole_seconds, our_seconds in zip(whole, ours, strict=True)]
            figures.append(figure(f"{name}, {masks}: whole image (extrapolated) / tiles", ratios, "x", 10.0))
        ratios = [their_seconds / our_seconds for their_seconds, our_seconds in zip(theirs, ours, strict=True)]
        figures.append(figure(f"{name}, {masks}: crops by box / tiles", ratios, "x", goal))
        figures.append(figure(f"{name}, {masks}: tiles", ours, "s"))
    return figures


def _seconds(session: LamaModel) -> Cost:
    """Measure the network once per side; the seconds it takes for any size."""
    spent = []
    for side in SIDES:
        picture, hole = np.full((side, side, 3), 90, np.uint8), np.zeros((side, side), np.uint8)
        hole[side // 3 : side // 2, side // 3 : side // 2] = 255
        start = time.perf_counter()
        session.run([picture], [hole])
        spent.append((time.perf_counter() - start) / side**2)
    areas = [side**2 for side in SIDES]
    return lambda height, width: height * width * float(np.interp(height * width, areas, spent))


def _around(hole: Grey) -> float:
    """Seconds spent on planning and pasting, measured with a network that does nothing."""
    operation = Lama()
    operation._open = lambda _: _Nothing()  # type: ignore[assignment,method-assign,return-value]
    pixels = np.full((*hole.shape, 3), 90, np.uint8)
    start = time.perf_counter()
    work = operation.prepare(Picture(pixels), Inputs(ITEM, parse_options("inpaint", "lama", {}), hole))
    operation.finish(work, [operation.run([sample])[0] for sample in work.samples])
    return time.perf_counter() - start


class _Nothing:
    def run(self, pictures: list[Pixels], holes: list[Grey]) -> list[Pixels]:
        return list(pictures)


ITEM = Item(index=0, source="https://bench.example/one.jpg")


def _batches(session: LamaModel, rounds: int) -> list[Figure]:
    pictures, holes = [np.full((256, 256, 3), 90, np.uint8)] * 4, [np.full((256, 256), 255, np.uint8)] * 4
    ratios = []
    for _ in range(rounds):
        start = time.perf_counter()
        session.run(pictures, holes)
        middle = time.perf_counter()
        for picture, hole in zip(pictures, holes, strict=True):
            session.run([picture], [hole])
        ratios.append((time.perf_counter() - middle) / (middle - start))
    return [figure("inpaint, tiles of 256 on a CPU: one by one / four in a batch", ratios, "x")]


# --- time by area -----------------------------------------------------------------------------------------------


def _areas(operation: Lama, rounds: int) -> list[Figure]:
    """Time that 1 or 8 holes add to an image, and that one hole adds to images of 3 or 48 megapixels."""
    holes, sizes = [], []
    for _ in range(rounds):
        bare, one, eight = (_through(operation, _jpeg(3000, 4000), _dots(3000, 4000, count)) for count in (0, 1, 8))
        holes.append((eight - bare) / (one - bare) / 8)
        small, large = _jpeg(1500, 2000), _jpeg(6000, 8000)
        plain = [_through(operation, file, _dots(*size, 0)) for file, size in ((small, (1500, 2000)), (large, (6000, 8000)))]
        filled = [_through(operation, file, _dots(*size, 1)) for file, size in ((small, (1500, 2000)), (large, (6000, 8000)))]
        sizes.append((filled[1] - plain[1]) / (filled[0] - plain[0]))
    return [
        figure("inpaint, 12 MP: 8 holes / 8 times one hole, without decode and encode", holes, "", 1.1, at_most=True),
        figure("inpaint, one hole: 48 MP / 3 MP, without decode and encode", sizes, "", 1.5, at_most=True),
    ]


def _dots(height: int, width: int, count: int) -> Grey:
    hole = np.zeros((height, width), np.uint8)
    for number in range(count):
        top, left = 300 + number // 4 * 600, 300 + number % 4 * 600
        hole[top : top + 60, left : left + 60] = 255
    return hole


def _through(operation: Lama, file: bytes, hole: Grey) -> float:
    start = time.perf_counter()
    picture = codec.decode(file, codec.probe(file, max_pixels=10**9))
    if hole.any():
        work = operation.prepare(picture, Inputs(ITEM, parse_options("inpaint", "lama", {}), hole))
        picture = operation.finish(work, [operation.run([sample])[0] for sample in work.samples])
    codec.encode(picture, format="jpeg", quality=90)
    return time.perf_counter() - start


def _jpeg(height: int, width: int) -> bytes:
    source = data.coffee()
    pixels = np.pad(source, ((0, height - source.shape[0]), (0, width - source.shape[1]), (0, 0)), mode="symmetric")
    return codec.encode(Picture(pixels), format="jpeg", quality=90).data


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory(folder: Path, weights: Path) -> list[Figure]:
    """Memory of a real node on images of 12, 48 and 100 megapixels, with holes that take the largest tiles that fit."""
    redis = EmbeddedRedis(folder / "redis")
    redis.start()
    environment = clean_environment(
        IMAGEMILL_REDIS_URL=redis.url,
        IMAGEMILL_FILES__READ_ROOTS=json.dumps([str(folder)]),
        IMAGEMILL_FILES__WRITE_ROOTS=json.dumps([str(folder)]),
        IMAGEMILL_FETCH__MAX_BYTES=str(2**28),
        IMAGEMILL_WEIGHTS__FOLDER=str(weights),
        IMAGEMILL_WORKER__ENGINES='["lama"]',
        IMAGEMILL_WORKER__OPERATIONS='["inpaint"]',
        IMAGEMILL_WORKER__MAX_PIXELS=str(110_000_000),
    )
    try:
        with WorkerProcess(environment, folder, name="memory") as node:
            node.wait_ready(240)
            (child,) = node.children()
            idle = _used(child, "VmRSS")
            peaks = {}
            for megapixels, (height, width) in MEMORY.items():
                count = -(-round(SHARE * height * width) // LARGEST_PART**2)
                hole = _squares(height, width, count)
                sources = folder / f"{megapixels}.jpg", folder / f"{megapixels}.png"
                sources[0].write_bytes(_jpeg(height, width))
                Image.fromarray(hole).save(sources[1], compress_level=1)
                Path(f"/proc/{child}/clear_refs").write_text("5")  # reset the peak
                _fill(redis.url, folder, *sources)
                peaks[megapixels] = _used(child, "VmHWM") - idle
    finally:
        redis.stop()
    pixels = {size: height * width for size, (height, width) in MEMORY.items()}
    growth = (peaks[100] - peaks[12]) / (3 * (pixels[100] - pixels[12]) / 1e6)
    name = f"inpaint, {SHARE:.0%} masked: memory in excess of the idle node"
    return [
        *(
            figure(f"{name} at {size} MP", peak, "MB", 1200.0 if size == 100 else None, at_most=True)
            for size, peak in peaks.items()
        ),
        figure("inpaint, 12 to 100 MP: growth of memory / of the pixels' bytes", growth, "x", 4.0, at_most=True),
    ]


def _squares(height: int, width: int, count: int) -> Grey:
    hole = np.zeros((height, width), np.uint8)
    side = round((SHARE * height * width / count) ** 0.5)
    for number in range(count):
        left = round((number + 0.5) * width / count) - side // 2
        hole[height // 2 - side // 2 :, left:][:side, :side] = 255
    return hole


def _used(pid: int, field: str) -> float:
    """A field of /proc/PID/status in MB."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def _fill(redis_url: str, folder: Path, source: Path, mask: Path) -> None:
    fields = {"operation": "inpaint", "options": {"engine": "lama"}, "output": {"url": (folder / "out").as_uri()}}
    client = Client(load_settings(redis_url=redis_url))
    try:
        rows = [SourceRow("row 1", {"source": source.as_uri(), "mask": mask.as_uri()})]
        job = client.submit(rows, Job.model_validate(fields)).job
        status = client.wait(job, timeout=600)
        assert status.done == 1, [row.message for row in client.results(job)]
    finally:
        client.close()


# --- seams ------------------------------------------------------------------------------------------------------------


def _step() -> Figure:
    """The largest step between neighbouring pixels filled by several tiles, beyond that of the gradient itself.

    It takes a fake network that continues gradients; with random weights, LaMa's fills are unrelated to each other.
    """
    truth = np.linspace(20, 235, 2400)[None, :, None] * 0.7 + np.linspace(0, 60, 1600)[:, None, None] + np.zeros(3)
    steps = []
    for hole in (scratch(1600, 2400), compact(1600, 2400, 1, 0.2)):
        operation, pixels = Lama(), np.rint(truth).astype(np.uint8)
        operation._open = lambda _: Continues()  # type: ignore[assignment,method-assign,return-value]
        pixels[hole > 0] = 0
        work = operation.prepare(Picture(pixels), Inputs(ITEM, parse_options("inpaint", "lama", {"tile": 512}), hole))
        result = operation.finish(work, [operation.run([sample])[0] for sample in work.samples]).pixels
        error = np.where(hole[..., None] > 0, result - truth, 0.0)
        inside = cv2.erode(hole, np.ones((3, 3), np.uint8))[..., None] > 0
        steps += [float(np.abs(np.diff(error, axis=axis, prepend=0) * inside).max()) for axis in (0, 1)]
    return figure("inpaint, gradient across tile borders: largest step, of 255", max(steps), "", 1.0, at_most=True)


if __name__ == "__main__":
    print_figures(run)
