"""The lanes of a node, in memory that its processes share: the parent opens them, and whoever finds a fault closes them."""

from __future__ import annotations

import ctypes
import logging
import mmap
import time
from collections.abc import Iterable
from dataclasses import dataclass

log = logging.getLogger(__name__)

MOST = 1000
"""Lanes that a node may have had since it started."""
LONGEST_NAME, LONGEST_REASON = 201, 600
"""Bytes, with a zero at the end."""
GONE = -1.0
AGAIN_SECONDS = 300.0
"""After this time, a model that did not fit into the free memory is tried again."""


class _Entry(ctypes.Structure):
    """One lane. Times are by the monotonic clock, which all processes of a host share; 0 means never.

    Only the parent writes `name`, once, and then `opened`, which is `GONE` while the node does not offer the lane. A process
    that finds that its model can't be used writes `reason`, `again` and then `failed`: when the attempt began. So a fault in
    files that have been replaced in the meantime changes nothing.
    """

    _fields_ = (
        ("opened", ctypes.c_double),
        ("failed", ctypes.c_double),
        ("again", ctypes.c_double),
        ("name", ctypes.c_char * LONGEST_NAME),
        ("reason", ctypes.c_char * LONGEST_REASON),
    )


@dataclass(frozen=True)
class Fault:
    """Why a lane is out of service. It may be tried `again` from this time on, or else once its files have changed."""

    reason: str
    again: float | None = None


class Lanes:
    """Create it before the fork. Nothing is locked: a process that is killed must not stop the others."""

    def __init__(self, lanes: Iterable[str] = ()) -> None:
        self._memory = mmap.mmap(-1, MOST * ctypes.sizeof(_Entry))
        self._entries = (_Entry * MOST).from_buffer(self._memory)
        self._names: list[str] = []
        for lane in lanes:
            self.offer(lane)

    # --- for the parent -------------------------------------------------------------------------

    def offer(self, lane: str) -> None:
        """Put a lane into service: it is new, or its model's files are."""
        place = self._place(lane)
        if place is None:
            place = len(self.known())
            if place == MOST:
                log.error("too many lanes; restart the node", extra={"action": "lane", "lane": lane})
                return
            self._entries[place].name = lane.encode()
        self._entries[place].opened = time.monotonic()

    def withdraw(self, lane: str) -> None:
        """Take a lane away whose model is gone."""
        place = self._place(lane)
        if place is not None:
            self._entries[place].opened = GONE

    def known(self) -> list[str]:
        """All lanes that this node has ever offered."""
        names = self._names
        while len(names) < MOST and self._entries[len(names)].opened:
            names = [*names, self._entries[len(names)].name.decode()]  # anew, since other threads do the same
        self._names = names
        return names

    # --- for all processes ----------------------------------------------------------------------

    def open(self) -> list[str]:
        """The lanes in service."""
        return [lane for lane, entry in self._known() if entry.opened > entry.failed]

    def closed(self) -> dict[str, Fault]:
        """The lanes out of service."""
        return {
            lane: Fault(entry.reason.decode(errors="ignore"), entry.again or None)
            for lane, entry in self._known()
            if 0 < entry.opened <= entry.failed
        }

    def close(self, lane: str, reason: str, since: float, *, passing: bool = False) -> bool:
        """Take a lane out of service, because its model could not be used in an attempt that began at `since`.

        Returns False, and changes nothing, if its files have been replaced since, or if it is out of service already. If the
        fault is `passing`, the lane is tried again later.
        """
        place = self._place(lane)
        if place is None or not self._entries[place].failed < self._entries[place].opened <= since:
            return False
        entry = self._entries[place]
        entry.reason = reason.encode()[: LONGEST_REASON - 1]
        entry.again = time.monotonic() + AGAIN_SECONDS if passing else 0.0
        entry.failed = since
        return True

    def _known(self) -> Iterable[tuple[str, _Entry]]:
        return zip(self.known(), self._entries, strict=False)

    def _place(self, lane: str) -> int | None:
        known = self.known()
        return known.index(lane) if lane in known else None
