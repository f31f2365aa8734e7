"""Images that wait for a store, or for S3 as their source, to respond: an outage delays them, but fails none."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Lock

from imagemill.shared.errors import ImageError, ServerError, StorageUnavailable, Unreachable
from imagemill.shared.s3 import split
from imagemill.worker.line.image import ImageInFlight

log = logging.getLogger(__name__)

PATIENCE = 3600.0
"""Seconds of an outage after which its images fail."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds before the first attempt to reach a service again, and at most; the pause doubles each time."""
MANY = 8
"""Once this many images wait for a service, no more images that need it are taken."""
MOST_JOBS = 20
"""Named in one log line."""
OWN_FAULTS = 8
"""Failures of one image, while others succeed, after which the image is to blame rather than the service."""


def source_service(source: str) -> str | None:
    """The service that an image comes from, if images wait for its outages to end."""
    return f"s3://{split(source)[0]}" if source.startswith("s3://") else None


def service_of(image: ImageInFlight, error: ImageError) -> str | None:
    """The service that `error` says does not respond; None if it isn't an outage, or not one that images wait for."""
    if isinstance(error, StorageUnavailable):
        return image.context.store.service
    fetching = "header" not in vars(image)
    return source_service(image.item.source) if fetching and isinstance(error, Unreachable | ServerError) else None


@dataclass
class _Outage:
    since: float
    try_at: float
    reason: str = ""
    logged: bool = False
    pause: float = FIRST_PAUSE
    images: deque[ImageInFlight] = field(default_factory=deque)


class Outages:
    """What waits for which service. Thread-safe. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._outages: dict[str, _Outage] = {}
        self._answers: Counter[str] = Counter()

    def postpone(self, image: ImageInFlight, error: ImageError) -> bool:
        """Let an image wait if `error` is an outage; False if it must fail."""
        service = service_of(image, error)
        if service is None:
            return False
        with self._lock:
            now, answers = self._clock(), self._answers[service]
            image.own_faults += image.answers_seen is not None and answers > image.answers_seen
            image.answers_seen = answers
            if image.own_faults >= OWN_FAULTS:
                return False
            outage = self._outages.setdefault(service, _Outage(now, now + FIRST_PAUSE))
            outage.reason = error.message
            if now - outage.since > PATIENCE:
                return False
            outage.images.append(image)
            image.waits = True
            return True

    def due(self) -> list[ImageInFlight]:
        """One image of each service whose pause is over, to be tried again; and those that nobody wants any more."""
        with self._lock:
            now, found = self._clock(), []
            for service, outage in self._outages.items():
                found += [image for image in outage.images if image.stopped]
                outage.images = deque(image for image in outage.images if not image.stopped)
                if now < outage.try_at:
                    continue
                if not outage.logged:  # what is over by now is not worth a line
                    fields = {"action": "outage", "service": service, "reason": outage.reason, "jobs": _jobs(outage.images)}
                    log.warning("service does not respond", extra=fields)
                    outage.logged = True
                outage.pause = min(LONGEST_PAUSE, 2 * outage.pause)
                outage.try_at = now + outage.pause
                if outage.images:
                    found.append(outage.images.popleft())
            for image in found:
                image.waits = False
            return found

    def answered(self, service: str | None) -> list[ImageInFlight]:
        """A service has responded: returns what waited for it, to be tried again."""
        if service not in self._outages:
            return []
        with self._lock:
            self._answers[service] += 1
            outage = self._outages.pop(service, None)
        if outage is None:
            return []
        if outage.logged:
            fields = dict(action="outage", service=service, seconds=round(self._clock() - outage.since, 1))
            log.info("service responds again", extra={**fields, "images": len(outage.images), "jobs": _jobs(outage.images)})
        for image in outage.images:
            image.waits = False
        return list(outage.images)

    def full(self, service: str) -> bool:
        """Whether too many images wait for a service to take more that need it."""
        outage = self._outages.get(service)
        return outage is not None and len(outage.images) >= MANY

    def reasons(self) -> dict[str, str]:
        """Why the images of a job wait, by job."""
        with self._lock:
            outages = list(self._outages.values())
            return {image.context.job: outage.reason for outage in outages for image in outage.images}


def _jobs(images: Iterable[ImageInFlight]) -> list[str]:
    """The jobs that wait, for a log line."""
    return sorted({image.context.job for image in images})[:MOST_JOBS]
