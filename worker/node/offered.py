"""What a node offers, in memory that its processes share: the parent opens it, and whoever finds a fault closes it."""

from __future__ import annotations

import ctypes
import logging
import mmap
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

log = logging.getLogger(__name__)

MOST = 4000
"""Names that a node may have offered since it started."""
LONGEST_NAME, LONGEST_REASON = 201, 600
"""Bytes, with a zero at the end."""
GONE = -1.0
AGAIN_SECONDS = 300.0
"""After this time, a model that was too large for the memory that was left is tried again."""


class _Entry(ctypes.Structure):
    """One name. Times are by the monotonic clock, which all processes of a host share; 0 means never.

    Only the parent writes `name`, once, and then `opened`, which is `GONE` while the node does not offer it. A process that
    finds that its files can't be used writes `reason`, `again` and then `failed`: when the attempt began. So a fault of files
    that have been replaced meanwhile changes nothing.
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
    """Why something is out of service. It may be tried `again` from this time on, or else once its files have changed."""

    reason: str
    again: float | None = None


class Offered:
    """The lanes of a node, or the parts (LoRAs, ControlNets, VAEs) that jobs can name beside a model.

    Create it before the fork. Nothing is locked: a process that is killed must not stop the others.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._memory = mmap.mmap(-1, MOST * ctypes.sizeof(_Entry))
        self._entries = (_Entry * MOST).from_buffer(self._memory)
        self._places: dict[str, int] = {}
        for name in names:
            self.offer(name)

    # --- for the parent -------------------------------------------------------------------------

    def offer(self, name: str) -> None:
        """Put a lane or part into service: it is new, or its files are."""
        entry = self._entry(name)
        if entry is None:
            place = len(self._known())
            if place == MOST:
                log.error("too many models; restart the node", extra={"action": "offer", "model": name})
                return
            entry = self._entries[place]
            entry.name = name.encode()
        entry.opened = time.monotonic()

    def withdraw(self, name: str) -> None:
        """Take away what is gone."""
        entry = self._entry(name)
        if entry is not None:
            entry.opened = GONE

    def known(self) -> list[str]:
        """All that this node has ever offered."""
        return list(self._known())

    # --- for all processes ----------------------------------------------------------------------

    def open(self) -> list[str]:
        """What is in service."""
        return [name for name, entry in self._all() if entry.opened > entry.failed]

    def closed(self) -> dict[str, Fault]:
        """What is out of service."""
        return {name: _fault(entry) for name, entry in self._all() if 0 < entry.opened <= entry.failed}

    def since(self, name: str) -> float | None:
        """When it was offered with its present files, on the monotonic clock; None if it is not here."""
        entry = self._entry(name)
        return entry.opened if entry is not None and entry.opened > 0 else None

    def fault(self, name: str) -> Fault | None:
        """Why it is out of service, if it is."""
        entry = self._entry(name)
        return _fault(entry) if entry is not None and 0 < entry.opened <= entry.failed else None

    def close(self, name: str, reason: str, since: float, *, passing: bool = False) -> bool:
        """Take it out of service, because it could not be used in an attempt that began at `since`.

        Returns False, and changes nothing, if its files have been replaced since, or if it is out of service already. If the
        fault is `passing`, it is tried again later.
        """
        entry = self._entry(name)
        if entry is None or not entry.failed < entry.opened <= since:
            return False
        entry.reason = reason.encode()[: LONGEST_REASON - 1]
        entry.again = time.monotonic() + AGAIN_SECONDS if passing else 0.0
        entry.failed = since
        return True

    def _all(self) -> Iterator[tuple[str, _Entry]]:
        return ((name, self._entries[place]) for name, place in self._known().items())

    def _entry(self, name: str) -> _Entry | None:
        place = self._known().get(name)
        return None if place is None else self._entries[place]

    def _known(self) -> dict[str, int]:
        """The place of each name."""
        places = self._places
        if len(places) < MOST and self._entries[len(places)].opened:
            places = dict(places)  # anew, since other threads do the same
            while len(places) < MOST and self._entries[len(places)].opened:
                places[self._entries[len(places)].name.decode()] = len(places)
            self._places = places
        return places


def _fault(entry: _Entry) -> Fault:
    return Fault(entry.reason.decode(errors="ignore"), entry.again or None)
