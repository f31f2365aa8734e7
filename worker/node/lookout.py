"""The parent's lookout for models that are added, replaced or removed while the node runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from threading import Thread

from imagemill.shared.settings import Settings
from imagemill.worker.models.stamps import Stamp
from imagemill.worker.node.offer import files_of, incomplete, lanes, parts, shortcomings
from imagemill.worker.node.offered import Offered

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Interval between looks, each of which takes a few milliseconds: nothing is read but small records."""
HUNG_SECONDS = 30.0
"""A look that takes longer is worth telling: the weights may be on a network drive that hangs."""


class Lookout:
    """Opens and withdraws the lanes of a node, and the parts that jobs can name beside a model, as their files come and go."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._models = _Watch("model", "lane", self._find_models())
        self._parts = _Watch("part", "part", parts(settings))
        self.lanes, self.parts = self._models.offered, self._parts.offered
        self._lacking = self._find_lacks()
        self._look: Thread | None = None
        self._look_at = time.monotonic() + LOOK_SECONDS
        self._hangs = False
        self._told = self._state()

    def tick(self) -> None:
        """Look at the files now and then, in a thread: a drive that hangs must not keep the node from reporting."""
        now = time.monotonic()
        if self._look is not None and self._look.is_alive():
            if not self._hangs and now > self._look_at + HUNG_SECONDS:
                self._hangs = True
                log.error("weights folder does not respond", extra={"action": "look", "reason": self.lacks[-1]})
            return
        self._hangs = False
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._look = Thread(target=self._look_once, name="lookout", daemon=True)
            self._look.start()

    def look(self) -> None:
        """Look at the files. What came or changed is offered once its files have stayed the same from one look to the next:
        somebody may still be copying them.
        """
        self._models.compare(self._find_models())
        self._parts.compare(parts(self._settings))
        self._lacking = self._find_lacks()

    @property
    def lacks(self) -> tuple[str, ...]:
        """Why the node does not offer everything that it is set up for."""
        folder = self._settings.weights.folder.expanduser()
        return (*self._lacking, *[f"the folder {folder} does not respond, so changes in it go unnoticed"] * self._hangs)

    def changed(self) -> bool:
        """Whether what the node offers or lacks has changed since the last call."""
        before, self._told = self._told, self._state()
        return self._told != before

    def _look_once(self) -> None:
        try:
            self.look()
        except Exception:  # a bug; the next look may go well
            log.exception("look failed", extra={"action": "look"})

    def _state(self) -> object:
        return [(offered.open(), offered.closed()) for offered in (self.lanes, self.parts)], self.lacks

    def _find_models(self) -> dict[str, Stamp]:
        return {lane: files_of(self._settings, lane) for lane in lanes(self._settings)}

    def _find_lacks(self) -> tuple[str, ...]:
        found = (*shortcomings(self._settings), *incomplete(self._settings))
        return tuple(": ".join(filter(None, why_and_fix)) for why_and_fix in found)


class _Watch:
    """What is offered, by name, and the files that it was offered with. `what` and `field` are words for the log."""

    def __init__(self, what: str, field: str, found: Mapping[str, Stamp]) -> None:
        self._what, self._field = what, field
        self._seen, self._files = found, dict(found)
        self.offered = Offered(found)

    def compare(self, found: Mapping[str, Stamp]) -> None:
        """Offer and withdraw according to what has been found now."""
        for name in self._files.keys() - found.keys():
            self._log(logging.WARNING, "gone", name)
            del self._files[name]
            self.offered.withdraw(name)
        for name, files in found.items():
            if files == self._files.get(name):
                self._try_again(name)
            elif files == self._seen.get(name):
                self._log(logging.INFO, "replaced" if name in self._files else "found", name)
                self._files[name] = files
                self.offered.offer(name)
        self._seen = found

    def _try_again(self, name: str) -> None:
        """Offer something again for which memory was short some time ago."""
        fault = self.offered.fault(name)
        if fault is not None and fault.again is not None and time.monotonic() >= fault.again:
            self._log(logging.INFO, "tried again", name)
            self.offered.offer(name)

    def _log(self, level: int, event: str, name: str) -> None:
        log.log(level, "%s %s", self._what, event, extra={"action": self._field, self._field: name})
