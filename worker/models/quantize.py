"""Makes a model in 8 bits, calibrated on one's own images, and keeps it only if its masks are nearly the same.

QDQ as onnxruntime's documentation recommends it for CPUs: activations uint8, weights int8 per channel, after its own
pre-processing (shapes inferred, graph optimised); https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imagemill.shared.errors import ConfigurationError, ImageError, MissingExtra, UsageError
from imagemill.worker.imaging.codec import decode
from imagemill.worker.imaging.headers import probe
from imagemill.worker.imaging.picture import Pixels
from imagemill.worker.models.files import model_file, put_on_record, variant
from imagemill.worker.operations.remove_background.model_families import FAMILIES, Family

LEAST, MOST = 5, 250
"""Images to calibrate on and to compare with; more than the most bring nothing but time."""
HELD_BACK = 5
"""One image in so many is not calibrated on, at least two in all: on these the masks are compared."""
INSIDE = 0.5
"""From this matte value on a pixel belongs to the mask."""
EDGE = 2048
"""Longest edge of the decoded images in pixels; above what any model looks at."""
MAX_PIXELS = 100_000_000

Tell = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Report:
    """How the 8-bit model compares with the original on the images held back.

    `iou` is the mean over them of the masks' intersection over union, `worst` the least of them; times are
    medians in milliseconds of one image on all cores, measured in turns.
    """

    model: str
    accepted: bool
    iou: float
    worst: float
    wanted: float
    fp32_ms: float
    int8_ms: float
    fp32_bytes: int
    int8_bytes: int
    calibrated: int
    held_back: int
    passed_over: int

    @property
    def speed_up(self) -> float:
        return self.fp32_ms / self.int8_ms


def quantize(
    name: str, folder: Path, images: Path, *, engine: str = "rembg", accept: float = 0.98, tell: Tell = lambda *_: None
) -> Report:
    """Write `{name}.int8.onnx` beside a model if the mean IoU on the images held back is at least `accept`.

    `folder` is the weights' folder, `images` one with images of the kind that the model will work on. A file that was
    accepted earlier stays where this one is refused. Raises UsageError for too few images or a model that has no
    such form, ConfigurationError where the model isn't there, and MissingExtra.
    """
    original = folder / engine / f"{name}.onnx"
    if name not in FAMILIES:
        raise UsageError(f"{name} can't be made in 8 bits")
    if not original.is_file():
        raise ConfigurationError(f"{name} is not in {original.parent}: imagemill models pull {name}")
    source = model_file(folder, engine, name)  # with a free batch axis where that was made
    calibration, held_back, passed_over = divide(images)
    target = variant(original, "int8")
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=original.parent) as place:
        made = Path(place) / target.name
        _make(source, made, FAMILIES[name], calibration, tell)
        compared = _compare(source, made, FAMILIES[name], held_back, tell)
        report = Report(
            name,
            compared["iou"] >= accept,
            wanted=accept,
            fp32_bytes=source.stat().st_size,
            int8_bytes=made.stat().st_size,
            calibrated=len(calibration),
            held_back=len(held_back),
            passed_over=passed_over,
            **compared,
        )
        if report.accepted:
            made.replace(target)
            put_on_record(original, "int8", accepted=True, told=asdict(report))
    return report


def divide(images: Path) -> tuple[list[Path], list[Path], int]:
    """The images of a folder to calibrate on, those held back, and how many of its files were passed over.

    In the order of their contents' hashes, which is by chance and always the same: neighbours in a folder resemble
    each other. The same image twice counts once, so that none is on both sides.
    """
    found: dict[str, Path] = {}
    passed_over = 0
    for path in sorted(path for path in images.rglob("*") if path.is_file()):
        data = path.read_bytes()
        try:
            probe(data, max_pixels=MAX_PIXELS)
        except ImageError:
            passed_over += 1
            continue
        passed_over += found.setdefault(hashlib.sha256(data).hexdigest(), path) is not path
    paths = list(islice((found[key] for key in sorted(found) if _is_whole(found[key])), MOST))
    if len(paths) < LEAST:
        raise UsageError(f"{images} has {len(paths)} different images; at least {LEAST} are needed, and 100 are better")
    count = max(2, len(paths) // HELD_BACK)
    return paths[count:], paths[:count], passed_over + len(found) - len(paths)


def _is_whole(path: Path) -> bool:
    try:
        _pixels(path)
    except ImageError:
        return False
    return True


def overlap(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Intersection over union of two mattes' masks; 1 where both are empty."""
    first, second = one >= INSIDE, other >= INSIDE
    union = np.count_nonzero(first | second)
    return float(np.count_nonzero(first & second) / union) if union else 1.0


def _tensor(path: Path, family: Family) -> NDArray[np.float32]:
    """[1, 3, size, size], prepared as the engine prepares it."""
    return family.tensor(_pixels(path))[None]


def _pixels(path: Path) -> Pixels:
    data = path.read_bytes()
    return decode(data, probe(data, max_pixels=MAX_PIXELS), edge=EDGE).pixels


class _Reader:
    """What onnxruntime's calibration asks for its inputs, one after the other; each is prepared when it is wanted."""

    def __init__(self, name: str, family: Family, paths: Sequence[Path], tell: Tell) -> None:
        self.name, self.tell, self.total, self.done = name, tell, len(paths), 0
        self._tensors: Iterator[NDArray[np.float32]] = (_tensor(path, family) for path in paths)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        self.tell("calibrating", self.done, self.total)
        self.done += 1
        tensor = next(self._tensors, None)
        return None if tensor is None else {self.name: tensor}


def _make(source: Path, made: Path, family: Family, calibration: Sequence[Path], tell: Tell) -> None:
    """Pre-process, calibrate, quantise."""
    try:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ModuleNotFoundError as error:
        raise MissingExtra(f"this needs {error.name}, which is not installed: pip install 'imagemill[rembg]'") from error
    prepared = made.with_name("prepared.onnx")
    tell("preparing the graph", 0, 1)
    quant_pre_process(source, prepared, skip_symbolic_shape=True)  # symbolic shapes are for transformers with free lengths
    quantize_static(
        prepared,
        made,
        _Reader(_session(source).get_inputs()[0].name, family, calibration, tell),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=not has_vnni(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        # Without CalibMaxIntermediateOutputs, which in onnxruntime 1.31 drops what it should merge.
        calibrate_method=CalibrationMethod.MinMax,
    )
    prepared.unlink()


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU adds products of 8 bits without saturating; one that doesn't needs weights of 7 bits."""
    try:
        return any(name in cpuinfo.read_text() for name in ("avx512_vnni", "avx_vnni"))
    except OSError:
        return False


def _compare(source: Path, made: Path, family: Family, held_back: Sequence[Path], tell: Tell) -> dict[str, Any]:
    sessions = {"fp32": _session(source), "int8": _session(made)}
    seconds: dict[str, list[float]] = {kind: [] for kind in sessions}
    overlaps = []
    for number, path in enumerate(held_back):
        tell("comparing", number, len(held_back))
        tensor, mattes = _tensor(path, family), []
        for kind, session in sessions.items():
            feed = {session.get_inputs()[0].name: tensor}
            names = [session.get_outputs()[0].name]
            if not number:
                session.run(names, feed)  # the first run is slower
            start = time.perf_counter()
            (output,) = session.run(names, feed)
            seconds[kind].append(time.perf_counter() - start)
            mattes.append(family.matte(output[0]))
        overlaps.append(overlap(*mattes))
    times = {f"{kind}_ms": float(np.median(taken)) * 1000 for kind, taken in seconds.items()}
    return dict(iou=float(np.mean(overlaps)), worst=min(overlaps), **times)


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
