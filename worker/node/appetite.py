"""How many images a child takes ahead of its device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from imagemill.worker.line.image import ImageInFlight
from imagemill.worker.line.line import Line
from imagemill.worker.node.shares import Held, ahead

STARVING_SECONDS = 0.25
"""Once the device has waited this long for downloads, more of them are started."""
FIRST_IMAGES = 2
"""Images taken ahead before it is known how fast they are computed; after that, the more it has computed, the more it takes."""
MOST_OVERTAKEN = 16
"""Images per thread that others may overtake, since they wait for slow hosts or for S3. More of them fill the line."""


class Appetite:
    """Decides how much a line should be filled. `grows` says whether larger batches are faster in a lane.

    `seconds` of work should wait for the device; `threads` is the number of downloads at a time.
    """

    def __init__(self, line: Line, grows: Callable[[str], bool], *, seconds: float, threads: int) -> None:
        self._line, self._grows, self._seconds, self._threads = line, grows, seconds, threads
        self._stretch = 1

    def room(self, held: Sequence[Held], lanes: Sequence[str], *, overtaken: bool) -> dict[str, int]:
        """How many more images each lane wants; empty if the line is filled. With `overtaken`, what waits does not count."""
        at_hand, since = self._at_hand(held), self._line.starving_since
        starving = since is not None and time.monotonic() - since > STARVING_SECONDS
        if starving and 0 < len(at_hand) < self._threads and all(image.place == "fetching" for image in at_hand):
            self._stretch *= 2
        most = {lane: self._most(lane) for lane in lanes}
        if overtaken:
            return most
        room = {lane: images - len(at_hand) for lane, images in most.items()}
        return {lane: images for lane, images in room.items() if images > 0 and 2 * images >= most[lane]}

    def shrink(self, held: Sequence[Held]) -> list[ImageInFlight]:
        """The device has enough to do: take less from now on. Returns what was too much for a slow one."""
        self._stretch = max(1, self._stretch // 2)
        most = max((self._most(one.lane) for one in held), default=0)
        return self._at_hand(held)[2 * most :]

    def _at_hand(self, held: Sequence[Held]) -> list[ImageInFlight]:
        """The images that the device can soon have: not those that others overtake, unless there are too many."""
        slow, at_hand, overtaken = self._line.slow_hosts(), list[ImageInFlight](), 0
        for image in ahead(held):
            late = image.waits or image.host in slow
            overtaken += late
            if not late or overtaken > MOST_OVERTAKEN * self._threads:
                at_hand.append(image)
        return at_hand

    def _most(self, lane: str) -> int:
        """Images of a lane that should wait for the device: a few seconds of work, or the next batch where those grow."""
        speed = self._line.speed
        wanted = max(1, round(speed.rates().get(lane, 0.0) * self._seconds))
        images = min(wanted, FIRST_IMAGES + 2 * speed.computed(lane)) if speed.computed(lane) else FIRST_IMAGES
        if self._grows(lane):
            images = max(images, 2 * speed.batch(lane))
        return images * self._stretch
