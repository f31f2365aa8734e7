"""How many images a child takes ahead of its device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from imagemill.worker.line.image import ImageInFlight
from imagemill.worker.line.line import Line
from imagemill.worker.node.shares import Held, ahead

FIRST_IMAGES, FIRST_OF_BATCHES = 2, 16
"""Images taken ahead before it is known how fast they are computed: enough for a first batch where larger batches are faster.
After that, the more it has computed, the more it takes."""
GROWTH = 16
"""How many more are taken ahead for each image that it has computed."""
MOST_AHEAD = 1024
"""Images taken ahead at most, however fast the device is."""
MOST_OVERTAKEN = 256
"""Images that others may overtake, because they wait for slow hosts or for S3. More than this fill the line."""


class Appetite:
    """Decides how much a line should be filled: with `seconds` of the device's work, and what it computes during a download.

    `grows` says whether larger batches are faster in a lane.
    """

    def __init__(self, line: Line, grows: Callable[[str], bool], *, seconds: float) -> None:
        self._line, self._grows, self._seconds = line, grows, seconds

    def room(self, held: Sequence[Held], lanes: Sequence[str], *, overtaken: bool) -> dict[str, int]:
        """How many more images each lane wants; empty if the line is filled. With `overtaken`, waiting images don't
        count."""
        most = {lane: self._most(lane) for lane in lanes}
        if overtaken:
            return most
        at_hand = len(self._at_hand(held))
        room = {lane: images - at_hand for lane, images in most.items()}
        return {lane: images for lane, images in room.items() if images > 0 and 2 * images >= most[lane]}

    def surplus(self, held: Sequence[Held]) -> list[ImageInFlight]:
        """Images that were taken but are too many for a device that turned out to be slow."""
        most = max((self._most(one.lane) for one in held), default=0)
        return self._at_hand(held)[2 * most :]

    def _at_hand(self, held: Sequence[Held]) -> list[ImageInFlight]:
        """The images that the device can soon have: not those that others overtake, unless there are too many."""
        slow, at_hand, overtaken = self._line.front.slow_hosts(), list[ImageInFlight](), 0
        for image in ahead(held):
            late = image.waits or image.host in slow
            overtaken += late
            if not late or overtaken > MOST_OVERTAKEN:
                at_hand.append(image)
        return at_hand

    def _most(self, lane: str) -> int:
        """Images of a lane that should wait for the device, or for their download; the next batches where those grow."""
        speed, grows = self._line.speed, self._grows(lane)
        images = first = FIRST_OF_BATCHES if grows else FIRST_IMAGES
        if speed.computed(lane):
            wanted = max(1, round(speed.pace(lane) * (self._seconds + self._line.front.latency)))
            images = min(wanted, first + GROWTH * speed.computed(lane), MOST_AHEAD)
        return max(images, 2 * speed.batch(lane)) if grows else images
