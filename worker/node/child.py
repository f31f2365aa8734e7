"""One child process: its engines, its clients, and its shifts. Imported only after the fork."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded

from imagemill.shared.broker import Publisher
from imagemill.shared.engines import parse_options, split_lane
from imagemill.shared.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DeviceLost,
    ImageError,
    ImagemillError,
    ModelUnavailable,
    StorageUnavailable,
    UnsafeContent,
    sentence,
)
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import ManifestDue, WorkLedger
from imagemill.shared.messages import Job
from imagemill.shared.options.base import EngineOptions
from imagemill.shared.settings import Settings
from imagemill.shared.tracing import open_traces
from imagemill.worker.hardware.device import Device, give_back
from imagemill.worker.hardware.errors import DeviceUnusable, is_out_of_memory, is_sticky
from imagemill.worker.hardware.memory import freeze, memory_of
from imagemill.worker.hardware.model_memory import GPU_SHARE
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.cache import Cache
from imagemill.worker.line.context import Context
from imagemill.worker.line.line import Line
from imagemill.worker.line.manifest import write_manifest
from imagemill.worker.line.pixel_budget import PixelBudget
from imagemill.worker.line.records import Records, Tally
from imagemill.worker.line.stopped import Stopped
from imagemill.worker.node.feeder import Feeder
from imagemill.worker.node.metrics import child_meter
from imagemill.worker.node.offered import Offered
from imagemill.worker.node.parts import Lack, Parts
from imagemill.worker.node.shares import engine_of
from imagemill.worker.operations.base import AnyOperation, Untouched, Work
from imagemill.worker.operations.registry import create
from imagemill.worker.transfer.fetch import Fetcher
from imagemill.worker.transfer.network import Network, allow_open_files
from imagemill.worker.transfer.s3_requests import S3Requests
from imagemill.worker.transfer.store import Store, open_store
from imagemill.worker.tuning import saved_sizes
from imagemill.worker.tuning.trials import example_work

log = logging.getLogger(__name__)

MANIFEST_SECONDS = 3600
"""How long to keep trying to write a manifest while the store does not respond; then the job ends without one."""
CLOSE_SECONDS = 2.0
"""How long a process that is told to exit waits for Redis to take its last records."""
WARM_UP_SIZE = (64, 64)
MOST_LINKS = 20
"""Jobs of a shift to which Flower can link."""

Tell = Callable[..., None]
"""Reports progress to Flower: a short text, and figures by name."""


class Child:
    """Built once per process by `main`; `work` is called for each message. `name` is that of this process in leases."""

    def __init__(
        self,
        settings: Settings,
        device: Device,
        *,
        node: str,
        seat: str,
        name: str,
        lanes: Offered,
        parts: Offered,
        publisher: Publisher,
        stopping: Callable[[], bool],
        moved: Callable[[bool], None] = lambda _working: None,
    ) -> None:
        self.settings, self.node, self.seat, self.name = settings, node, seat, name
        self.publisher, self.stopping, self.moved = publisher, stopping, moved
        self.ledger, self.fleet = WorkLedger.of(settings), Fleet.of(settings)
        self.cache = Cache.of(settings)
        allow_open_files()
        self.network = Network()
        self.s3 = S3Requests(settings.s3, self.network)
        self.fetcher = Fetcher(settings.fetch, settings.files, self.s3, self.network)
        self._lanes, self._parts, self._device = lanes, Parts(parts), device
        self.operations: dict[tuple[str, str], AnyOperation] = {}
        self.sizes: dict[tuple[str, str], BatchSizes] = {}
        self.traces = open_traces(settings)
        self.records = Records(self.ledger, node, child_meter(settings.worker.operations), self.traces)
        self.tell: Tell = lambda _, **__: None
        if settings.s3.endpoint_url or "AWS_ACCESS_KEY_ID" in os.environ:
            self.s3.warm_up()
        self._sound: dict[str, int] = {}  # lanes whose model has worked, and how many had been opened by then
        self._load_engines(starting=True)
        self.feeder: Feeder | None = None

    # --- engines and their models ---------------------------------------------------------------

    def _load_engines(self, *, starting: bool = False) -> None:
        """Load the engines with a lane in service that are not loaded yet. At the start, each runs an image on its first model.

        A model that can't be used only closes its lane, and an engine all of its lanes. Raises the error if no engine is left.
        """
        broken: dict[tuple[str, str], ImagemillError] = {}
        loaded = len(self.operations)
        for lane in self._lanes.open():
            engine, since = engine_of(lane), time.monotonic()
            try:
                if engine in broken:
                    raise broken[engine]
                if engine not in self.operations:
                    self._load(*engine)
                if starting and engine not in map(engine_of, self._sound):
                    self._try(lane)
            except ModelUnavailable as error:
                self.close_lane(lane, error, since)
            except (DeviceLost, SoftTimeLimitExceeded):
                raise
            except Exception as error:
                if starting and not isinstance(error, ConfigurationError | ImageError):
                    raise  # later, the node has other work to do
                broken[engine] = error if isinstance(error, ImagemillError) else _bug(lane, error)
                self.operations.pop(engine, None)
                self.close_lane(lane, broken[engine], since)
                if starting and not self._lanes.open() and not self.operations:
                    raise
        if len(self.operations) > loaded:
            freeze()

    def _load(self, name: str, engine: str) -> None:
        start, device = time.perf_counter(), self._device
        operation = create(name, engine)
        operation.load(device)
        memory = memory_of(device, operation.spec.runtime)
        if device.models.limit is None and memory.total:
            device.models.limit = int(GPU_SHARE * memory.total)
        saved = saved_sizes.read(device.weights, memory.name, operation.spec)
        self.sizes[name, engine] = BatchSizes(memory, saved, board=device.board, name=f"{name}/{engine}")
        self.operations[name, engine] = operation
        seconds = round(time.perf_counter() - start, 3)
        log.info("engine loaded", extra={"action": "load", "operation": name, "engine": engine, "seconds": seconds})

    def _try(self, lane: str) -> None:
        """Run an image, so that a job's first one meets no surprises. Raises ModelUnavailable if the model doesn't work."""
        name, engine, model = split_lane(lane)
        operation = self.operations[name, engine]
        given = {**operation.spec.warm_up, **({"model": model} if model else {})}
        try:
            work = _example(operation, parse_options(name, engine, given))
            if not isinstance(work, Untouched):
                outputs = operation.run(work.samples)
                fault = next((each for each in outputs if isinstance(each, ImageError)), None)
                if fault is not None and not isinstance(fault, UnsafeContent):
                    raise fault
                if fault is None:
                    operation.finish(work, outputs)
        except (DeviceLost, DeviceUnusable, ModelUnavailable, SoftTimeLimitExceeded):
            raise
        except Exception as error:  # a model may return anything
            if is_sticky(error) or self.sizes[name, engine].memory.broken():
                raise DeviceLost(f"{name} left the device in error: {sentence(error)}") from error
            if not model:
                raise
            reason = error.message if isinstance(error, ImagemillError) else f"{type(error).__name__}: {sentence(error)}"
            unavailable = ModelUnavailable(f"{reason}: check the model with `imagemill models verify`")
            unavailable.passing = is_out_of_memory(error)
            raise unavailable from error
        self._sound[lane] = self._device.models.loads

    def blame(self, lane: str) -> ModelUnavailable | None:
        """Whether the model is to blame for a batch whose images all failed: nothing else works on it, either."""
        if not split_lane(lane)[2] or self._sound.get(lane) == self._device.models.loads:
            return None
        try:
            self._try(lane)
        except ModelUnavailable as error:
            return error
        except DeviceUnusable as error:
            return ModelUnavailable(error.message)
        return None

    # --- shifts ---------------------------------------------------------------------------------

    def work(self, lane: str, tell: Tell) -> str:
        """One shift: take share after share for about a minute, while there is work; return what became of the images.

        Images still in the line then stay there for the next shift, which this one requests.
        """
        start = time.monotonic()
        self._load_engines()  # of models that have come since
        feeder = self.feeder = self.feeder or self._make_feeder()
        self.tell, waits = tell, feeder.line.device.waits.so_far()
        feeder.begin()
        try:
            feeder.line.device.run(start + self.settings.worker.shift_seconds, feeder.busy)
            self.moved(False)
        except SystemExit:  # a planned stop, not the fault of any image: `close` gives them back
            raise
        except BaseException:
            feeder.abandon()
            self.feeder = None
            self.moved(False)
            raise
        if feeder.end():
            self.call_for_shift(lane)
        give_back()
        self._report_memory()
        tally, self.records.tally = self.records.tally, Tally()  # the next one also counts what is recorded between shifts
        self._tell(tally)
        seconds = round(time.monotonic() - start, 3)
        fields = dict(action="shift", done=tally.done, failed=tally.failed, reused=tally.reused, seconds=seconds)
        fields["waits"] = feeder.line.device.waits.since(waits)
        log.info("shift over", extra=fields)
        return tally.by_job()

    def close(self) -> None:
        """Give back what is not begun; called when the process is told to exit."""
        if self.feeder is not None:
            self.feeder.close()
        self.records.close(CLOSE_SECONDS)
        if self.traces is not None:
            self.traces.close()

    def _make_feeder(self) -> Feeder:
        return Feeder(
            lambda changed: Line(
                self.settings,
                self.records,
                self.network,
                changed,
                lambda: self.moved(True),
                threads=self._device.threads,
                turn=self._device.turn,
                siblings=self._device.siblings,
                blame=self.blame,
            ),
            self.ledger,
            self,
            child=self.name,
            seat=self.seat,
            seconds=self.settings.worker.share_seconds,
            siblings=self._device.siblings,
            stopping=self.stopping,
            traces=self.traces,
        )

    def _report_memory(self) -> None:
        on_gpu = [sizes for sizes in self.sizes.values() if sizes.memory.grows]
        if on_gpu:
            self.fleet.report_memory(self.node, max(sizes.top for sizes in on_gpu), sum(sizes.flagged for sizes in on_gpu))

    # --- what the feeder asks ---------------------------------------------------------------------

    def open(self, job: str, budget: PixelBudget) -> Context:
        """A job's context. Raises JobNotFound."""
        spec = self.ledger.spec(job)
        engine = spec.operation, spec.engine
        return Context.of(
            job,
            spec,
            self.settings,
            operation=self.operations[engine],
            sizes=self.sizes[engine],
            fetcher=self.fetcher,
            store=self._store(spec),
            budget=budget,
            cache=self.cache,
        )

    def lanes(self) -> list[str]:
        """The lanes that this child can work in now."""
        return [lane for lane in self._lanes.open() if engine_of(lane) in self.operations]

    def close_lane(self, lane: str, error: ImagemillError, since: float) -> None:
        """Take a lane out of service for all children, because its model could not be used in an attempt since then."""
        passing = isinstance(error, ModelUnavailable) and error.passing
        if self._lanes.close(lane, error.message, since, passing=passing):
            _log_fault("lane out of service", lane, error.message, passing=passing)

    def report_fault(self, lane: str, error: ModelUnavailable, since: float) -> None:
        """Take what is at fault out of service: the lane, or a LoRA, ControlNet or VAE that a job names beside its model."""
        if not error.part:
            self.close_lane(lane, error, since)
        elif self._parts.close(lane, error, since):
            _log_fault("part out of service", lane, error.message, passing=error.passing, part=error.part)

    def lack(self, context: Context) -> Lack | None:
        """What a job needs beside its model and this node has not got, or can't use."""
        return self._parts.lack(context.spec.lane, context.companions)

    def why_waiting(self, context: Context, lack: Lack) -> str | None:
        """Why a job waits that this node can't work on; None if another one can."""
        return lack.shown(self.node, context.spec.lane, context.companions, self.fleet.nodes())

    def roomy(self) -> bool:
        """Whether models don't have to take turns, because all that are needed stay open."""
        return self._device.models.roomy

    def grows(self, lane: str) -> bool:
        """Whether larger batches are faster in this lane."""
        operation, engine, _ = split_lane(lane)
        return self.sizes[operation, engine].memory.grows

    def call_for_shift(self, lane: str) -> None:
        try:
            self.publisher.wake(lane, node=self.node)
        except BrokerUnavailable as error:  # a node will wake us when it looks for work without workers
            log.warning("next shift not requested", extra={"action": "shift", "reason": error.message})

    def progress(self, *now: tuple[Context, int]) -> None:
        """Report to Flower."""
        text = ""
        for context, images in now:
            owner = f" for {context.spec.policy.owner}" if context.spec.policy.owner else ""
            text += f"; now {images} of {context.job}{owner}"
        self._tell(self.records.tally, text)

    def _tell(self, tally: Tally, now: str = "") -> None:
        figures = dict(images_done=tally.done, images_failed=tally.failed, jobs=tally.ranked()[:MOST_LINKS])
        self.tell(tally.by_job() + now, **figures)

    def write_manifest(self, due: ManifestDue) -> None:
        """Write a job's manifest and end the job; without a manifest if that fails for good."""
        written, spec = None, self.ledger.spec(due.job)
        fields = {"action": "manifest", "job": due.job, "owner": spec.policy.owner}
        try:
            store, fingerprint = self._store(spec), self._fingerprint(spec)
            written = write_manifest(due.job, spec, self.ledger, store, fingerprint, stop=due.stop)
        except Stopped:
            log.info("manifest left to others", extra=fields)
            return
        except StorageUnavailable as error:
            log.warning("manifest not written", extra={**fields, "reason": error.message})
            if due.seconds < MANIFEST_SECONDS:
                self.ledger.report_wait(due.job, error.message)
                return  # its lease expires, and it is handed out again
        except ImageError as error:
            log.warning("manifest refused", extra={**fields, "reason": error.message})
        except ImagemillError:
            raise  # from the ledger, without which nothing can be completed
        except Exception:  # a bug; a job may end without its manifest, but it must end
            log.exception("manifest failed", extra=fields)
        if self.ledger.end_job(due.job, written, due.run):
            log.info("job over", extra={**fields, **self._counts(due.job), "manifest": written})

    def _counts(self, job: str) -> dict[str, object]:
        """How a job ended, for the log."""
        try:
            status = self.ledger.status(job)
        except ImagemillError:
            return {}
        return dict(state=status.state, done=status.done, failed=status.failed, seconds=status.seconds)

    def _fingerprint(self, spec: Job) -> str | None:
        """Everything that determines this job's results; None if it can't be determined any more, or not on this node."""
        operation = self.operations[spec.operation, spec.engine]
        try:
            lack = self._parts.lack(spec.lane, operation.companions(spec.options))
            if lack is not None:  # another node has made the results
                raise ConfigurationError(f"this node {lack.what}: {lack.why}")
            return operation.fingerprint(spec.options)
        except (ImagemillError, OSError) as error:
            log.warning("fingerprint unknown", extra={"action": "manifest", "reason": sentence(error)})
            return None

    def _store(self, spec: Job) -> Store:
        return open_store(spec.output.url, s3=self.s3, files=self.settings.files, s3_settings=self.settings.s3)


def _log_fault(message: str, lane: str, reason: str, *, passing: bool, **fields: str) -> None:
    fix = "free memory; the node tries again" if passing else "repair or replace its files; the node notices"
    log.error(message, extra={"action": "lane", "lane": lane, **fields, "reason": reason, "fix": fix})


def _bug(lane: str, error: Exception) -> ConfigurationError:
    log.exception("engine not loaded", extra={"action": "load", "lane": lane})
    return ConfigurationError(f"its engine can't be loaded: {type(error).__name__}: {sentence(error)}")


def _example(operation: AnyOperation, options: EngineOptions) -> Work[Any, Any, Any] | Untouched:
    """What an operation makes of a test image; nothing if it needs more than that, such as points."""
    try:
        return example_work(operation, options, WARM_UP_SIZE)
    except ModelUnavailable:
        raise
    except ImageError:
        return Untouched()
