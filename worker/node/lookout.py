"""The parent's lookout for models that are added, replaced or removed while the node runs."""

from __future__ import annotations

import logging
import time

from imagemill.shared.engines import split_lane
from imagemill.shared.settings import Settings
from imagemill.worker.models.added import everything
from imagemill.worker.models.stamps import Stamp
from imagemill.worker.node.lanes import Lanes
from imagemill.worker.node.offer import files_of, lanes, shortcomings

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Interval between looks, each of which takes about a millisecond: nothing is read but a few small records."""


class Lookout:
    """Opens and withdraws the lanes of a node as its models come, change and go."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._seen = {lane: files_of(settings, lane) for lane in lanes(settings)}
        self._offered = dict(self._seen)
        self._look_at = 0.0
        self.lanes = Lanes(self._offered)
        self.lacks = self._lacks()

    def look(self) -> bool:
        """Look at the models' files, now and then; returns whether anything has changed.

        A model that came or changed is offered once its files have stayed the same from one look to the next: somebody may
        still be copying them.
        """
        if time.monotonic() < self._look_at:
            return False
        self._look_at = time.monotonic() + LOOK_SECONDS
        found = {lane: files_of(self._settings, lane) for lane in lanes(self._settings)}
        changed = [self._update(lane, files) for lane, files in found.items()]
        changed += [self._withdraw(lane) for lane in self._offered.keys() - found.keys()]
        self._seen, lacks = found, self._lacks()
        changed.append(lacks != self.lacks)
        self.lacks = lacks
        return any(changed)

    def _update(self, lane: str, files: Stamp) -> bool:
        if files == self._offered.get(lane):
            fault = self.lanes.closed().get(lane)
            if fault is None or fault.again is None or time.monotonic() < fault.again:
                return False
            log.info("lane tried again", extra={"action": "lane", "lane": lane})
        elif files != self._seen.get(lane):
            return False
        else:
            message = "model replaced" if lane in self._offered else "model found"
            log.info(message, extra={"action": "lane", "lane": lane, "model": split_lane(lane)[2]})
        self._offered[lane] = files
        self.lanes.offer(lane)
        return True

    def _withdraw(self, lane: str) -> bool:
        log.info("model gone", extra={"action": "lane", "lane": lane, "model": split_lane(lane)[2]})
        del self._offered[lane]
        self.lanes.withdraw(lane)
        return True

    def _lacks(self) -> tuple[str, ...]:
        _, faults = everything(self._settings.weights.folder.expanduser())
        return (*(f"{reason}: {fix}" for reason, fix in shortcomings(self._settings)), *faults)
