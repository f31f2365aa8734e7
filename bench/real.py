"""The whole line on a real model, beside rembg: the same pixels, the masks, images per second, memory.

    python -m bench.real --weights FOLDER --images FOLDER [--rounds N]

FOLDER of the weights holds isnet-fp16.onnx, ISNet (general use), or is a weights folder with rembg/isnet-general-use.onnx
and its variants; if there is an 8-bit one, it is measured, too. Images are photos, with reference mattes if you have them,
named as in bench.cutout. Both sides get the same file of the model, and are timed in turn on copies of the same photos: a
node from submission to the last record, with a store that takes 50 ms per PUT, and `rembg p` from start to end on a folder.
The latter needs the extra `cli` of rembg.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.cutout import pairs, read
from bench.ending import end_on_sigterm
from bench.figures import Figure, figure
from bench.nodes import OurNode, environment
from bench.servers import Servers
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.messages import Job, Output, Policy
from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.worker.imaging.scale import resize
from imagemill.worker.models import single_precision
from imagemill.worker.models.files import is_current
from imagemill.worker.models.trials import tried
from tests.services.images import ImageServer
from tests.workers import clean_environment

MODEL, FILE = "isnet-general-use", "isnet-fp16.onnx"
GOAL = 3.0
COPIES, ROUNDS = 3, 2
PUT = 0.05
NO_SUBJECT = np.zeros((1, 1), np.uint8)


@dataclass
class Photo:
    """A photo, its reference matte if there is one, and rembg's own result."""

    path: Path
    reference: Path | None
    cut: NDArray[np.uint8] = field(default_factory=lambda: NO_SUBJECT)


def run(rounds: int = ROUNDS, *, weights: Path, images: Path) -> list[Figure]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        weights = _installed(weights, folder)
        photos = [Photo(*pair) for pair in pairs(images)]
        if not photos:
            raise SystemExit(f"{images} has no photos whose names bench.cutout takes")
        rembg = _environment_of_rembg(weights, folder)
        _cut_by_rembg(photos, rembg, folder)
        server = stack.enter_context(ImageServer({f"/{photo.path.name}": photo.path.read_bytes() for photo in photos}))
        servers = stack.enter_context(Servers([], put_delay=PUT))
        redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
        nodes = {"fp32": _node(stack, folder, "fp32", redis.url, servers, weights)}
        if is_current(weights / "rembg" / f"{MODEL}.onnx", "int8"):
            nodes["int8"] = _node(stack, folder, "int8", redis.url.removesuffix("/0") + "/1", servers, weights)
        figures = _agreement(nodes["fp32"], photos, server, folder)
        return figures + _speed(nodes, photos, server, rembg, folder, rounds)


def _installed(source: Path, folder: Path) -> Path:
    """A weights folder with the model and the variant that CPUs run."""
    weights = source
    if (source / FILE).is_file():
        weights = folder / "weights"
        (weights / "rembg").mkdir(parents=True)
        shutil.copyfile(source / FILE, weights / "rembg" / f"{MODEL}.onnx")
    original = weights / "rembg" / f"{MODEL}.onnx"
    if not original.is_file():
        raise SystemExit(f"{source} has neither {FILE} nor rembg/{MODEL}.onnx")
    assert tried(original, "fp32", single_precision.make) in ("made", "needless")
    return weights


def _node(stack: ExitStack, folder: Path, kind: str, url: str, servers: Servers, weights: Path) -> OurNode:
    place = folder / kind
    place.mkdir()
    settings = environment(
        url,
        servers,
        weights,
        IMAGEMILL_ONNX__INT8="true" if kind == "int8" else "false",
        IMAGEMILL_FILES__WRITE_ROOTS=json.dumps([str(folder)]),
    )
    return stack.enter_context(OurNode(settings, place))


# --- agreement --------------------------------------------------------------------------------------------------------


def _agreement(node: OurNode, photos: list[Photo], server: ImageServer, folder: Path) -> list[Figure]:
    """How many of `exact`'s results are rembg's, and how much the others' alpha and masks differ."""
    cuts = {}
    for exact in (True, False):
        target = folder / f"exact-{exact}".lower()
        _run(node, photos, server, Output(url=target.as_uri(), format="png"), exact=exact)
        cuts[exact] = _by_name(target, photos)
    equal = [np.array_equal(photo.cut, cuts[True][photo.path.stem]) for photo in photos]
    apart = [np.abs(photo.cut[..., 3].astype(int) - cuts[False][photo.path.stem][..., 3]) for photo in photos]
    ours, theirs = [], []
    for photo in photos:
        if photo.reference is not None:
            expected = read(photo.reference)[..., 3]
            ours.append(_overlap(cuts[False][photo.path.stem][..., 3], expected))
            theirs.append(_overlap(photo.cut[..., 3], expected))
    name, count, mean = f"real {MODEL}", len(photos), float(np.mean([part.mean() for part in apart]))
    figures = [
        figure(f"{name}, exact: photos with rembg's very pixels, of {count}", sum(equal), "", count),
        figure(f"{name}: mean alpha difference to rembg, of 255", mean, "", 0.5, at_most=True, rounds=count),
        figure(f"{name}: largest alpha difference to rembg, of 255", float(max(part.max() for part in apart)), rounds=count),
    ]
    for side, overlaps in ((name, ours), ("rembg", theirs)):
        if overlaps:
            figures.append(
                figure(f"{side}: mean IoU with the reference mattes", float(np.mean(overlaps)), rounds=len(overlaps))
            )
    return figures


def _run(
    node: OurNode, photos: list[Photo], server: ImageServer, output: Output, *, exact: bool = False, copies: int = 1
) -> float:
    """Seconds from submission until the last image is recorded."""
    options = RembgRemoveBackground(model=MODEL, exact=exact)
    node.jobs.spec = Job(operation="remove-background", output=output, options=options, policy=Policy(reuse=False))
    return node.seconds([server.url(f"/{photo.path.name}?{copy}") for copy in range(copies) for photo in photos])


def _by_name(folder: Path, photos: list[Photo]) -> dict[str, NDArray[np.uint8]]:
    """The results in a folder, by the names of their photos, which begin the results' names or follow a number."""
    return {photo.path.stem: read(next(folder.rglob(f"*{photo.path.stem}*.png"))) for photo in photos}


def _overlap(alpha: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    expected = resize(np.ascontiguousarray(expected), (alpha.shape[1], alpha.shape[0]))
    ours, theirs = alpha > 127, expected > 127
    return float((ours & theirs).sum() / max(1, (ours | theirs).sum()))


# --- rembg ------------------------------------------------------------------------------------------------------------


def _environment_of_rembg(weights: Path, folder: Path) -> dict[str, str]:
    home = folder / "rembg"
    home.mkdir()
    (home / f"{MODEL}.onnx").symlink_to(weights / "rembg" / f"{MODEL}.onnx")
    return clean_environment(U2NET_HOME=str(home), MODEL_CHECKSUM_DISABLED="1")


def _cut_by_rembg(photos: list[Photo], environment: Mapping[str, str], folder: Path) -> None:
    """Have rembg's session, in a process of its own, cut out each photo."""
    results = folder / "by-rembg"
    results.mkdir()
    program = (
        "import sys; from pathlib import Path; from PIL import Image; from rembg import new_session, remove\n"
        f"session = new_session({MODEL!r}, providers=['CPUExecutionProvider'])\n"
        "for path in map(Path, sys.argv[2:]):\n"
        "    remove(Image.open(path), session=session).save(Path(sys.argv[1], path.stem + '.png'))\n"
    )
    paths = [str(photo.path) for photo in photos]
    subprocess.run([sys.executable, "-c", program, str(results), *paths], env=dict(environment), check=True)
    for photo in photos:
        photo.cut = np.asarray(Image.open(results / f"{photo.path.stem}.png"))


def _rembg_p(photos: list[Photo], environment: Mapping[str, str], folder: Path) -> float:
    """Seconds that `rembg p` takes for a folder with copies of the photos."""
    source, target = folder / "p-in", folder / "p-out"
    source.mkdir(exist_ok=True)
    for photo in photos:
        for copy in range(COPIES):
            shutil.copyfile(photo.path, source / f"{copy}-{photo.path.name}")
    shutil.rmtree(target, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("rembg")), "p", "-m", MODEL, str(source), str(target)]
    start = time.perf_counter()
    subprocess.run(command, env=dict(environment), check=True, stdout=subprocess.DEVNULL)
    spent = time.perf_counter() - start
    made = len(list(target.rglob("*.png")))
    assert made == len(photos) * COPIES, f"rembg p made {made} files"
    return spent


# --- speed ------------------------------------------------------------------------------------------------------------


def _speed(
    nodes: dict[str, OurNode],
    photos: list[Photo],
    server: ImageServer,
    rembg: Mapping[str, str],
    folder: Path,
    rounds: int,
) -> list[Figure]:
    """Images per second of each side, in turn, and the most memory that each used."""
    count, output = len(photos) * COPIES, Output(url="s3://results/real", format="png")
    rates: dict[str, list[float]] = {kind: [] for kind in (*nodes, "rembg p")}
    for node in nodes.values():
        _run(node, photos[:1], server, output)  # opens the model
    for number in range(rounds):
        for kind in sorted(rates, reverse=bool(number % 2)):
            if kind == "rembg p":
                rates[kind].append(count / _rembg_p(photos, rembg, folder))
            else:
                rates[kind].append(count / _run(nodes[kind], photos, server, output, copies=COPIES))
    figures = [figure(f"{kind}: images per second", values, "/s") for kind, values in rates.items()]
    figures += [
        figure(f"{kind} / rembg p", [a / b for a, b in zip(rates[kind], rates["rembg p"], strict=True)], "", GOAL)
        for kind in nodes
    ]
    figures += [
        figure(f"{kind}: most memory of the node's child", node.peak_memory() / 1e6, "MB") for kind, node in nodes.items()
    ]
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return [*figures, figure("rembg: most memory", largest / 1e6, "MB")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=Path, default=os.environ.get("IMAGEMILL_BENCH_IMAGES"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    if arguments.images is None:
        parser.error("--images FOLDER is missing: photos, and reference mattes if you have them, see bench.cutout")
    end_on_sigterm()
    for result in run(arguments.rounds, weights=arguments.weights.resolve(), images=Path(arguments.images)):
        print(json.dumps(result))


if __name__ == "__main__":
    main()
