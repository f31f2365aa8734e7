"""What a child knows of the parts on its node: the LoRAs, ControlNets and VAEs that jobs can name beside a model."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from imagemill.shared.engines import split_lane
from imagemill.shared.errors import ModelUnavailable
from imagemill.shared.messages import Node
from imagemill.worker.node.offered import AGAIN_SECONDS, Fault, Offered
from imagemill.worker.operations.open_model import getting


@dataclass(frozen=True)
class Lack:
    """Why a node can't work on a job: `what` follows its name, and `why` says more, or how to fix it.

    With `here`, it is known of this node alone: others that have the part may have found the same.
    """

    what: str
    why: str
    here: bool = False

    def shown(self, node: str, lane: str, needed: Iterable[str], nodes: Iterable[Node]) -> str | None:
        """The same for `status`, where the job waits; None if another of these nodes can work on it."""
        others = [other for other in nodes if other.node != node and lane in other.lanes]
        able = any(other.parts is None or set(needed) <= set(other.parts) for other in others)
        if able and not self.here:
            return None
        also = ", and no other node can work on this job" if others and not able else ""
        return f"{node} {self.what}{also}: {self.why}"


class Parts:
    """Parts that are damaged are out of service for all children of a node (`offered`).

    A part that is sound by itself may still not fit a model. Each child finds that out alone, and remembers it until the
    part's files change: another model may work with it.
    """

    def __init__(self, offered: Offered) -> None:
        self._offered = offered
        self._misfits: dict[tuple[str, str], tuple[float, Fault]] = {}

    def lack(self, lane: str, names: Iterable[str]) -> Lack | None:
        """The first of these parts that is missing or can't be used in a lane, if any is."""
        return next((lack for lack in (self._lack(lane, name) for name in names) if lack is not None), None)

    def _lack(self, lane: str, name: str) -> Lack | None:
        since, fault = self._offered.since(name), self._offered.fault(name)
        if since is None:
            return Lack(f"lacks {name}", f"run {getting(name)}")
        if fault is not None:
            return Lack(f"can't use {name}", fault.reason)
        found, fault = self._misfits.get((lane, name), (0.0, None))
        if fault is None or since > found or (fault.again is not None and time.monotonic() >= fault.again):
            return None
        return Lack(f"can't use {name} with {split_lane(lane)[2]}", fault.reason, here=True)

    def close(self, lane: str, error: ModelUnavailable, since: float) -> bool:
        """Remember that a part could not be used in an attempt that began at `since`; returns whether that is new."""
        offered = self._offered.since(error.part)
        if not error.misfit:
            return self._offered.close(error.part, error.message, since, passing=error.passing)
        if offered is None or offered > since or self._lack(lane, error.part) is not None:
            return False
        again = time.monotonic() + AGAIN_SECONDS if error.passing else None
        self._misfits = {**self._misfits, (lane, error.part): (since, Fault(error.message, again))}
        return True
