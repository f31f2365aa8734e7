"""Quantises a model to 8 bits, calibrated on the user's images, and keeps the result only if its masks are nearly the same.

Uses QDQ as onnxruntime's documentation recommends for CPUs: uint8 activations and int8 weights per channel, after its own
pre-processing (shape inference, graph optimisation);
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imagemill.shared.errors import ConfigurationError, ImageError, UsageError
from imagemill.worker.hardware.cpu import has_vnni
from imagemill.worker.imaging.codec import decode
from imagemill.worker.imaging.headers import probe
from imagemill.worker.imaging.picture import Pixels
from imagemill.worker.models.checksums import sha256_of
from imagemill.worker.models.files import model_file, record_variant, variant
from imagemill.worker.operations.remove_background.model_families import FAMILIES, Family

LEAST, MOST = 5, 250
"""Number of images to calibrate on and compare with; more only take time."""
HELD_BACK = 5
"""One image in this many, and at least two, are held back from calibration to compare masks on."""
INSIDE = 0.5
"""Matte value from which a pixel belongs to the mask."""
EDGE = 2048
"""Longest edge of decoded images in pixels; more than any model's input."""
MAX_PIXELS = 100_000_000

Progress = Callable[[str, int, int], None]
"""Called with the current step, how many of its items are done, and how many it has."""


@dataclass(frozen=True)
class Report:
    """How the 8-bit model compares with the original on the images held back.

    `iou` is the mean of the masks' intersection over union, `worst` the lowest, and `wanted` the lowest accepted mean.
    Times are medians in milliseconds per image on all cores, the two models taking turns.
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

    def summary(self) -> str:
        """Four lines for a person."""
        skipped = f"; skipped {self.passed_over} files" if self.passed_over else ""
        return "\n".join(
            (
                f"calibrated on {self.calibrated} images, compared on {self.held_back} others{skipped}",
                f"masks: mean IoU {self.iou:.4f}, lowest {self.worst:.4f}; the mean must be at least {self.wanted:g}",
                f"speed: {self.int8_ms:.0f} ms per image instead of {self.fp32_ms:.0f} ms, {self.speed_up:.2f} times as fast",
                f"size: {self.int8_bytes / 1e6:.1f} MB instead of {self.fp32_bytes / 1e6:.1f} MB",
            )
        )


def quantize(
    name: str,
    folder: Path,
    images: Path,
    *,
    accept: float = 0.98,
    progress: Progress = lambda *_: None,
) -> Report:
    """Write `{name}.int8.onnx` next to a model if the mean IoU on the images held back is at least `accept`.

    `folder` is the weights folder and `images` a folder of typical images. If the new file is rejected, an earlier one
    stays. Raises UsageError for too few images or a model that can't be quantised, and ConfigurationError if the model is
    missing.
    """
    original = folder / "rembg" / f"{name}.onnx"
    if name not in FAMILIES:
        raise UsageError(f"{name} can't be quantised: imagemill doesn't know how to prepare images for it")
    if not original.is_file():
        raise ConfigurationError(f"{name} is not in {original.parent}: imagemill models pull {name}")
    source = model_file(folder, "rembg", name)  # the variant with a free batch axis, if there is one
    calibration, held_back, passed_over = divide(images)
    target = variant(original, "int8")
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=original.parent) as work:
        quantised = Path(work) / target.name
        _quantize(source, quantised, FAMILIES[name], calibration, progress)
        compared = _compare(source, quantised, FAMILIES[name], held_back, progress)
        report = Report(
            name,
            compared["iou"] >= accept,
            wanted=accept,
            fp32_bytes=source.stat().st_size,
            int8_bytes=quantised.stat().st_size,
            calibrated=len(calibration),
            held_back=len(held_back),
            passed_over=passed_over,
            **compared,
        )
        if report.accepted:
            quantised.replace(target)
            record_variant(original, "int8", accepted=True, details=asdict(report))
    return report


def divide(images: Path) -> tuple[list[Path], list[Path], int]:
    """A folder's images to calibrate on, those held back, and the number of files that were skipped.

    Images are sorted by the hash of their content, which is random but reproducible, because neighbours in a folder resemble
    each other. Duplicates are skipped, so no image is on both sides. Raises UsageError for too few images.
    """
    files = sorted((path for path in images.rglob("*") if path.is_file()), reverse=True)
    by_hash = {sha256_of(path): path for path in files}
    paths = list(islice((path for _, path in sorted(by_hash.items()) if _decodes(path)), MOST))
    if len(paths) < LEAST:
        raise UsageError(f"{images} has {len(paths)} different images: at least {LEAST} are needed, and 100 are better")
    count = max(2, len(paths) // HELD_BACK)
    return paths[count:], paths[:count], len(files) - len(paths)


def _decodes(path: Path) -> bool:
    try:
        _pixels(path)
    except ImageError:
        return False
    return True


def overlap(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Intersection over union of two mattes' masks; 1 if both are empty."""
    first, second = one >= INSIDE, other >= INSIDE
    union = np.count_nonzero(first | second)
    return float(np.count_nonzero(first & second) / union) if union else 1.0


def _tensor(path: Path, family: Family) -> NDArray[np.float32]:
    """An image as model input, [1, 3, size, size], prepared as the engine does."""
    return family.tensor(_pixels(path))[None]


def _pixels(path: Path) -> Pixels:
    data = path.read_bytes()
    return decode(data, probe(data, max_pixels=MAX_PIXELS), edge=EDGE).pixels


def _feeds(source: Path, family: Family, paths: Sequence[Path], progress: Progress) -> Iterator[dict[str, Any]]:
    """Inputs for onnxruntime's calibration, each prepared on request."""
    name = _session(source).get_inputs()[0].name
    for done, path in enumerate(paths):
        progress("calibrating", done, len(paths))
        yield {name: _tensor(path, family)}
    progress("calibrating", len(paths), len(paths))


def _quantize(source: Path, target: Path, family: Family, calibration: Sequence[Path], progress: Progress) -> None:
    """Pre-process, calibrate, quantise."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_name("prepared.onnx")
    progress("preparing the graph", 0, 1)
    quant_pre_process(source, prepared, skip_symbolic_shape=True)  # only transformers with free lengths need symbolic shapes
    quantize_static(
        prepared,
        target,
        SimpleNamespace(get_next=partial(next, _feeds(source, family, calibration, progress), None)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=not has_vnni(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        # Without CalibMaxIntermediateOutputs: in onnxruntime 1.31 it drops ranges that it should merge.
        calibrate_method=CalibrationMethod.MinMax,
    )
    prepared.unlink()


def _compare(source: Path, quantised: Path, family: Family, held_back: Sequence[Path], progress: Progress) -> dict[str, Any]:
    sessions = {"fp32": _session(source), "int8": _session(quantised)}
    seconds: dict[str, list[float]] = {kind: [] for kind in sessions}
    overlaps = []
    for number, path in enumerate(held_back):
        progress("comparing", number, len(held_back))
        tensor, mattes = _tensor(path, family), []
        for kind, session in sessions.items():
            feed, names = {session.get_inputs()[0].name: tensor}, [session.get_outputs()[0].name]
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
