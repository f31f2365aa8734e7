"""The contract of worker/operations/base.py as checks that any operation must pass, whatever its engine.

`check` runs them all on one loaded operation. They say nothing about how good a result looks.
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
"""Options with which nothing is transparent in what else would have alpha."""


@dataclass(frozen=True)
class Result:
    pixels: Pixels
    notes: tuple[str, ...]


def scene(height: int, width: int, channels: int = 3, seed: int = 0) -> Pixels:
    """A blob on a gradient with noise; the alpha of RGBA falls off to the right."""
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
    """A mask that leaves something of every picture; nothing is filled where there is one pixel only."""
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
    """An image after `prepare`: its picture, and work unless there is nothing to do."""

    picture: Picture
    work: Work[Any, Any, Any] | Untouched

    @property
    def samples(self) -> Sequence[Sample[Any, Any]]:
        return self.work.samples if isinstance(self.work, Work) else ()

    @property
    def evidence(self) -> Evidence:
        return self.work.evidence if isinstance(self.work, Work) else Evidence()


def prepared(operation: AnyOperation, pixels: Pixels, options: EngineOptions) -> Prepared:
    """`prepare` with a picture that is the operation's: `finish` may write into it."""
    picture = Picture(pixels, "jpeg", full_size=(pixels.shape[1], pixels.shape[0]))
    work = operation.prepare(picture, inputs(operation, pixels, options))
    assert isinstance(work, Untouched) or work.samples, "an image that needs work has samples"
    if isinstance(work, Work) and work.retry is not None:
        keys = [[operation.group_key(sample) for sample in attempt.samples] for attempt in (work, work.retry())]
        assert keys[0] == keys[1], "a second attempt goes the same way"
    return Prepared(picture, work)


def finished(operation: AnyOperation, prepared: Prepared, outputs: Sequence[Any]) -> Picture:
    return prepared.picture if isinstance(prepared.work, Untouched) else operation.finish(prepared.work, outputs)


def take_through(operation: AnyOperation, pixels: Pixels, options: EngineOptions) -> Result:
    """One image through all three steps, in batches no larger than the spec's."""
    given = pixels.copy()
    work = prepared(operation, given, options)
    outputs = run_all(operation, work.samples)
    assert np.array_equal(given, pixels), "only `finish` may write into its input"
    picture = finished(operation, work, outputs)
    assert np.array_equal(given, pixels) or not work.evidence.comparable, "what is compared with its source leaves it alone"
    assert picture.format == "jpeg", "the source's format is carried through"
    if isinstance(work.work, Work):
        check_evidence(operation, picture, Picture(pixels), work.work, options)
    return Result(picture.pixels, tuple(work.work.notes))


def run_all(operation: AnyOperation, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
    """`samples` through the device step: as the flow batches them, one group at a time."""
    outputs: list[Any] = [None] * len(samples)
    groups: dict[Any, list[int]] = {}
    for place, sample in enumerate(samples):
        groups.setdefault(operation.group_key(sample), []).append(place)
    size = operation.spec.max_batch
    for places in groups.values():
        for start in range(0, len(places), size):
            batch = places[start : start + size]
            made = operation.run([samples[place] for place in batch])
            assert len(made) == len(batch), "one output per sample"
            for place, output in zip(batch, made, strict=True):
                outputs[place] = output
    return outputs


def check(operation: AnyOperation, options: EngineOptions) -> None:
    """All of the checks, for one set of options."""
    check_spec(operation.spec)
    for name, pixels in PICTURES.items():
        check_picture(operation, options, name, pixels)
    check_batches(operation, options)
    check_threads(operation, options)


def check_spec(spec: Spec) -> None:
    """The spec names an engine that jobs can ask for."""
    assert spec.engine in engines_of(spec.name)
    assert spec.max_batch >= 1


def check_picture(operation: AnyOperation, options: EngineOptions, name: str, pixels: Pixels) -> None:
    """One picture: what comes out is well-formed and repeatable."""
    edge = operation.work_edge(options)
    assert edge is None or edge >= 1, name
    result = take_through(operation, pixels, options)
    made = result.pixels
    assert made.dtype == np.uint8, name
    assert made.ndim == 3, name
    assert made.shape[2] in (3, 4), name
    assert made.flags.c_contiguous, name
    assert (made.shape[1], made.shape[0]) == fit((pixels.shape[1], pixels.shape[0]), edge), name
    if operation.spec.makes_alpha and not any(getattr(options, one, None) for one in OPAQUE):
        assert made.shape[2] == 4, name
    elif not operation.spec.makes_alpha:
        assert made.shape[2] == pixels.shape[2], f"{name}: alpha is kept"
    again = take_through(operation, pixels, options)
    assert again.pixels.tobytes() == made.tobytes(), f"{name}: the same in, the same out"
    assert again.notes == result.notes, name


def check_evidence(
    operation: AnyOperation, result: Picture, source: Picture, work: Work[Any, Any, Any], options: EngineOptions
) -> None:
    """The result can be measured by what the work tells of it: every cut-out has its shares, every hole its size."""
    fields = {"operation": operation.spec.name, "options": options, "output": {"url": "s3://results/x"}}
    found = quality.check(result, source, work, operation.spec, Job.model_validate(fields))
    assert found.picture.pixels is result.pixels
    assert found.measures is not None
    assert (found.measures.opaque is not None) == operation.spec.makes_alpha
    hole = work.evidence.hole
    assert hole is None or hole.shape == result.pixels.shape[:2]
    assert hole is None or not work.evidence.comparable


def check_batches(operation: AnyOperation, options: EngineOptions) -> None:
    """A result does not depend on what else is in the batch, nor on the order."""
    alone = {name: take_through(operation, pixels, options).pixels for name, pixels in PICTURES.items()}
    for names in (list(PICTURES), list(PICTURES)[::-1]):
        works = [prepared(operation, PICTURES[name].copy(), options) for name in names]
        outputs = iter(run_all(operation, [sample for work in works for sample in work.samples]))
        for name, work in zip(names, works, strict=True):
            made = finished(operation, work, [next(outputs) for _ in work.samples]).pixels
            assert made.tobytes() == alone[name].tobytes(), f"{name}: another result in company"


def check_threads(operation: AnyOperation, options: EngineOptions) -> None:
    """`prepare` and `finish` of several images at once, while `run` stays in one thread, change nothing."""
    pictures = list(PICTURES.values()) * 2
    expected = [take_through(operation, pixels, options).pixels.tobytes() for pixels in pictures]
    with ThreadPoolExecutor(4) as pool:
        works = list(pool.map(lambda pixels: prepared(operation, pixels.copy(), options), pictures))
        outputs = [run_all(operation, work.samples) for work in works]
        made = list(pool.map(lambda pair: finished(operation, *pair).pixels.tobytes(), zip(works, outputs, strict=True)))
    assert made == expected, "threads disturb one another"
