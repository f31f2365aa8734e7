"""Searches for an 8-bit variant of a model that is faster on this CPU and makes nearly the same masks.

Several copies are made, fastest first, and compared with the original on images that they weren't calibrated on; the first
that is good enough is kept. If none of the whole model is, the parts of it that suffer most stay in single precision.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imagemill.shared.errors import ConfigurationError, ImageError, ImagemillError, UsageError, sentence
from imagemill.worker.hardware.cpu import has_vnni
from imagemill.worker.imaging.codec import decode
from imagemill.worker.imaging.headers import probe
from imagemill.worker.imaging.picture import Pixels
from imagemill.worker.models import eight_bits, single_precision
from imagemill.worker.models.added import TAKEN
from imagemill.worker.models.checksums import sha256_of
from imagemill.worker.models.eight_bits import CLIPPED, opened
from imagemill.worker.models.files import model_file, record_variant, variant
from imagemill.worker.models.trials import tried
from imagemill.worker.operations.remove_background.model_families import Family, family_of

LEAST, MOST = 5, 60
"""Number of images to calibrate on and compare with; more only take time."""
HELD_BACK = 3
"""One image in this many, and at least two, are held back from calibration to compare masks on."""
TIMED = 5
"""Most images on which the two models' times are compared."""
WORST = 0.9
"""Lowest accepted IoU of any mask, unless the accepted mean is lower."""
FASTER, FASTER_WITHOUT_VNNI = 1.8, 1.2
"""How many times as fast as the original a variant must be, on CPUs with and without instructions for 8 bits."""
BLOCKS = 16
"""Number of blocks into which a model is divided to find those that suffer."""
FLOATING = (1, 2, 4, 6)
"""How many of them are left in single precision, in turn."""
INSIDE = 0.5
"""Matte value from which a pixel belongs to the mask."""
EDGE = 2048
"""Longest edge of decoded images in pixels; more than any model's input."""
MAX_PIXELS = 100_000_000

Progress = Callable[[str, int, int], None]
"""Called with the current step, how many of its items are done, and how many it has."""


@dataclass(frozen=True)
class Try:
    """One 8-bit copy and how it compares with the original on the images held back.

    `iou` is the mean of the masks' intersection over union, `worst` the lowest. Times are medians in milliseconds per image on
    all cores, the two models taking turns. `error` is why the copy could not be made or run; then all figures are 0.
    """

    method: str
    iou: float = 0.0
    worst: float = 0.0
    fp32_ms: float = 0.0
    int8_ms: float = 0.0
    int8_bytes: int = 0
    error: str = ""

    @property
    def speed_up(self) -> float:
        return self.fp32_ms / self.int8_ms if self.int8_ms else 0.0


@dataclass(frozen=True)
class Report:
    """All that was tried, and the one that was accepted or came closest. `wanted`, `wanted_worst` and `wanted_speed_up` are
    the lowest accepted mean IoU, IoU of any image, and speed relative to the original's.
    """

    model: str
    accepted: bool
    best: Try
    tried: tuple[Try, ...]
    wanted: float
    wanted_worst: float
    wanted_speed_up: float
    fp32_bytes: int
    calibrated: int
    held_back: int
    passed_over: int
    vnni: bool

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON has it: the figures of `best` stand at the top, too."""
        rows = [{**asdict(row), "speed_up": row.speed_up} for row in (self.best, *self.tried)]
        return {**asdict(self), **rows[0], "best": rows[0], "tried": rows[1:]}

    def summary(self) -> str:
        """What it was compared on, what was wanted, and what was reached, for a person."""
        skipped = f"; skipped {self.passed_over} files" if self.passed_over else ""
        best, faster = self.best, self.best.speed_up
        return "\n".join(
            (
                f"calibrated on {self.calibrated} images, compared on {self.held_back} others{skipped}",
                f"{'accepted' if self.accepted else 'closest'}: {best.method}",
                f"masks: mean IoU {best.iou:.4f}, lowest {best.worst:.4f}; "
                f"the mean must be at least {self.wanted:g}, the lowest {self.wanted_worst:g}",
                f"speed: {best.int8_ms:.0f} ms per image instead of {best.fp32_ms:.0f} ms, {faster:.2f} times as fast; "
                f"must be {self.wanted_speed_up:g} times",
                f"size: {best.int8_bytes / 1e6:.1f} MB instead of {self.fp32_bytes / 1e6:.1f} MB",
            )
        )

    def shortcoming(self) -> str:
        """Why `best` was not accepted, as a sentence without a full stop."""
        best = self.best
        if best.error:
            return f"no 8-bit copy could be made or run ({best.error})"
        if best.iou < self.wanted or best.worst < self.wanted_worst:
            return "the 8-bit masks differ too much"
        hint = "" if self.vnni else "; this CPU has no instructions for 8 bits (VNNI), so try on one that has"
        return f"the 8-bit models are not fast enough{hint}"


@dataclass(frozen=True)
class Wanted:
    """What a copy must reach."""

    iou: float
    worst: float
    speed_up: float

    def share(self, row: Try) -> float:
        """The smallest share of a goal that a copy reaches; 1 or more if it is accepted."""
        goals = ((row.iou, self.iou), (row.worst, self.worst), (row.speed_up, self.speed_up))
        return min((got / goal for got, goal in goals if goal > 0), default=1.0) if not row.error else -1.0


def quantize(
    name: str,
    folder: Path,
    images: Path,
    *,
    accept: float = 0.97,
    faster: float | None = None,
    progress: Progress = lambda *_: None,
) -> Report:
    """Write `{name}.int8.onnx` next to a model if a copy reaches a mean IoU of `accept` on the images held back, no image
    less than `WORST`, and `faster` times the original's speed (by default, what is usual on this CPU).

    `folder` is the weights folder and `images` a folder of typical images. If no copy is accepted, an earlier one stays.
    Raises UsageError for too few images or a model that can't be quantised, and ConfigurationError if it is missing.
    """
    original = folder / "rembg" / f"{name}.onnx"
    try:
        family = family_of(folder, name)
    except ImagemillError as error:
        raise UsageError(f"{name} can't be quantised: imagemill doesn't know how to prepare images for it") from error
    if not original.is_file():
        remedy = f"pull {name}" if name in TAKEN else f"add {name} SOURCE --replace"
        raise ConfigurationError(f"{name} is not in {original.parent}: imagemill models {remedy}")
    progress("reading the model", 0, 1)
    tried(original, "fp32", single_precision.make, family.output)
    source, vnni = model_file(folder, "rembg", name), has_vnni()
    calibration, held_back, passed_over = divide(images)
    wanted = Wanted(accept, min(WORST, accept), faster if faster is not None else FASTER if vnni else FASTER_WITHOUT_VNNI)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=original.parent) as work:
        search = _Search(source, Path(work), family, calibration, held_back, progress)
        rows, best = search.run(wanted)
        accepted = wanted.share(best) >= 1
        report = Report(
            name,
            accepted,
            best,
            tuple(rows),
            wanted=wanted.iou,
            wanted_worst=wanted.worst,
            wanted_speed_up=wanted.speed_up,
            fp32_bytes=source.stat().st_size,
            calibrated=len(calibration),
            held_back=len(held_back),
            passed_over=passed_over,
            vnni=vnni,
        )
        if accepted:
            search.copy.replace(variant(original, "int8"))
            # Weights of 8 bits saturate on CPUs without VNNI; those of 7 bits, and dynamic ones, run anywhere.
            needs_vnni = vnni and best.method != DYNAMIC
            record_variant(original, "int8", accepted=True, details={**report.as_json(), "needs_vnni": needs_vnni})
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
        raise UsageError(f"{images} has {len(paths)} different images: at least {LEAST} are needed, and 30 are better")
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


DYNAMIC = "dynamic"


class _Search:
    """Makes one copy after another in `copy`, and compares each with the original."""

    def __init__(
        self,
        source: Path,
        work: Path,
        family: Family,
        calibration: Sequence[Path],
        held_back: Sequence[Path],
        progress: Progress,
    ) -> None:
        self.copy = work / "copy.onnx"
        self._source, self._prepared, self._work = source, work / "prepared.onnx", work
        self._family, self._calibration, self._held_back, self._progress = family, calibration, held_back, progress
        self._bits = 8 if has_vnni() else 7
        self._mattes: list[NDArray[np.float32]] = []

    def run(self, wanted: Wanted) -> tuple[list[Try], Try]:
        """All rows until one is accepted, and that one or the closest. Raises UsageError if the model can't be handled."""
        try:
            self._progress("preparing the graph", 0, 1)
            eight_bits.prepare(self._source, self._prepared, self._family.output)
            ranges = eight_bits.measured(self._prepared, self._shown("calibrating", self._calibration), self._work)
            self._original = opened(self._source)
            self._mattes = [self._matte(self._original, tensor) for tensor in self._shown("masks", self._held_back)]
        except ImagemillError:
            raise
        except Exception as error:  # onnx and onnxruntime raise anything on a graph that they can't handle
            raise UsageError(f"this model can't be quantised: {sentence(error)}") from error
        rows: list[Try] = []
        for method, make in self._methods(ranges, rows, wanted):
            rows.append(self._tried(method, make))
            if wanted.share(rows[-1]) >= 1:
                break
        return rows, max(rows, key=wanted.share)

    def _methods(
        self, ranges: dict[str, eight_bits.Ranges], rows: list[Try], wanted: Wanted
    ) -> Iterator[tuple[str, Callable[[], None]]]:
        """The ways to make a copy, fastest first, each with a name for people."""
        static = partial(eight_bits.make_static, self._prepared, self.copy, bits=self._bits)
        for way in CLIPPED:
            yield f"static, {way}", partial(static, ranges[way])
            if not rows[-1].error and rows[-1].speed_up < wanted.speed_up:
                break  # other ranges make it no faster
        fixed = list(rows)
        yield DYNAMIC, partial(eight_bits.make_dynamic, self._prepared, self.copy)
        if all(row.speed_up < wanted.speed_up for row in fixed):
            return  # with parts in 32 bits they would be slower still
        way = max(fixed, key=wanted.share).method.removeprefix("static, ")
        suffering = self._suffering(ranges[way])
        for count in FLOATING:
            floating = [name for block in suffering[:count] for name in block]
            text = f"static, {way}, {count} of {len(suffering)} blocks in 32 bits"
            yield text, partial(static, ranges[way], floating=floating)

    def _suffering(self, ranges: eight_bits.Ranges) -> list[list[str]]:
        """The model's blocks, the one first that changes the matte of a calibration image most if it alone has 8 bits."""
        blocks, errors = eight_bits.blocks(self._prepared, BLOCKS), []
        tensor = _tensor(self._calibration[0], self._family)
        matte = self._matte(self._original, tensor)
        for number, block in enumerate(blocks):
            self._progress("finding sensitive blocks", number, len(blocks))
            others = [name for other in blocks if other is not block for name in other]
            try:
                eight_bits.make_static(self._prepared, self.copy, ranges, bits=self._bits, floating=others)
                errors.append(float(np.abs(self._matte(opened(self.copy), tensor) - matte).mean()))
            except Exception:  # noqa: BLE001  # a block that can't be quantised at all stays as it is
                errors.append(float("inf"))
        return [blocks[place] for place in np.argsort(errors, kind="stable")[::-1]]

    def _tried(self, method: str, make: Callable[[], None]) -> Try:
        try:
            self._progress(f"making a copy ({method})", 0, 1)
            make()
            return self._compared(method)
        except ImagemillError:
            raise
        except Exception as error:  # noqa: BLE001  # such as nodes that have no 8-bit version
            return Try(method, error=sentence(error))

    def _compared(self, method: str) -> Try:
        copy, overlaps = opened(self.copy), list[float]()
        seconds: tuple[list[float], list[float]] = [], []
        for number, tensor in enumerate(self._shown(f"comparing ({method})", self._held_back)):
            if not number:
                self._matte(copy, tensor)  # the first run is slower
            start = time.perf_counter()
            matte = self._matte(copy, tensor)
            middle = time.perf_counter()
            overlaps.append(overlap(matte, self._mattes[number]))
            if number < TIMED:
                self._matte(self._original, tensor)
                seconds[0].append(time.perf_counter() - middle)
                seconds[1].append(middle - start)
        fp32_ms, int8_ms = (1000 * float(np.median(taken)) for taken in seconds)
        return Try(method, float(np.mean(overlaps)), min(overlaps), fp32_ms, int8_ms, self.copy.stat().st_size)

    def _matte(self, session: Any, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        names = [self._family.output or session.get_outputs()[0].name]
        (output,) = session.run(names, {session.get_inputs()[0].name: tensor})
        return self._family.matte(output[0])

    def _shown(self, step: str, paths: Sequence[Path]) -> Iterator[NDArray[np.float32]]:
        """Images as input, each prepared on request."""
        for done, path in enumerate(paths):
            self._progress(step, done, len(paths))
            yield _tensor(path, self._family)
        self._progress(step, len(paths), len(paths))
