"""Feeds a child's line: takes shares ahead of the device, renews their leases, and gives back what is not begun in time.

One thread per child, which outlives the shifts (Celery tasks): between two of them the line goes on. If no shift follows,
what has not reached the device is given back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from threading import Event, Thread
from typing import Literal

from imagemill.shared.errors import ImagemillError, JobNewer, JobNotFound, JobUnreadable, ServiceUnavailable, WorkerLost
from imagemill.shared.ledger.leasing import ManifestDue, Request, Share, WorkLedger
from imagemill.shared.tracing import Traces
from imagemill.worker.line.context import Context
from imagemill.worker.line.image import Failed, ImageInFlight
from imagemill.worker.line.line import Line
from imagemill.worker.node.appetite import Appetite
from imagemill.worker.node.left_jobs import LeftJobs
from imagemill.worker.node.manifests import SKIP_SECONDS, Manifests
from imagemill.worker.node.shares import Held, Jobs, ahead, engine_of
from imagemill.worker.node.story import Story

log = logging.getLogger(__name__)

RENEWAL_SECONDS = 0.5
"""Interval between renewals, and so the delay until a child notices that a job is cancelled, paused or overtaken."""
RETRY_SECONDS = 0.25
"""Pause before asking again for more when there was nothing, or for a shift that has not begun."""
UNABLE_SECONDS = 5.0
"""Pause after taking a job that this child can't work on, such as for want of S3 keys; another may be able to."""
PROGRESS_SECONDS = 2.0
"""Interval between reports of progress; a shift that has not reported for long counts as lost in Flower."""
REPORT_SECONDS = 5.0
"""Interval between reports of why images wait."""
PAUSE_SECONDS = 0.01
"""Pause between two looks at the shares, however many images change meanwhile."""
GRACE_SECONDS = 2.0
"""How long the line goes on without a shift."""
FINISH_SECONDS = 10.0
"""How long a process that is told to exit waits for results that are being stored."""
SWAP_SECONDS = 20.0
"""How long an engine works with one model before it opens another, while there is work for both and no room."""
MOST_FAILURES = 20
"""Steps that may fail in a row, because of a bug, before the shift ends and its work is handed out again."""
MOST_CONTEXTS = 32
CONTEXT_SECONDS = 60.0
"""How long references that a job's images share are kept, also those that could not be fetched."""


class Feeder:
    """Keeps a line filled. `child` names this process in leases, `seat` (NODE/NUMBER) in rates; `siblings` share its device."""

    def __init__(
        self,
        line: Callable[[Callable[[], None]], Line],
        ledger: WorkLedger,
        jobs: Jobs,
        *,
        child: str,
        seat: str,
        seconds: float,
        siblings: int = 1,
        stopping: Callable[[], bool],
        traces: Traces | None = None,
    ) -> None:
        self._poke = Event()
        self.line = line(self._poke.set)
        self._story = Story(ledger, traces, self.line.device.waits)
        self._ledger, self._jobs, self._child, self._seat = ledger, jobs, child, seat
        self._siblings = siblings
        self._stopping, self._appetite = stopping, Appetite(self.line, jobs.grows, seconds=seconds)
        self._held: list[Held] = []
        self._contexts: dict[str, tuple[float, Context]] = {}
        self._unable = LeftJobs(ledger, jobs)
        self._manifests = Manifests(ledger, jobs, self.line, avoid=self._unable.leave)
        self._opened: dict[tuple[str, str], tuple[str, float]] = {}  # by engine, the latest lane, and since when
        self._overtaken = False
        self._ask_at = self._call_at = self._renew_at = self._report_at = self._progress_at = 0.0
        self._ended: float | None = 0.0  # when the last shift ended; None during a shift
        self._idle = Event()
        self._closed = False
        self._thread = Thread(target=self._run, name="feeder", daemon=True)
        self._thread.start()

    # --- for the thread that runs the device --------------------------------------------------

    def begin(self) -> None:
        """A shift begins: take work."""
        self._idle.clear()
        self._ended, self._ask_at = None, 0.0
        self._poke.set()

    def busy(self) -> bool:
        """Whether there is or may be work."""
        return not self._idle.is_set()

    def end(self) -> bool:
        """The shift ends; returns whether work remains in the line, which the next shift should continue."""
        self._call_at = time.monotonic() + RETRY_SECONDS
        self._ended = time.monotonic()
        return bool(self._held)

    def close(self) -> None:
        """Give back what is not begun, finish what is past the device, and stop. Nobody may run the line any more."""
        self._stop_thread()
        try:
            self._finish()
        except ServiceUnavailable as error:
            log.warning("images not given back", extra={"action": "feed", "reason": error.message})
        self._drop()

    def abandon(self) -> None:
        """Give back what is not begun, and drop the rest: it is handed out again as if this process had died."""
        self._stop_thread()
        try:
            if any(image.place == "begun" for held in self._held for image in held.images):  # else any may be at fault
                self._withdraw(ahead(self._held))
                self._settle_shares()
            self._ledger.bury(self._child)
        except ServiceUnavailable as error:  # the leases expire
            log.warning("images not given back", extra={"action": "feed", "reason": error.message})
        self._drop()

    def _drop(self) -> None:
        for held in self._held:
            held.context.stop.set()
        self._held.clear()
        self._manifests.stop()
        self.line.abandon()

    def _finish(self) -> None:
        """Give back what is not begun, and wait for results that are being stored."""
        end = time.monotonic() + FINISH_SECONDS
        self._withdraw(ahead(self._held))
        self.line.device.clear(begun=True)
        self._settle_shares()
        while self._held and time.monotonic() < end:
            self._poke.wait(RETRY_SECONDS)
            self._poke.clear()
            self.line.retry()
            self._settle_shares()
        for held in self._held:  # what is lost now is nobody's fault
            left, undone = held.divided()
            self._ledger.give_back(held.share, self._child, returned=left + undone)

    def _stop_thread(self) -> None:
        self._closed = True
        self._poke.set()
        self._thread.join()

    # --- the feeder's thread --------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while not self._closed:
            self._poke.wait(RETRY_SECONDS if self._held or self._manifests or self._ended is None else None)
            self._poke.clear()
            time.sleep(PAUSE_SECONDS)  # one look at the shares for many images
            try:
                self._step()
                failures = 0
            except ServiceUnavailable as error:
                log.warning("Redis does not respond", extra={"action": "feed", "reason": error.message})
                time.sleep(RETRY_SECONDS)
            except Exception as error:  # a bug
                log.exception("feeding failed", extra={"action": "feed"})
                failures += 1
                if failures >= MOST_FAILURES:
                    self.line.device.fail(error)
                time.sleep(RETRY_SECONDS)

    def _step(self) -> None:
        if time.monotonic() >= self._renew_at:
            self._renew_at = time.monotonic() + RENEWAL_SECONDS
            self._renew()
            self._report_waits()
        self._report_progress()
        self.line.retry()
        self._close_lanes()
        over = self._ended is not None and time.monotonic() - self._ended > GRACE_SECONDS
        if over or self._stopping():
            self._withdraw(ahead(self._held))
        if over:
            self.line.device.clear(begun=True)
        elif self._ended is not None and self._held and not self._stopping() and time.monotonic() >= self._call_at:
            self._call_at = time.monotonic() + RETRY_SECONDS  # an idle child may have taken the earlier call
            self._jobs.call_for_shift(self._held[0].lane)
        for held in self._held:
            if held.context.stop.is_set():
                self._withdraw(held.left())
        self._settle_shares()
        if self._ended is None:
            nothing = self._stopping() or not (self._top_up() or self._unable)
            if nothing and not self._held and not self._manifests:
                self._idle.set()
                self.line.device.wake()

    def _renew(self) -> None:
        leases: list[Share | ManifestDue] = [held.share for held in self._held]
        manifests = self._manifests.due()
        leases += manifests
        if not leases:
            return
        renewal = self._ledger.renew(self._child, self._jobs.lanes(), leases, self._avoided())
        for due, verdict in zip(manifests, renewal.verdicts[len(self._held) :], strict=True):
            if verdict == "lost":
                due.stop.set()
        mine = renewal.urgent in [held.share.job for held in self._held]
        for held, verdict in zip(self._held, renewal.verdicts, strict=False):
            if verdict in ("stop", "lost"):
                self._story.stopped(held, verdict)
                held.context.stop.set()
            elif verdict == "yield" and not mine:
                swaps = renewal.lane != held.lane and engine_of(renewal.lane) == engine_of(held.lane) and not self._jobs.roomy()
                self._withdraw([image for image in held.left() if swaps or image.place == "queued"])
                self._ask_at, self._overtaken = 0.0, True
        for lane, rate in self.line.speed.rates().items():
            self._ledger.report_rate(lane, self._seat, rate)
        self._look_ahead_less()

    def _report_progress(self) -> None:
        """Say during a shift what it works on, also while it waits or writes a manifest: that it goes on."""
        if self._ended is None and time.monotonic() >= self._progress_at:
            self._progress_at = time.monotonic() + PROGRESS_SECONDS
            self._jobs.progress(*((held.context, len(held.left())) for held in self._held[:1]))

    def _report_waits(self) -> None:
        """Say why images wait, for `status`."""
        reasons = self.line.outages.reasons()
        if reasons and time.monotonic() >= self._report_at:
            self._report_at = time.monotonic() + REPORT_SECONDS
            for job, reason in reasons.items():
                self._ledger.report_wait(job, reason)

    def _close_lanes(self) -> None:
        """Take models that can't be used out of service, and give back the images that need them."""
        faults = dict(self.line.device.faults)
        for (lane, _), (error, since) in faults.items():
            self._jobs.report_fault(lane, error, since)
        lanes = self._jobs.lanes() if self._held else []
        for held in self._held:
            faulty = any(need in faults for need in held.context.needs)
            if faulty or held.lane not in lanes or self._jobs.lack(held.context) is not None:
                self._withdraw(held.left())
        for need in faults:
            del self.line.device.faults[need]

    def _withdraw(self, images: Iterable[ImageInFlight]) -> None:
        """Take images that are not begun out of the line."""
        for image in images:
            image.withdraw()
        self.line.device.clear()

    def _settle_shares(self) -> None:
        """Give back what has left the line without a record, and end the shares of which nothing is left."""
        for held in list(self._held):
            left, undone = held.divided()
            if left and not undone:
                continue
            gone = sorted({image.item.index for image in held.images}.difference(left))
            self._ledger.give_back(held.share, self._child, kept=left, returned=gone)
            held.returned.update(undone)
            if not left:
                self._held.remove(held)
                if not undone:
                    self._ask_at = 0.0  # its part of the job may be larger now
                self._story.ended(held)

    # --- taking -----------------------------------------------------------------------------------

    def _top_up(self) -> bool:
        """Take shares while there is room; False if there is nothing to take."""
        while not self._alone() and time.monotonic() >= self._ask_at:
            room = self._appetite.room(self._held, self._jobs.lanes(), overtaken=self._overtaken)
            if not room:
                return True
            answer = self._take(room)
            self._overtaken = False
            if isinstance(answer, Share):
                self._start(answer)
            elif isinstance(answer, ManifestDue):
                self._manifests.begin(answer, self._poke.set)
            else:
                self._ask_at = time.monotonic() + RETRY_SECONDS
                return answer == "drain"
        return True

    def _take(self, room: dict[str, int]) -> Share | ManifestDue | Literal["none", "drain"]:
        """Take work for the models that are open if there is any, also when the line has just run dry."""
        lanes = self._lanes_now({engine_of(held.lane): held.lane for held in self._held})
        opened = {engine: lane for engine, (lane, _) in self._opened.items() if lane in lanes}
        kept = [lane for lane in lanes if lane in self._lanes_now(opened)]
        answer = self._ledger.take(self._request(room, kept))
        return self._ledger.take(self._request(room, lanes)) if answer == "none" and kept != lanes else answer

    def _alone(self) -> bool:
        return any(held.share.deaths for held in self._held)

    def _look_ahead_less(self) -> None:
        """Once the device has enough to do, take less, and give back what was too much for a slow one, but divide no group."""
        if self.line.device.starving_since is None and not self._alone():
            too_many = self._appetite.surplus(self._held)
            if too_many:
                self._withdraw(too_many)

    def _request(self, room: dict[str, int], lanes: list[str]) -> Request:
        held: dict[str, int] = {}
        for each in self._held:
            held[each.share.job] = held.get(each.share.job, 0) + len(each.left())
        rates, empty, drains = self.line.speed.rates(), not self._held, not self.line.outages.reasons()
        return Request(self._child, lanes, room, rates, held, empty, self._avoided(), drains, self._siblings)

    def _avoided(self) -> list[str]:
        """The jobs that this child can't work on at the moment: what they need does not respond."""
        full = self.line.outages.full
        return [*self._unable.current(), *(job for job, (_, context) in self._contexts.items() if full(context.store.service))]

    def _lanes_now(self, current: dict[tuple[str, str], str]) -> list[str]:
        """The lanes to take work from, given that of each engine. Where it can't keep all models open, another's work waits."""
        if self._overtaken or self._jobs.roomy():
            return self._jobs.lanes()
        settled = time.monotonic() - SWAP_SECONDS
        return [
            lane
            for lane in self._jobs.lanes()
            if current.get(engine_of(lane), lane) == lane or self._opened[engine_of(lane)][1] < settled
        ]

    def _start(self, share: Share) -> None:
        """Send the images of a share down the line."""
        try:
            if share.newer:
                raise JobNewer(f"rows of job {share.job} are of a newer version of imagemill")
            context = self._context(share.job)
        except JobNotFound:
            return
        except JobNewer as error:
            log.warning("job left to newer nodes", extra={"action": "feed", "job": share.job, "reason": error.message})
            self._refuse(share, SKIP_SECONDS)
            return
        except JobUnreadable as error:
            self._ledger.condemn(share.job, error.message)
            return
        except ImagemillError as error:
            log.error("this worker can't process the job", extra={"action": "feed", "job": share.job, "reason": error.message})
            self._refuse(share)
            return
        if self.line.outages.full(context.store.service):
            self._refuse(share)
            return
        lack = self._jobs.lack(context)
        if lack is not None:
            self._refuse(share)
            self._unable.leave_for(lack, context)
            return
        first = bool(self._held) and (share.fresh or share.rank < min(held.share.rank for held in self._held))
        images = [
            ImageInFlight(item, context, first=first, deaths=share.deaths, share=f"{share.number}") for item in share.items
        ]
        held = Held(share, context, images)
        self._held.append(held)
        self._story.begun(held)
        lane = context.spec.lane
        if self._opened.get(engine_of(lane), ("", 0.0))[0] != lane:
            self._opened[engine_of(lane)] = lane, time.monotonic()
        try:
            self._give_up(images)
            self.line.enter([image for image in images if image.place == "queued"])
        except Exception:
            self._withdraw(images)  # to be given back
            raise
        self._poke.set()

    def _refuse(self, share: Share, seconds: float = UNABLE_SECONDS) -> None:
        """Give a share back, and leave its job to others for a while."""
        self._ledger.give_back(share, self._child, returned=sorted(share.indexes))
        self._unable.leave(share.job, seconds)

    def _give_up(self, images: list[ImageInFlight]) -> None:
        """Record images that have used up their attempts. Each had the last one alone, and never less than two: the first time,
        a neighbour may have killed the process.
        """
        for image in images:
            if image.deaths >= max(2, image.context.spec.policy.attempts):
                reason = f"the worker process died {image.earlier} times while it worked on this image"
                self.line.settle(image, Failed(WorkerLost(reason)))

    def _context(self, job: str) -> Context:
        """The job's context; a new one now and then."""
        made, context = self._contexts.get(job, (0.0, None))
        if context is None or context.stop.is_set() or time.monotonic() - made > CONTEXT_SECONDS:
            if len(self._contexts) >= MOST_CONTEXTS:
                del self._contexts[next(iter(self._contexts))]
            context = self._jobs.open(job, self.line.budget)
            self._contexts[job] = time.monotonic(), context
        return context
