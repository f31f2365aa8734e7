"""Makes an 8-bit variant of a model that is faster on this CPU and makes nearly the same masks, if there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imagemill.shared.errors import ConfigurationError, UsageError, sentence
from imagemill.worker.hardware.cpu import has_vnni
from imagemill.worker.models import eight_bits, single_precision
from imagemill.worker.models.added import TAKEN
from imagemill.worker.models.download import check_space
from imagemill.worker.models.eight_bit_search import DYNAMIC, Progress, Reading, Search, Try, Wanted
from imagemill.worker.models.files import model_file, record_variant, variant, variant_record
from imagemill.worker.models.trials import tried
from imagemill.worker.models.typical_images import divide
from imagemill.worker.models.workshop import workshop
from imagemill.worker.transfer.files import publish

WORST = 0.9
"""Lowest accepted IoU of any mask, unless the accepted mean is lower."""
FASTER, FASTER_WITHOUT_VNNI = 1.8, 1.2
"""How many times as fast as the original a variant must be, on CPUs with and without instructions for 8 bits."""


@dataclass(frozen=True)
class Report:
    """All that was tried, and the one that was accepted or came closest. `wanted`, `wanted_worst` and `wanted_speed_up` are
    the lowest accepted mean IoU, IoU of any mask, and speed relative to the original's. `masks` is how many the original
    finds in the images held back.
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
    masks: int
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
                f"calibrated on {self.calibrated} images, compared {self.masks} masks of {self.held_back} others{skipped}",
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


def quantize(
    name: str,
    folder: Path,
    images: Path,
    *,
    accept: float = 0.97,
    faster: float | None = None,
    progress: Progress = lambda *_: None,
) -> Report:
    """Write `{name}.int8.onnx` next to a model if a copy reaches a mean IoU of `accept` on the images held back, no mask
    less than `WORST`, and `faster` times the original's speed (by default, what is usual on this CPU).

    `folder` is the weights folder and `images` a folder of typical images. If no copy is accepted, an earlier one stays.
    Raises UsageError for unfit images or a model that can't be quantised, and ConfigurationError if it is missing or the
    folder can't be written.
    """
    reading, original = Reading.of(folder, name), folder / "rembg" / f"{name}.onnx"
    progress("reading the model", 0, 1)
    _check(original, name)
    progress("choosing images", 0, 1)
    calibration, held_back, passed_over = divide(images)
    with _room(original) as work:
        progress("reading the model", 0, 1)
        source, vnni = _in_single_precision(folder, original, reading.family.output), has_vnni()
        check_space(work, f"quantising {name}", 3 * source.stat().st_size)
        wanted = Wanted(accept, min(WORST, accept), faster if faster is not None else FASTER if vnni else FASTER_WITHOUT_VNNI)
        search = Search(source, work, reading, calibration, held_back, progress)
        rows, best = search.run(wanted)
        report = Report(
            name,
            wanted.share(best) >= 1,
            best,
            tuple(rows),
            wanted=wanted.iou,
            wanted_worst=wanted.worst,
            wanted_speed_up=wanted.speed_up,
            fp32_bytes=source.stat().st_size,
            calibrated=len(calibration),
            held_back=len(held_back),
            masks=search.found,
            passed_over=passed_over,
            vnni=vnni,
        )
        if report.accepted:
            _keep(search.copy, original, report)
    return report


def _check(original: Path, name: str) -> None:
    """Raise ConfigurationError if a model's file is missing or damaged, and UsageError if it has 8 bits already."""
    import onnx

    if not original.is_file():
        remedy = f"pull {name}" if name in TAKEN else f"add {name} SOURCE --replace"
        raise ConfigurationError(f"{name} is not in {original.parent}: imagemill models {remedy}")
    try:
        model = onnx.load(original)
        reason = "" if model.graph.output else "it holds no network"
    except Exception as error:  # noqa: BLE001  # onnx and protobuf raise anything on a file that is damaged
        reason = sentence(error)
    if reason:
        raise ConfigurationError(f"{original} can't be read ({reason}): check it with `imagemill models verify {name}`")
    if eight_bits.is_quantised(model):
        raise UsageError(f"{name} has 8 bits already")


@contextmanager
def _room(original: Path) -> Iterator[Path]:
    """A folder for copies. Raises UsageError if another process is at it, ConfigurationError if nothing can be written."""
    folder, name = original.parent, original.stem
    try:
        with workshop(variant(original, "int8"), wait=False) as work:
            yield work
    except BlockingIOError as error:
        raise UsageError(f"another process is quantising {name}") from error
    except OSError as error:
        raise ConfigurationError(f"{folder} can't be written: {sentence(error)}") from error


def _in_single_precision(folder: Path, original: Path, output: str | None) -> Path:
    """The file of a model that CPUs run, made now if need be. Raises UsageError if it can't be made."""
    outcome = tried(original, "fp32", single_precision.make, output)
    if outcome in ("refused", "killed"):
        reason = variant_record(original, "fp32").get("reason", "it ran out of memory or was killed")
        raise UsageError(f"{original.stem} can't be quantised, since it can't be converted to single precision: {reason}")
    return model_file(folder, "rembg", original.stem)


def _keep(copy: Path, original: Path, report: Report) -> None:
    copy.chmod(0o644)  # workers may run as another user
    publish(copy, variant(original, "int8"))
    # Weights of 8 bits saturate on CPUs without VNNI; those of 7 bits, and dynamic ones, run anywhere.
    needs_vnni = report.vnni and report.best.method != DYNAMIC
    record_variant(original, "int8", accepted=True, details={**report.as_json(), "needs_vnni": needs_vnni})
