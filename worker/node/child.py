"""One child process: its engines, its clients, and how it works on a chunk. Imported only after the fork."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from functools import cache
from threading import Event

from imagemill.shared import s3
from imagemill.shared.broker import Publisher
from imagemill.shared.engines import parse_options
from imagemill.shared.errors import ImageError, ImagemillError, StorageUnavailable, sentence
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import Lease, WorkLedger
from imagemill.shared.messages import MANIFEST, Chunk, Job
from imagemill.shared.queues import offered, queue_name
from imagemill.shared.settings import Settings
from imagemill.worker.hardware.device import Device, give_back
from imagemill.worker.hardware.memory import memory_of
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.cache import Cache
from imagemill.worker.line.line import Line
from imagemill.worker.line.manifest import write_manifest
from imagemill.worker.line.records import Records
from imagemill.worker.line.stages import Context
from imagemill.worker.node.lease import LeaseKeeper
from imagemill.worker.node.offer import lanes
from imagemill.worker.operations.base import AnyOperation, Untouched
from imagemill.worker.operations.registry import create
from imagemill.worker.transfer.fetch import Fetcher
from imagemill.worker.transfer.store import Store, open_store
from imagemill.worker.tuning import saved_sizes
from imagemill.worker.tuning.trials import example_work

log = logging.getLogger(__name__)

MANIFEST_TRIES = 5
"""Attempts to write a manifest while the store does not respond; then the job ends without one."""
WARM_UP_SIZE = (64, 64)


class Child:
    """Built once per process by `main`; `work` is called for each message."""

    def __init__(
        self, settings: Settings, device: Device, *, node: str, publisher: Publisher, stopping: Callable[[], bool]
    ) -> None:
        self.settings, self.node, self.publisher, self.stopping = settings, node, publisher, stopping
        self.ledger, self.fleet = WorkLedger.of(settings), Fleet.of(settings)
        self.cache = Cache.of(settings)
        self.s3 = cache(lambda: s3.make_client(settings.s3))  # one client, made when it is first needed
        self.fetcher = Fetcher(settings.fetch, settings.files, self.s3)
        self.operations: dict[tuple[str, str], AnyOperation] = {}
        self.sizes: dict[tuple[str, str], BatchSizes] = {}
        for name, lane in offered(settings.worker.operations, lanes(settings)):
            engine, _, model = lane.partition(".")
            if (name, engine) in self.operations:
                continue  # the engine's first model is loaded; it loads another one when a chunk asks for it
            start = time.perf_counter()
            operation = create(name, engine)
            operation.load(device)
            given = {**operation.spec.warm_up, **({"model": model} if model else {})}
            work = example_work(operation, parse_options(name, engine, given), WARM_UP_SIZE)
            if not isinstance(work, Untouched):
                operation.finish(work, operation.run(work.samples))  # so that the first image meets no surprise
            memory = memory_of(device, operation.spec.runtime)
            self.operations[name, engine] = operation
            self.sizes[name, engine] = BatchSizes(memory, saved_sizes.read(device.weights, memory.name, operation.spec))
            log.info("engine loaded", extra={"action": "load", "operation": name, "engine": engine, "seconds": _since(start)})

    def work(self, chunk: Chunk, *, task: str, tell: Callable[[int, int], None]) -> str:
        """Take a chunk from its lease to its records; return the outcome in a few words, for Celery's result.

        `task` is the id of the Celery task; `tell(done, failed)` is called every second.
        """
        token = f"{task}/{socket.gethostname()}/{time.time_ns()}"
        lease = self.ledger.acquire(chunk.job, chunk.number, task=task, token=token)
        if not isinstance(lease, Lease):
            return lease
        spec = self.ledger.spec(chunk.job)
        if chunk.number == MANIFEST:
            return self._manifest(lease, spec)
        start = time.perf_counter()
        stop = Event()
        line = self._line(spec, lease.job, stop)
        records = line.records
        items = [item for item in lease.items if item.duplicate_of is None]
        recorded = self.ledger.recorded(lease.job, [item.index for item in items])
        items = [item for item in items if item.index not in recorded]
        seconds = self.settings.worker.lease_seconds
        keeper = LeaseKeeper(self.ledger, lease, seconds, stop, self.stopping, tell=lambda: tell(records.done, records.failed))
        with keeper:
            if lease.lost:
                line.run_alone(items, lease.lost)
            else:
                line.run(items)
        give_back()
        self._report(lease, spec, records, keeper.reason, _since(start))
        outcome = self._close(lease, spec, keeper.reason, len(items) - records.over, tell)
        return f"{records.done} done, {records.failed} failed" if outcome == "done" else outcome

    def _report(self, lease: Lease, spec: Job, records: Records, reason: str | None, seconds: float) -> None:
        """Log a chunk, and tell the fleet how fast it was and how full the GPU."""
        fields = dict(action="chunk", job=lease.job, chunk=lease.number, seconds=seconds)
        fields |= dict(done=records.done, failed=records.failed, reused=records.reused)
        on_gpu = [sizes for sizes in self.sizes.values() if sizes.memory.grows]
        if on_gpu:
            top, flagged = max(sizes.top for sizes in on_gpu), sum(sizes.flagged for sizes in on_gpu)
            fields |= dict(memory=round(top, 3), memory_flagged=flagged)
            self.fleet.report_memory(self.node, top, flagged)
        log.info("chunk done" if reason is None else "chunk stopped", extra={**fields, "reason": reason})
        if reason is None and not lease.lost and not records.reused and seconds > 0:  # the rate of computing
            self.fleet.report_rate(queue_name(spec.operation, spec.lane), self.node, records.over / seconds)

    def _line(self, spec: Job, job: str, stop: Event) -> Line:
        engine = spec.operation, spec.engine
        context = Context.of(
            job,
            spec,
            self.settings,
            operation=self.operations[engine],
            fetcher=self.fetcher,
            store=self._store(spec),
            stop=stop,
            cache=self.cache,
        )
        return Line(context, ledger=self.ledger, settings=self.settings, node=self.node, sizes=self.sizes[engine])

    def _close(self, lease: Lease, spec: Job, reason: str | None, left: int, tell: Callable[[int, int], None]) -> str:
        if reason == "lost":
            return "lost"
        if reason == "stopping" and left:
            if self.ledger.release(lease):
                self.publisher.publish([(Chunk(job=lease.job, number=lease.number, images=left), spec)])
            return "released"
        if self.ledger.complete(lease) == "finishing":
            self.work(Chunk(job=lease.job, number=MANIFEST, images=0), task=lease.token, tell=tell)
        return "done"

    def _manifest(self, lease: Lease, spec: Job) -> str:
        written, fields = None, {"action": "manifest", "job": lease.job}
        try:
            written = write_manifest(lease.job, spec, self.ledger, self._store(spec), self._fingerprint(spec))
        except StorageUnavailable as error:
            log.warning("manifest not written", extra={**fields, "reason": error.message})
            if lease.lost < MANIFEST_TRIES:
                return "held"  # its lease expires and the reaper publishes it again
        except ImageError as error:
            log.warning("manifest refused", extra={**fields, "reason": error.message})
        except ImagemillError:
            raise  # from the ledger, without which nothing can be completed
        except Exception:  # a bug; a job may end without its manifest, but it must end
            log.exception("manifest failed", extra=fields)
        self.ledger.complete(lease, manifest=written)
        log.info("job over", extra={**fields, "manifest": written})
        return "done"

    def _fingerprint(self, spec: Job) -> str | None:
        """Everything that determines this job's results on this node; None if it can't be determined any more."""
        try:
            return self.operations[spec.operation, spec.engine].fingerprint(spec.options)
        except (ImagemillError, OSError) as error:
            log.warning("fingerprint unknown", extra={"action": "manifest", "reason": sentence(error)})
            return None

    def _store(self, spec: Job) -> Store:
        return open_store(spec.output.url, s3=self.s3, files=self.settings.files, s3_settings=self.settings.s3)


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 3)
