"""A card whose memory runs out: every image must be done all the same, and `imagemill tune` must find the true limit.

In a dry run, where no memory can run out, the engine refuses large batches as torch would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from bench.figures import Figure, figure
from bench.gpu.card import Card
from bench.gpu.line import Course, through_the_line
from bench.gpu.pictures import photos
from bench.gpu.stylize import Stylize
from imagemill.shared.messages import Job, Output
from imagemill.worker.hardware.errors import is_out_of_memory
from imagemill.worker.hardware.memory import give_up_caches
from imagemill.worker.line.batch_sizes import BatchSizes, Known, kind_of
from imagemill.worker.operations.base import AnyOperation, Sample
from imagemill.worker.tuning.trials import BatchTrials

Way = Literal["a limit for this process", "a full card"]


def out_of_memory(card: Card, models: Stylize) -> Iterator[Figure]:
    """The line is told that the largest batch fits, which it doesn't any more."""
    largest, images = models.batches[-1], 2 * models.batches[-1]
    options = models.options.model_copy(update={"steps": 2})
    operation = models.operation(models.pipeline(), largest)
    kind = kind_of(operation, models.samples(operation, options, 1)[0])
    edge = 150 if card.small else 1500
    spec, files = Job(operation="stylize", output=Output(url="s3://bench/out"), options=options), photos(edge, edge)
    for way in ("a limit for this process", "a full card"):
        sizes = models.sizes({kind: Known(fits=largest)})
        with little_memory(card, models, operation, way):  # type: ignore[arg-type]
            passage = through_the_line(Course(operation, spec, files, sizes, batch_wait=1.0), images)  # fails if an image does
        yield figure(f"{way}: images done, of {images}", passage.images, "", images)
        yield figure(f"{way}: times that memory ran out", sizes.failures, "", 1)
        yield figure(f"{way}: largest batch, of {largest} that were tried", passage.largest)


def tune(card: Card, models: Stylize) -> Iterator[Figure]:
    """The batch size that `imagemill tune` finds and the largest that really fits, under a limit for this process."""
    most, options = models.batches[-1], models.options.model_copy(update={"steps": 2})
    operation = models.operation(models.pipeline(), most)
    samples = models.samples(operation, options, most)
    with little_memory(card, models, operation, "a limit for this process"):
        sizes = BatchSizes(models.sizes().memory, measures=True)
        trials = BatchTrials(operation, options, sizes, (models.side, models.side))
        tuned = max((trial.batch for trial in trials.run(most, 1.0) if trial.fits), default=0)
        fits = largest_that_fits(operation, samples)
    yield figure("largest batch that fits", fits, "images")
    yield figure("largest batch that `tune` finds", tuned, "images")
    yield figure("`tune` finds the largest batch that fits (1: yes)", float(tuned == fits), "", 1.0)


def largest_that_fits(operation: AnyOperation, samples: Sequence[Sample[Any, Any]]) -> int:
    """By trying; what fits is taken to fit in smaller batches too."""
    low, high = 0, len(samples) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(operation, samples[:middle]) else (low, middle)
    return low


def _fits(operation: AnyOperation, samples: Sequence[Sample[Any, Any]]) -> bool:
    fits = True
    try:
        operation.run(samples)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    give_up_caches()  # outside the except block, whose frames hold tensors
    return fits


@contextmanager
def little_memory(card: Card, models: Stylize, operation: AnyOperation, way: Way) -> Iterator[None]:
    """Memory for more than half of the largest batch, and for less than all of it."""
    large, half = models.batches[-1], models.batches[-2]
    if not card.on_gpu:
        with _refusing(operation, (large + half) // 2):
            yield
        return
    room = (models.peaks["eager", half] + models.peaks["eager", large]) // 2
    card.free()
    if way == "a full card":
        free, _ = torch.cuda.mem_get_info()
        ballast = torch.empty(max(0, free - (room - torch.cuda.memory_reserved())), dtype=torch.uint8, device="cuda")
    else:
        ballast = None
        torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        del ballast
        torch.cuda.set_per_process_memory_fraction(1.0)
        card.free()


@contextmanager
def _refusing(operation: AnyOperation, most: int) -> Iterator[None]:
    run = operation.run

    def limited(samples: Sequence[Sample[Any, Any]]) -> Sequence[Any]:
        if len(samples) > most:
            raise torch.OutOfMemoryError("CUDA out of memory: a dry run")
        return run(samples)

    operation.run = limited  # type: ignore[method-assign]
    try:
        yield
    finally:
        del operation.run  # type: ignore[method-assign]
