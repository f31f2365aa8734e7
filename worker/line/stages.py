"""The stages that an image goes through, in order: one function each.

A stage takes the image and its job's context. It returns None to pass the image on, or an outcome that ends its
journey. `line.py` runs the stages in threads and batches samples for the device between the first two groups.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from imagemill.shared.engines import find_engine
from imagemill.shared.errors import ImageError, InternalError, OutOfMemory, sentence
from imagemill.shared.log_fields import working_on
from imagemill.shared.messages import Job
from imagemill.shared.quality import Measures, beyond, flagged
from imagemill.worker.checking import quality
from imagemill.worker.imaging import codec
from imagemill.worker.line.cache import Remembered
from imagemill.worker.line.context import Context
from imagemill.worker.line.image import CACHED, Failed, ImageInFlight, NotBegun, Outcome, RunAgain, Stored
from imagemill.worker.line.stopped import Stopped
from imagemill.worker.operations.base import Inputs, Untouched
from imagemill.worker.transfer.store import render_key

log = logging.getLogger(__name__)


Stage = Callable[[ImageInFlight, Context], Outcome | None]


def fetch(image: ImageInFlight, context: Context) -> None:
    """Download the source, and read its header before anything is decoded. Raises Stopped."""
    context.store.check()  # a store that refuses everything should not cost a download
    if image.stopped:  # a store that does not respond takes its time
        raise Stopped
    with image.timed("fetch"):
        fetched = context.fetcher.fetch(
            image.item.source, attempts=max(1, context.spec.policy.attempts - image.tries), stop=context.stop
        )
    image.data, image.source_bytes = fetched.data, len(fetched.data)
    image.tries += fetched.tries
    image.header = codec.probe(image.data, max_pixels=context.max_pixels)


def reuse(image: ImageInFlight, context: Context) -> Stored | None:
    """Copy the result that the same image got before, in any job."""
    if context.cache is None:
        return None
    image.cache_key = context.cache.key(image.data, image.item, context.spec, context.operation)
    policy = context.spec.policy
    known = context.cache.get(image.cache_key) if policy.reuse else None
    if known is None or (known.measures is None and policy.quality.mode != "off"):
        return None
    with image.timed("store"):
        copy = known.copied(context.store, _key(image, context, known.format))
    if copy is None:
        return None
    context.cache.put(image.cache_key, copy)  # of all copies, the newest lives longest
    flags = flagged(beyond(copy.measures, policy.quality, context.spec.operation))
    return Stored("reused", copy.output, copy.bytes, copy.size, (*copy.notes, *flags, CACHED), copy.measures)


def decode(image: ImageInFlight, context: Context) -> None:
    """Wait for room in the pixel budget, then decode to what the engine can use. Raises Stopped."""
    pixels = image.header.size[0] * image.header.size[1]
    with image.timed("wait"):
        context.budget.acquire(pixels, lambda: image.stopped)
    image.held_pixels = pixels
    with image.timed("decode"):
        edge = context.operation.work_edge(context.spec.options)
        image.picture = codec.decode(image.data, image.header, edge=edge, icc=context.spec.icc)
    image.held_pixels = image.picture.size[0] * image.picture.size[1]
    context.budget.release(pixels - image.held_pixels)


def prepare(image: ImageInFlight, context: Context) -> Stored | None:
    """The engine's CPU work before the device. An image that needs none is stored right away."""
    operation, options = context.operation, context.spec.options
    mask = context.references.mask_of(image.item, options) if operation.spec.needs_mask else None
    with image.timed("prepare"):
        work = operation.prepare(image.picture, Inputs(image.item, options, mask, context.references.picture))
    if isinstance(work, Untouched):
        return _keep(image, context, work)
    if not work.samples:
        raise InternalError(f"{operation.spec.name} made no samples of this image")
    image.start(work)
    del image.data
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
        # The colour under alpha 0 is nobody's if we cut the subject out; otherwise it is the source's, and is kept.
        encoded = codec.encode(
            image.best.picture,
            format=_format(image, context),
            quality=context.spec.output.quality,
            clear=context.operation.spec.makes_alpha,
        )
    image.keep_file(encoded)


def store(image: ImageInFlight, context: Context) -> Stored:
    """Upload the file, and remember the result for the next job that asks for the same."""
    encoded, best = image.encoded, image.best
    with image.timed("store"):
        output = context.store.put(_key(image, context, encoded.format), encoded.data, f"image/{encoded.format}")
    if context.cache is not None and lasting_notes(context.spec).issuperset(best.notes):
        result = Remembered.of(encoded, output=output, notes=best.notes, measures=best.measures)
        context.cache.put(image.cache_key, result)
    return Stored("computed", output, len(encoded.data), encoded.size, image.notes, best.measures)


BEFORE_DEVICE: tuple[Stage, ...] = (fetch, reuse, decode, prepare)
# The device runs batches of samples here: line.py.
AFTER_DEVICE: tuple[Stage, ...] = (finish, check)
DELIVERY: tuple[Stage, ...] = (encode, store)


def advance(image: ImageInFlight, stages: Iterable[Stage]) -> Outcome | None:
    """Take an image through `stages`: its outcome, or None if it passed them all. Whatever goes wrong is its own failure."""
    with working_on(**image.log_fields):
        return _advance(image, image.context, stages)


def _advance(image: ImageInFlight, context: Context, stages: Iterable[Stage]) -> Outcome | None:
    try:
        for stage in stages:
            outcome = stage(image, context)
            if outcome is not None:
                return outcome
    except Stopped:
        return NotBegun()
    except ImageError as error:
        return Failed(error)
    except MemoryError as error:
        return Failed(OutOfMemory(f"this image does not fit into memory: {sentence(error)}"))
    except Exception as error:
        log.exception("unexpected error", extra={"action": "line", "item": image.item.id})
        return Failed(InternalError(f"{type(error).__name__}: {sentence(error)}"))
    return None


def lasting_notes(spec: Job) -> frozenset[str]:
    """The notes that a result may have and still be reused: the same image gets them on every run."""
    return find_engine(spec.operation, spec.engine).lasting_notes | quality.REPAIR_NOTES


def _keep(image: ImageInFlight, context: Context, untouched: Untouched) -> Stored:
    """Store an image that needs no work: its very file if the job's format allows, else encoded anew."""
    picture = image.picture
    image.best = quality.Checked(picture, untouched.notes, Measures())
    if picture.as_stored and _format(image, context) == picture.format:
        image.keep_file(codec.Encoded(image.data, picture.format, picture.size))
    else:
        encode(image, context)
    return replace(store(image, context), how="kept")


def _format(image: ImageInFlight, context: Context) -> str:
    picture = image.best.picture
    return codec.choose_format(picture.format, context.spec.output.format, picture.pixels.shape[2] == 4)


def _key(image: ImageInFlight, context: Context, form: str) -> str:
    extension = codec.EXTENSIONS[form]
    return render_key(context.spec.output.key, job=context.job, item=image.item, extension=extension)
