"""The line that the images of one chunk go through, all stages at once:

    fetch -> decode -> prepare  (threads)  ->  batch -> run  (this thread)
    ->  finish -> check -> encode -> store -> record  (threads)

Two shorter ways: an image that was asked for before, in any job, goes fetch -> reuse -> record; one that the
operation has nothing to do on, fetch -> decode -> prepare -> keep -> record. One that the check finds bad may go back to the
device once, with another seed.

While batch k is on the device, batch k+1 is being fetched and prepared and batch k-1 encoded and
stored. How far the front may run ahead is counted in decoded pixels, so memory stays flat whatever
arrives. Every image ends in exactly one record; a bad one fails alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Event

from imagemill.shared.errors import ImageError, InternalError, OutOfMemory, WorkerLost, sentence
from imagemill.shared.ledger import Ledger
from imagemill.shared.messages import Item, Job
from imagemill.shared.quality import Measures, beyond, flagged
from imagemill.shared.settings import Settings
from imagemill.worker.checking.quality import Checked, check
from imagemill.worker.imaging import codec
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.batching import Batcher, cap, run_parts
from imagemill.worker.line.cache import Cache, Remembered
from imagemill.worker.line.image import Passage
from imagemill.worker.line.pixel_budget import PixelBudget
from imagemill.worker.line.records import Records
from imagemill.worker.line.references import References
from imagemill.worker.operations.base import CACHED, Inputs, Operation, Work
from imagemill.worker.transfer.fetch import Fetcher, cut_short
from imagemill.worker.transfer.store import Store, render_key

log = logging.getLogger(__name__)


class Flow:
    """Takes the images of one job's chunk through the line. Made per chunk; what is costly is passed in.

    `stop` ends it early: images that have not reached the device stay unrecorded. `records` says how far it is.
    """

    def __init__(
        self,
        job: str,
        spec: Job,
        *,
        operation: Operation,
        ledger: Ledger,
        fetcher: Fetcher,
        store: Store,
        settings: Settings,
        node: str,
        stop: Event,
        sizes: BatchSizes | None = None,
        cache: Cache | None = None,
    ) -> None:
        self.job, self.spec, self.operation, self.ledger = job, spec, operation, ledger
        self.fetcher, self.store, self.settings, self.stop = fetcher, store, settings, stop
        self.sizes, self.cache = sizes or BatchSizes(), cache
        attempts, max_pixels = spec.policy.attempts, settings.worker.max_pixels
        self.references = References(fetcher, max_pixels=max_pixels, attempts=attempts, stop=stop)
        self.budget = PixelBudget(settings.worker.look_ahead)
        self.records = Records(ledger, job, node)

    def run(self, items: Sequence[Item]) -> None:
        """Take `items` through the line.

        Raises when the ledger can't be reached, when the device is lost, and when the chunk's time is up or this process
        is told to exit; what has no record then is delivered again.
        """
        ready: SimpleQueue[Passage | None] = SimpleQueue()
        most = cap(self.spec.policy, self.operation.spec)
        batcher: Batcher[Passage] = Batcher(self.operation, self.sizes, most, self.settings.worker.batch_wait)
        threads = min(self.settings.fetch.threads, len(items) or 1)
        with (
            ThreadPoolExecutor(self.settings.worker.store_threads, "store") as back,
            ThreadPoolExecutor(threads, "fetch") as front,
        ):
            for item in items:
                front.submit(self._front, Passage(item), ready)
            coming = len(items)
            try:
                while coming or batcher:
                    coming -= self._collect(ready, batcher, coming)
                    if self.stop.is_set():
                        for passage in batcher.drain():
                            self._leave(passage)
                    elif batcher:
                        for passage in self._device(batcher):
                            returns = self._may_return(passage)
                            coming += returns
                            back.submit(self._back, passage, ready if returns else None)
            except BaseException:
                self.stop.set()
                self.budget.close()
                raise
        if self.records.fatal is not None:
            raise self.records.fatal

    def run_alone(self, items: Sequence[Item], lost: int) -> None:
        """Take `items` through the line one at a time, after `lost` processes died with their chunk.

        Each image is counted before it is begun, and those that were begun most often come last:
        whichever kills the process again is found out, the others are finished first, and after the
        policy's number of attempts it is recorded as `worker_lost`.
        """
        alone = self.ledger.attempts(self.job, [item.index for item in items])
        for item in sorted(items, key=lambda item: alone[item.index]):
            if self.stop.is_set():
                return
            lives = self.records.earlier[item.index] = 1 + alone[item.index]
            # Tried alone at least once: in the batch it may have been a neighbour that killed the process.
            if alone[item.index] and lives >= self.spec.policy.attempts:
                reason = f"the worker process died {lives} times while it worked on this image"
                self._record(Passage(item, error=WorkerLost(reason)))
            else:
                self.ledger.count_attempt(self.job, item.index)
                before = self.records.over
                self.run([item])
                if self.records.over == before:
                    self.ledger.forget_attempt(self.job, item.index)  # stopped on its way to the device
        log.info("ran alone", extra={"action": "isolate", "job": self.job, "images": len(items), "lost": lost})

    # --- the stages -------------------------------------------------------------------------

    def _front(self, passage: Passage, ready: SimpleQueue[Passage | None]) -> None:
        """fetch -> (reuse, or) decode -> prepare (-> keep), in a thread; always puts the passage on."""
        if not self.stop.is_set():
            with self._failing(passage):
                self.store.check()
                data = self._fetch(passage)
                header = self._probe(passage, data)
                if not self._reuse(passage, data):
                    picture = self._decode(passage, data, header)
                    work = self._prepare(passage, picture)
                    if work.untouched:
                        self._keep(passage, data, picture, work.notes)
            if passage.error is not None and cut_short(passage.error, self.stop, self.spec.policy.attempts):
                passage.error = passage.work = None  # as if never begun: another worker tries it as often as the policy says
        ready.put(passage)

    def _collect(self, ready: SimpleQueue[Passage | None], batcher: Batcher[Passage], coming: int) -> int:
        """Batch what has been prepared, for as long as the batcher waits; how many of the `coming` passages came in.

        None stands for one that is over.
        """
        came = 0
        while True:
            try:
                passage = ready.get(timeout=batcher.patience(coming=came < coming))
            except Empty:
                return came
            came += 1
            if passage is None:
                continue
            if passage.error is None and passage.work is not None:
                with self._failing(passage):
                    batcher.add(passage, passage.work.samples)
                if passage.error is not None:
                    self._out(passage)  # with the result of the try before, where there was one
                    continue
            if passage.error is not None or "output" in passage.facts:  # reused or kept
                self._record(passage)
            elif passage.work is None:
                self._leave(passage)  # stopped before it was begun

    def _device(self, batcher: Batcher[Passage]) -> Iterator[Passage]:
        """run: one batch on the device; yields the passages that have all of their outputs now."""
        batch = batcher.take()
        start = time.perf_counter()
        parts = list(run_parts(self.operation, [slot.sample for slot in batch], self.sizes))
        share = (time.perf_counter() - start) / len(batch)
        together = self.operation.together(self.spec.options)
        outputs = [(output, len(part) if together else 1) for part in parts for output in part]
        for slot, (output, company) in zip(batch, outputs, strict=True):
            passage = slot.owner
            passage.facts["batch"] = max(company, passage.facts.get("batch", 1))
            passage.seconds["run"] = round(passage.seconds.get("run", 0.0) + share, 4)
            passage.missing -= 1
            if isinstance(output, ImageError):
                passage.error = output
            else:
                passage.outputs[slot.place] = output
            if passage.missing == 0:
                yield passage

    def _back(self, passage: Passage, ready: SimpleQueue[Passage | None] | None) -> None:
        """finish -> check, then encode -> store -> record, or with `ready` perhaps back to the device; in a thread."""
        again = False
        try:
            if passage.error is None:
                with self._failing(passage):
                    self._check(passage, self._finish(passage))
                    again = ready is not None and self._begin_again(passage)
            if not again:
                self._out(passage)
        finally:
            if ready is not None:
                ready.put(passage if again else None)

    def _out(self, passage: Passage) -> None:
        """encode -> store -> record."""
        if passage.checked is not None:
            passage.error = None  # a second try's, which was in vain then
            with self._failing(passage):
                encoded = self._encode(passage, passage.checked.picture)
                self._store(passage, encoded)
        self._record(passage)

    def _fetch(self, passage: Passage) -> bytes:
        with passage.stage("fetch"):
            fetched = self.fetcher.fetch(passage.item.source, attempts=self.spec.policy.attempts, stop=self.stop)
        passage.tries = fetched.tries
        passage.facts["source_bytes"] = len(fetched.data)
        return fetched.data

    def _probe(self, passage: Passage, data: bytes) -> codec.Header:
        header = codec.probe(data, max_pixels=self.settings.worker.max_pixels)
        passage.facts.update(source_format=header.format, source_size=header.size)
        return header

    def _reuse(self, passage: Passage, data: bytes) -> bool:
        """Copy the result that the same image had before; False where there is none, so that it must be computed."""
        if self.cache is None:
            return False
        passage.cache_key = self.cache.key(data, passage.item, self.spec, self.operation)
        known = self.cache.get(passage.cache_key) if self.spec.policy.reuse else None
        quality = self.spec.policy.quality
        if known is None or (known.measures is None and quality.mode != "off"):
            return False
        with passage.stage("store"):
            copy = known.copied(self.store, self._output_key(passage, known.format))
        if copy is None:
            return False
        self.cache.put(passage.cache_key, copy)  # of all copies the newest stays longest
        flags = flagged(beyond(copy.measures, quality, self.spec.operation))
        passage.facts.update(output=copy.output, output_bytes=copy.bytes, output_size=copy.size)
        passage.facts.update(quality=copy.measures, notes=(*copy.notes, *flags, CACHED))
        return True

    def _decode(self, passage: Passage, data: bytes, header: codec.Header) -> Picture:
        pixels = header.size[0] * header.size[1]
        with passage.stage("wait"):
            self.budget.acquire(pixels)
        passage.pixels = pixels
        with passage.stage("decode"):
            edge = self.operation.work_edge(self.spec.options)
            picture = codec.decode(data, header, edge=edge, icc=self.spec.icc)
        passage.pixels = picture.size[0] * picture.size[1]  # what is held from now on
        self.budget.release(pixels - passage.pixels)
        return picture

    def _prepare(self, passage: Passage, picture: Picture) -> Work:
        mask = self.references.mask_of(passage.item, self.spec.options) if self.operation.spec.needs_mask else None
        inputs = Inputs(passage.item, self.spec.options, mask, self.references.picture)
        with passage.stage("prepare"):
            work = self.operation.prepare(picture, inputs)
        passage.begin(work)
        passage.picture = picture
        if (passage.missing == 0) != work.untouched:
            raise InternalError(f"{self.operation.spec.name} made {passage.missing} samples of this image")
        return work

    def _keep(self, passage: Passage, data: bytes, picture: Picture, notes: Sequence[str]) -> None:
        """Store an untouched image: the source's own file where that is what the job asks for, else encoded anew."""
        passage.checked = Checked(picture, tuple(notes), Measures())
        if picture.as_stored and self._format(passage, picture) == picture.format:
            encoded = codec.Encoded(data, picture.format)
            passage.facts.update(output_bytes=len(data), output_size=picture.size)
        else:
            encoded = self._encode(passage, picture)
        self._store(passage, encoded)

    def _finish(self, passage: Passage) -> Picture:
        assert passage.work is not None  # noqa: S101  # `_front` has put it there
        with passage.stage("finish"):
            return self.operation.finish(passage.work, passage.outputs)

    def _check(self, passage: Passage, picture: Picture) -> None:
        """Measure and judge the result, and mend what can be mended here; of two tries the better one stays."""
        assert passage.work is not None  # noqa: S101  # `_front` has put both there
        assert passage.picture is not None  # noqa: S101
        with passage.stage("check"):
            checked = check(picture, passage.picture, passage.work, self.operation.spec, self.spec)
        passage.keep(checked)

    def _may_return(self, passage: Passage) -> bool:
        """Whether the check may send it back to the device: once, with work that has another seed."""
        again = passage.work is not None and passage.work.again is not None
        return again and passage.checked is None and self.spec.policy.quality.mode == "repair"

    def _begin_again(self, passage: Passage) -> bool:
        """Put the work of another try in, if something is wrong with the first; False where it is to stay."""
        assert passage.work is not None  # noqa: S101  # `_may_return` has looked
        assert passage.work.again is not None  # noqa: S101
        if self.stop.is_set() or not (passage.checked and passage.checked.beyond):
            return False
        with passage.stage("prepare"):
            passage.begin(passage.work.again())
        return True

    def _encode(self, passage: Passage, picture: Picture) -> codec.Encoded:
        with passage.stage("encode"):
            chosen, quality = self._format(passage, picture), self.spec.output.quality
            # Hidden colour of what was cut out here is nobody's; else it is the source's, and kept.
            encoded = codec.encode(picture, format=chosen, quality=quality, clear=self.operation.spec.makes_alpha)
        passage.facts.update(output_bytes=len(encoded.data), output_size=picture.size)
        return encoded

    def _store(self, passage: Passage, encoded: codec.Encoded) -> None:
        with passage.stage("store"):
            output = self.store.put(self._output_key(passage, encoded.format), encoded.data, encoded.content_type)
        passage.facts["output"] = output
        if self.cache is not None and passage.checked is not None:
            size, notes, found = passage.facts["output_size"], passage.checked.notes, passage.checked.measures
            self.cache.put(passage.cache_key, Remembered.of(encoded, output=output, size=size, notes=notes, measures=found))

    def _format(self, passage: Passage, picture: Picture) -> str:
        return codec.choose_format(passage.facts["source_format"], self.spec.output.format, picture.pixels.shape[2] == 4)

    def _output_key(self, passage: Passage, form: str) -> str:
        return render_key(self.spec.output.key, job=self.job, item=passage.item, extension=codec.EXTENSIONS[form])

    # --- errors and records -----------------------------------------------------------------

    @contextmanager
    def _failing(self, passage: Passage) -> Iterator[None]:
        """Whatever goes wrong inside becomes this image's error, and no other's."""
        try:
            yield
        except ImageError as error:
            passage.error = error
        except MemoryError as error:
            passage.error = OutOfMemory(f"this image does not fit into memory: {sentence(error)}")
        except Exception as error:
            log.exception("image failed", extra={"action": "flow", "job": self.job, "item": passage.item.id})
            passage.error = InternalError(f"{type(error).__name__}: {sentence(error)}")

    def _record(self, passage: Passage) -> None:
        try:
            if passage.error is not None:
                self.records.record_failure(passage, passage.error)
            else:
                self.records.record_done(passage)
            if self.records.fatal is not None:
                self.stop.set()  # `run` raises it, and the chunk is delivered again
        finally:
            self._leave(passage)

    def _leave(self, passage: Passage) -> None:
        """Let go of the pixels, then of their place in the budget."""
        passage.picture = passage.work = passage.checked = None
        passage.outputs = []
        self.budget.release(passage.pixels)
        passage.pixels = 0
