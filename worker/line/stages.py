"""The stages that an image goes through, in order: one function each.

A stage takes the image and its job's context. It returns None to pass the image on, or an outcome that ends its
journey. Stages that wait for the network are coroutines; the others are CPU work. `line.py` runs them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace

from imagemill.shared.engines import find_engine
from imagemill.shared.errors import ImageError, InternalError, OutOfMemory, sentence
from imagemill.shared.log_fields import working_on
from imagemill.shared.messages import Job
from imagemill.shared.quality import Measures, beyond, flagged
from imagemill.worker.checking import quality
from imagemill.worker.imaging import codec
from imagemill.worker.imaging.facts import FILE_NOTES, REDUCED
from imagemill.worker.line.cache import Remembered
from imagemill.worker.line.context import Context
from imagemill.worker.line.image import CACHED, Failed, ImageInFlight, Kept, NotBegun, Outcome, RunAgain, Stored
from imagemill.worker.line.stopped import Stopped
from imagemill.worker.operations.base import Inputs, Untouched
from imagemill.worker.transfer.store import render_key

log = logging.getLogger(__name__)


Stage = Callable[[ImageInFlight, Context], Outcome | None]
NetworkStage = Callable[[ImageInFlight, Context], Awaitable[Outcome | None]]


async def fetch(image: ImageInFlight, context: Context) -> None:
    """Download the source, and what else the image needs. Raises Stopped."""
    await context.store.check()  # a store that refuses everything should not cost a download
    if image.stopped:  # an unresponsive store takes its time
        raise Stopped
    with image.timed("fetch"):
        attempts = max(1, context.spec.policy.attempts - image.tries)
        image.hold(await context.references.bring_source(image.item.source, attempts))
        companion = image.item.companion(mask=context.operation.spec.needs_mask, control=context.operation.spec.takes_control)
        if companion is not None:
            image.hold_mask(await context.references.bring_mask(companion))
        await context.references.bring(context.spec.options)


def identify(image: ImageInFlight, context: Context) -> None:
    """Read the headers of the file and its mask before anything is decoded, and make the key of an earlier result."""
    image.header = codec.probe(image.data, max_pixels=context.max_pixels)
    if isinstance(image.mask_file, bytes):
        try:
            image.mask_pixels = math.prod(codec.probe(image.mask_file, max_pixels=context.max_pixels).size)
        except ImageError as error:
            image.mask_file = error  # `prepare` says so
    if context.cache is not None:
        image.cache_key = context.cache.key(image.data, image.item, context.spec, context.operation)


def look_up(images: Sequence[ImageInFlight]) -> None:
    """Look for earlier results of identified images, from any job."""
    for cache in {image.context.cache for image in images if image.context.cache is not None}:  # a process has one
        asking = [image for image in images if image.context.cache is cache and image.context.spec.policy.reuse]
        for image, known in zip(asking, cache.get([image.cache_key for image in asking]), strict=True):
            if known is not None and (known.measures is not None or image.context.spec.policy.quality.mode == "off"):
                image.earlier_result = known


async def reuse(image: ImageInFlight, context: Context) -> Stored | None:
    """Copy the earlier result."""
    known = image.earlier_result
    with image.timed("store"):
        copy = await known.copied(context.store, _key(image, context, known.format)) if known is not None else None
    if copy is None or context.cache is None:
        return None
    context.cache.put(image.cache_key, copy)  # of all copies, the newest lives longest
    flags = flagged(beyond(copy.measures, context.spec.policy.quality, context.spec.operation))
    return Stored("reused", copy.output, copy.bytes, copy.size, (*copy.notes, *flags, CACHED), copy.measures, copy.filled)


def decode(image: ImageInFlight, context: Context) -> None:
    """Decode to what the engine can use. The line has waited for room in the pixel budget."""
    if image.stopped:
        raise Stopped
    with image.timed("decode"):
        edge = context.operation.work_edge(context.spec.options)
        image.picture = codec.decode(
            image.data, image.header, edge=edge, icc=context.spec.icc, keep=context.spec.output.metadata
        )
    pixels = math.prod(image.picture.size) + image.mask_pixels
    image.held_pixels, spare = pixels, image.held_pixels - pixels
    context.budget.release(spare)


def prepare(image: ImageInFlight, context: Context) -> Kept | None:
    """The engine's CPU work before the device. An image that needs none goes on to be stored."""
    operation, options = context.operation, context.spec.options
    references, mask = context.references, None
    if operation.spec.needs_mask:
        mask = references.mask_of(image.item, options, image.mask_file, image.data)
    control = references.control_of(image.item, image.mask_file) if operation.spec.takes_control else None
    inputs = Inputs(image.item, options, mask.levels if mask else None, references.picture, mask.notes if mask else (), control)
    with image.timed("prepare"):
        work = operation.prepare(image.picture, inputs)
    if isinstance(work, Untouched):
        _keep(image, context, work)
        return Kept()
    if not work.samples:
        raise InternalError(f"{operation.spec.name} made no samples of this image")
    image.filled = work.filled
    image.start(work)
    image.drop_file()
    return None


def finish(image: ImageInFlight, context: Context) -> None:
    """The engine's CPU work after the device."""
    with image.timed("finish"):
        image.made = context.operation.finish(image.work, image.outputs)


def check(image: ImageInFlight, context: Context) -> RunAgain | None:
    """Measure the result and repair what can be repaired here; the better of two attempts is kept."""
    may_repeat = context.repairs and not image.has_result and image.work.retry is not None  # once
    with image.timed("check"):
        image.keep_better(quality.check(image.made, image.picture, image.work, context.operation.spec, context.spec))
    if not may_repeat or context.stop.is_set() or not image.best.beyond or image.work.retry is None:
        return None
    with image.timed("prepare"):
        image.start(image.work.retry())
    return RunAgain()


def encode(image: ImageInFlight, context: Context) -> None:
    """Turn the best result into a file."""
    with image.timed("encode"):
        # If we cut the subject out, nobody needs the colour under alpha 0; otherwise it is the source's, and is kept.
        encoded = codec.encode(
            image.best.picture,
            format=_format(image, context),
            quality=context.spec.output.quality,
            clear=context.operation.spec.makes_alpha,
        )
    image.keep_file(encoded)


async def store(image: ImageInFlight, context: Context) -> Stored:
    """Upload the file, and remember the result for the next job that asks for the same."""
    encoded, best = image.encoded, image.best
    with image.timed("store"):
        key, kind = _key(image, context, encoded.format), f"image/{encoded.format}"
        output = await context.store.put(key, encoded.data, kind, md5=encoded.md5)
    if context.cache is not None and lasting_notes(context.spec).issuperset(best.notes):
        result = Remembered.of(encoded, output=output, notes=best.notes, measures=best.measures, filled=image.filled)
        context.cache.put(image.cache_key, result)
    return Stored(image.how, output, len(encoded.data), encoded.size, image.notes, best.measures, image.filled)


# In this order. Between them, an image waits for room in the pixel budget, and then for the device: line.py.
BEFORE_ROOM: tuple[Stage, ...] = (identify,)
BEFORE_DEVICE: tuple[Stage, ...] = (decode, prepare)
AFTER_DEVICE: tuple[Stage, ...] = (finish, check)
DELIVERY: tuple[Stage, ...] = (encode,)


def advance(image: ImageInFlight, stages: Iterable[Stage]) -> Outcome | None:
    """Take an image through `stages`: its outcome, or None if it passed them all. Whatever goes wrong is its own failure."""
    try:
        with working_on(**image.log_fields):
            for stage in stages:
                outcome = stage(image, image.context)
                if outcome is not None:
                    return outcome
    except Exception as error:  # noqa: BLE001  # logged below
        return _outcome(image, error)
    return None


async def advance_on_network(image: ImageInFlight, stage: NetworkStage) -> Outcome | None:
    """Like `advance`, for a stage that waits for the network."""
    try:
        with working_on(**image.log_fields):
            return await stage(image, image.context)
    except Exception as error:  # noqa: BLE001  # logged below
        return _outcome(image, error)


def _outcome(image: ImageInFlight, error: Exception) -> Outcome:
    """How an error ends an image's journey."""
    if isinstance(error, Stopped):
        return NotBegun()
    if isinstance(error, ImageError):
        return Failed(error)
    if isinstance(error, MemoryError):
        return Failed(OutOfMemory(f"this image does not fit into memory: {sentence(error)}"))
    with working_on(**image.log_fields):
        log.error("unexpected error", exc_info=error, extra={"action": "line", "item": image.item.id})
    return Failed(InternalError(f"{type(error).__name__}: {sentence(error)}"))


def lasting_notes(spec: Job) -> frozenset[str]:
    """The notes that a result may have and still be reused: the same image gets them on every run."""
    return find_engine(spec.operation, spec.engine).lasting_notes | quality.REPAIR_NOTES | FILE_NOTES


def _keep(image: ImageInFlight, context: Context, untouched: Untouched) -> None:
    """Make an image that needs no work its own result: its file if the job's format allows, or else encoded again."""
    picture = image.picture
    image.how, image.best = "kept", quality.Checked(picture, (*picture.notes, *untouched.notes), Measures())
    file = codec.unchanged(image.data, picture, format=_format(image, context), keep=context.spec.output.metadata)
    if file is not None:
        image.best = replace(image.best, notes=tuple(note for note in image.best.notes if note != REDUCED))
        image.keep_file(file)
    else:
        encode(image, context)


def _format(image: ImageInFlight, context: Context) -> str:
    return codec.choose_format(image.best.picture, context.spec.output.format)


def _key(image: ImageInFlight, context: Context, form: str) -> str:
    extension = codec.EXTENSIONS[form]
    return render_key(context.spec.output.key, job=context.job, item=image.item, extension=extension)
