"""The parent's lookout for models that are added, replaced or removed while the node runs."""

from __future__ import annotations

import logging
import time

from imagemill.shared.settings import Settings
from imagemill.worker.node.lanes import Lanes
from imagemill.worker.node.offer import files_of, incomplete, lanes, parts, shortcomings

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Interval between looks, each of which takes a few milliseconds: nothing is read but small records."""


class Lookout:
    """Opens and withdraws the lanes of a node as its models come, change and go."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._seen = {lane: files_of(settings, lane) for lane in lanes(settings)}
        self._offered = dict(self._seen)
        self._look_at = time.monotonic() + LOOK_SECONDS
        self.lanes = Lanes(self._offered)
        self.lacks, self.parts = self._lacks(), parts(settings)
        self._told = self._state()

    def look(self) -> None:
        """Look at the models' files, now and then.

        A model that came or changed is offered once its files have stayed the same from one look to the next: somebody may
        still be copying them.
        """
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_SECONDS
        found = {lane: files_of(self._settings, lane) for lane in lanes(self._settings)}
        for lane in self._offered.keys() - found.keys():
            log.warning("model gone", extra={"action": "lane", "lane": lane})
            del self._offered[lane]
            self.lanes.withdraw(lane)
        for lane, files in found.items():
            if files == self._offered.get(lane):
                self._try_again(lane)
            elif files == self._seen.get(lane):
                log.info("model replaced" if lane in self._offered else "model found", extra={"action": "lane", "lane": lane})
                self._offered[lane] = files
                self.lanes.offer(lane)
        self._seen, self.lacks, self.parts = found, self._lacks(), parts(self._settings)

    def changed(self) -> bool:
        """Whether what the node offers or lacks has changed since the last call."""
        before, self._told = self._told, self._state()
        return self._told != before

    def _try_again(self, lane: str) -> None:
        """Offer a lane again for which memory was short some time ago."""
        fault = self.lanes.closed().get(lane)
        if fault is not None and fault.again is not None and time.monotonic() >= fault.again:
            log.info("lane tried again", extra={"action": "lane", "lane": lane})
            self.lanes.offer(lane)

    def _state(self) -> object:
        return self.lanes.open(), self.lanes.closed(), self.lacks, self.parts

    def _lacks(self) -> tuple[str, ...]:
        found = (*shortcomings(self._settings), *incomplete(self._settings))
        return tuple(": ".join(filter(None, why_and_fix)) for why_and_fix in found)
