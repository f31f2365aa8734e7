"""The contract of worker/operations/base.py as checks that every engine must pass.

`check` runs all of them on one loaded operation. They do not judge how good a result looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from imagemill.shared.engines import engines_of
from imagemill.shared.messages import Item, Job
from imagemill.shared.options.base import EngineOptions
from imagemill.worker.checking import quality
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.imaging.scale import fit
from imagemill.worker.operations.base import AnyOperation, Evidence, Inputs, Sample, Spec, Untouched, Work

REFERENCE = "https://images.example/reference.png"
OPAQUE = ("background", "background_image", "mask_only")
"""Options that make a cut-out opaque."""


@dataclass(frozen=True)
class Result:
    pixels: Pixels
    notes: tuple[str, ...]


def scene(height: int, width: int, channels: int = 3, seed: int = 0) -> Pixels:
    """A blob on a noisy gradient; alpha, if any, falls off to the right."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    pixels = np.stack([60 + 60 * x / width, 90 + 40 * y / height, np.full_like(x, 120)], axis=2)
    inside = ((x - width / 2) / (0.3 * width)) ** 2 + ((y - height / 2) / (0.3 * height)) ** 2 < 1
    pixels[inside] = (220, 160 - 40 * seed % 160, 40)
    pixels = np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255)
    if channels == 4:
        pixels = np.dstack([pixels, np.clip(400 - 400 * x / width, 0, 255)])
    return np.ascontiguousarray(np.rint(pixels), np.uint8)


PICTURES: dict[str, Pixels] = {
    "rgb": scene(48, 64),
    "rgba": scene(50, 40, channels=4, seed=1),
    "larger": scene(90, 300, seed=2),
    "one pixel": scene(1, 1),
    "one transparent pixel": np.zeros((1, 1, 4), np.uint8),
    "one row": scene(1, 33),
    "one column": scene(17, 1, channels=4),
    "thin": scene(2000, 3),
    "flat": np.full((40, 30, 3), 200, np.uint8),
    "all transparent": np.zeros((20, 30, 4), np.uint8),
    "grey as rgb": np.repeat(scene(40, 40)[..., :1], 3, axis=2),
}


def hole(pixels: Pixels) -> Grey:
    """A mask over a ninth of the picture; empty if the picture has only one pixel."""
    height, width = pixels.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    if height * width > 1:
        mask[height // 3 : height // 3 + max(1, height // 3), width // 3 : width // 3 + max(1, width // 3)] = 255
    return mask


def inputs(operation: AnyOperation, pixels: Pixels, options: EngineOptions) -> Inputs[Any]:
    item = Item(index=0, source="https://images.example/one.png")
    mask = hole(pixels) if operation.spec.needs_mask else None
    return Inputs(item, options, mask, {REFERENCE: Picture(scene(30, 30, seed=3))}.__getitem__)


@dataclass
class Prepared:
    """An image after `prepare`: the picture, and its work, or Untouched."""

    picture: Picture
    work: Work[Any, Any, Any] | Untouched

    @property
    def samples(self) -> Sequence[Sample[Any, Any]]:
        return self.work.samples if isinstance(self.work, Work) else ()

    @property
    def evidence(self) -> Evidence:
        return self.work.evidence if isinstance(self.work, Work) else Evidence()


def prepared(operation: AnyOperation, pixels: Pixels, options: EngineOptions) -> Prepared:
    """`prepare`, with checks of what it returns; `finish` may overwrite `pixels` later."""
    picture = Picture(pixels, "jpeg", full_size=(pixels.shape[1], pixels.shape[0]))
    work = operation.prepare(picture, inputs(operation, pixels, options))
    assert isinstance(work, Untouched) or work.samples, "work without samples"
    if isinstance(work, Work) and work.retry is not None:
        keys = [[operation.group_key(sample) for sample in attempt.samples] for attempt in (work, work.retry())]
        assert keys[0] == keys[1], "a retry must have the same group keys"
    return Prepared(picture, work)


def finished(operation: AnyOperation, prepared: Prepared, outputs: Sequence[Any]) -> Picture:
    return prepared.picture if isinstance(prepared.work, Untouched) else operation.finish(prepared.work, outputs)


def take_through(operation: AnyOperation, pixels: Pixels, options: EngineOptions) -> Result:
    """One image through all three steps, in batches no larger than the spec's."""
    source = pixels.copy()
    work = prepared(operation, source, options)
    outputs = run_all(operation, work.samples)
    assert np.array_equal(source, pixels), "only `finish` may overwrite the source"
    picture = finished(operation, work, outputs)
    assert np.array_equal(source, pixels) or not work.evidence.comparable, "the check still needs the source"
    assert picture.format == "jpeg", "the source's format is lost"
    if isinstance(work.work, Work):
        check_evidence(operation, picture, Picture(pixels), work.work, options)
    return Result(picture.pixels, tuple(work.work.notes))


def run_all(operation: AnyOperation, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
    """The outputs of `samples`, run in batches as the line does, one group after the other."""
    outputs: list[Any] = [None] * len(samples)
    groups: dict[Any, list[int]] = {}
    for place, sample in enumerate(samples):
        groups.setdefault(operation.group_key(sample), []).append(place)
    size = operation.spec.max_batch
    for places in groups.values():
        for start in range(0, len(places), size):
            batch = places[start : start + size]
            batch_outputs = operation.run([samples[place] for place in batch])
            assert len(batch_outputs) == len(batch), "run must return one output per sample"
            for place, output in zip(batch, batch_outputs, strict=True):
                outputs[place] = output
    return outputs


def check(operation: AnyOperation, options: EngineOptions) -> None:
    """Run all checks with one set of options."""
    check_spec(operation.spec)
    alone = {name: check_picture(operation, options, name, pixels) for name, pixels in PICTURES.items()}
    check_batches(operation, options, alone)
    check_threads(operation, options, alone)


def check_spec(spec: Spec) -> None:
    """The spec names an engine that jobs can select."""
    assert spec.engine in engines_of(spec.name)
    assert spec.max_batch >= 1


def check_picture(operation: AnyOperation, options: EngineOptions, name: str, pixels: Pixels) -> bytes:
    """The result for one picture, which is returned, is well-formed and repeatable."""
    edge = operation.work_edge(options)
    assert edge is None or edge >= 1, name
    result = take_through(operation, pixels, options)
    height, width, channels = result.pixels.shape
    assert result.pixels.dtype == np.uint8, name
    assert channels in (3, 4), name
    assert result.pixels.flags.c_contiguous, name
    assert (width, height) == fit((pixels.shape[1], pixels.shape[0]), edge), name
    if operation.spec.makes_alpha and not any(getattr(options, option, None) for option in OPAQUE):
        assert channels == 4, name
    elif not operation.spec.makes_alpha:
        assert channels == pixels.shape[2], f"{name}: alpha was lost or added"
    repeated = take_through(operation, pixels, options)
    assert repeated.pixels.tobytes() == result.pixels.tobytes(), f"{name}: the result differs when repeated"
    assert repeated.notes == result.notes, name
    return result.pixels.tobytes()


def check_evidence(
    operation: AnyOperation, result: Picture, source: Picture, work: Work[Any, Any, Any], options: EngineOptions
) -> None:
    """The check can measure the result from the work's evidence."""
    fields = {"operation": operation.spec.name, "options": options, "output": {"url": "s3://results/x"}}
    checked = quality.check(result, source, work, operation.spec, Job.model_validate(fields))
    assert checked.picture.pixels is result.pixels
    assert checked.measures is not None
    assert (checked.measures.opaque is not None) == operation.spec.makes_alpha
    hole = work.evidence.hole
    assert hole is None or hole.shape == result.pixels.shape[:2]
    assert hole is None or not work.evidence.comparable


def check_batches(operation: AnyOperation, options: EngineOptions, alone: dict[str, bytes]) -> None:
    """A result depends neither on the other samples in its batch nor on their order."""
    for names in (list(PICTURES), list(PICTURES)[::-1]):
        works = [prepared(operation, PICTURES[name].copy(), options) for name in names]
        outputs = iter(run_all(operation, [sample for work in works for sample in work.samples]))
        for name, work in zip(names, works, strict=True):
            pixels = finished(operation, work, [next(outputs) for _ in work.samples]).pixels
            assert pixels.tobytes() == alone[name], f"{name}: the result depends on the batch"


def check_threads(operation: AnyOperation, options: EngineOptions, alone: dict[str, bytes]) -> None:
    """Results stay the same when several threads call `prepare` and `finish`, and one thread calls `run`."""
    pictures = list(PICTURES.values()) * 2
    with ThreadPoolExecutor(4) as pool:
        works = list(pool.map(lambda pixels: prepared(operation, pixels.copy(), options), pictures))
        outputs = [run_all(operation, work.samples) for work in works]
        results = list(pool.map(lambda pair: finished(operation, *pair).pixels.tobytes(), zip(works, outputs, strict=True)))
    assert results == list(alone.values()) * 2, "threads disturb each other"
