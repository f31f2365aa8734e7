"""TIFF: the directories of its pages, the page to read, and limits that hold before anything is allocated.

Format: TIFF 6.0, https://www.loc.gov/preservation/digital/formats/fdd/fdd000022.shtml; BigTIFF.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from imagemill.shared.errors import NotAnImage, Truncated

MAX_PIECES = 100_000
"""Strips or tiles of a page."""
MAX_TAGS = 4_096
MAX_PAGES = 100
"""Pages that are looked at to find the full page."""
MAX_VALUES = 3 * 2**16
"""Numbers of one tag: a palette of 16 bits."""

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, ORIENTATION, SAMPLES = 256, 257, 258, 259, 262, 266, 274, 277
ROWS_PER_STRIP, PLANAR, FAX3_OPTIONS, FAX4_OPTIONS, PREDICTOR, PALETTE = 278, 284, 292, 293, 317, 320
STRIPS, STRIP_BYTES, TILES, TILE_BYTES, TILE_WIDTH, TILE_HEIGHT = 273, 279, 324, 325, 322, 323
SUB_PAGES, INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, JPEG_TABLES, SUBSAMPLING, REFERENCE = 330, 332, 338, 339, 347, 530, 532
KIND, OLD_KIND, XMP, PROFILE = 254, 255, 700, 34675

_TYPES = {
    1: "B",
    3: "H",
    4: "I",
    7: "B",
    13: "I",
    16: "Q",
    18: "Q",
}  # types of whole numbers, and of bytes; the rest has none here
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_REDUCED, _MASK = 1, 4  # bits of KIND
_THUMBNAIL = 2  # a page is one if another of the same proportions is so many times as wide


@dataclass(frozen=True)
class Page:
    """One directory: type, count and place of the values of each tag. `above` is the page that it is a sub-page of."""

    data: bytes = field(repr=False)
    order: str
    entries: dict[int, tuple[int, int, int]] = field(repr=False)
    above: Page | None = field(default=None, repr=False)

    def numbers(self, tag: int, default: tuple[int, ...] = (), *, most: int = MAX_VALUES) -> tuple[int, ...]:
        """The first `most` whole numbers of a tag. Raises NotAnImage for other types and too many, Truncated if cut off."""
        if tag not in self.entries:
            return default
        kind, count, place = self.entries[tag]
        if kind not in _TYPES:
            raise NotAnImage(f"TIFF files whose tag {tag} is of type {kind} are not supported")
        if count > MAX_VALUES:
            raise NotAnImage(f"the TIFF file has {count:,} values for its tag {tag}; the limit is {MAX_VALUES:,}")
        layout = f"{self.order}{min(count, most)}{_TYPES[kind]}"
        if place + struct.calcsize(layout) > len(self.data):
            raise Truncated(f"the TIFF file ends inside its tag {tag}")
        return struct.unpack_from(layout, self.data, place)

    def number(self, tag: int, default: int = 0) -> int:
        """The first of its numbers."""
        return (*self.numbers(tag, most=1), default)[0]

    def raw(self, tag: int, most: int) -> bytes | None:
        """The bytes of a tag, or of the page above; None if there are none or more than `most`."""
        if tag not in self.entries:
            return self.above.raw(tag, most) if self.above is not None else None
        kind, count, place = self.entries[tag]
        length = count * _SIZES.get(kind, 1)
        return self.data[place : place + length] if length <= min(most, len(self.data) - place) else None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height); 0 if it isn't stated."""
        return self.number(WIDTH), self.number(HEIGHT)

    @property
    def pieces(self) -> int:
        """How many strips or tiles it claims to have."""
        return max((self.entries[tag][1] for tag in (STRIPS, TILES) if tag in self.entries), default=0)

    @property
    def secondary(self) -> bool:
        """Whether it says that it is a thumbnail or a mask of another page."""
        return bool(self.number(KIND) & (_REDUCED | _MASK)) or self.number(OLD_KIND) == 2


def full_page(data: bytes) -> tuple[Page, bool]:
    """The first page that isn't a thumbnail, and whether that means that a page was skipped. Raises NotAnImage or Truncated."""
    pages = list(_pages(data))
    first = pages[0]
    whole = [page for page in pages if not page.secondary]
    if not whole:
        return first, False
    best = whole[0]
    if best is first:  # many scanners don't mark their thumbnails
        best = next((page for page in whole if _is_thumbnail(first.size, page.size)), first)
    return best, best is not first


def _is_thumbnail(small: tuple[int, int], large: tuple[int, int]) -> bool:
    wanted = small[0] * large[1], small[1] * large[0]
    rounding = max(large)  # of one pixel of the smaller page
    return 0 < _THUMBNAIL * small[0] <= large[0] and abs(wanted[0] - wanted[1]) <= rounding


def _pages(data: bytes) -> Iterator[Page]:
    """The pages in their order, each before its sub-pages. The first one must be readable; others end the search."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    seen = set[int]()
    while start and start not in seen and len(seen) < MAX_PAGES:
        seen.add(start)
        try:
            page, start = _page(data, order, big, start)
        except (struct.error, NotAnImage, Truncated):
            if len(seen) == 1:
                raise
            return
        yield page
        try:
            below = {*page.numbers(SUB_PAGES, most=MAX_PAGES - len(seen))} - seen
            seen.update(below)
            for place in sorted(below):
                yield _page(data, order, big, place, page)[0]
        except (struct.error, NotAnImage, Truncated):
            continue


def _page(data: bytes, order: str, big: bool, start: int, above: Page | None = None) -> tuple[Page, int]:
    """The directory at `start`, and where the next one is."""
    counter, entry, pointer = ("Q", "HHQ", "Q") if big else ("H", "HHI", "I")
    room = struct.calcsize("<" + pointer)
    step = struct.calcsize("<" + entry) + room
    (count,) = struct.unpack_from(order + counter, data, start)
    start += struct.calcsize("<" + counter)
    if count > MAX_TAGS:
        raise NotAnImage(f"the TIFF file has {count:,} tags; the limit is {MAX_TAGS:,}")
    entries = dict[int, tuple[int, int, int]]()
    for at in range(start, start + step * count, step):
        tag, kind, length = struct.unpack_from(order + entry, data, at)
        place = at + step - room
        if length * _SIZES.get(kind, 1) > room:
            (place,) = struct.unpack_from(order + pointer, data, place)
        entries.setdefault(tag, (kind, length, place))
    page = Page(data, order, entries, above)
    for tag in (WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT):
        if entries.get(tag, (4,))[0] not in (3, 4, 16):  # libtiff would accept any integer type
            raise NotAnImage(f"TIFF files with sizes of type {entries[tag][0]} are not supported")
    if page.pieces > MAX_PIECES:
        raise NotAnImage(f"the TIFF file has {page.pieces:,} strips or tiles; the limit is {MAX_PIECES:,}")
    end = start + step * count
    following = struct.unpack_from(order + pointer, data, end)[0] if end + room <= len(data) else 0
    return page, following
