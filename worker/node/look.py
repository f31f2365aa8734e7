"""Open a few images of a list for `submit --dry-run=fetch`, as a worker would: with its address rules, limits and decoders."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from imagemill.shared.errors import ImageError
from imagemill.shared.messages import Item, Job
from imagemill.shared.options.inpaint import MaskFrom
from imagemill.shared.settings import Settings
from imagemill.worker.imaging import codec
from imagemill.worker.imaging.masks import read_mask
from imagemill.worker.transfer.fetch import Fetcher
from imagemill.worker.transfer.network import Network
from imagemill.worker.transfer.objects import Readable
from imagemill.worker.transfer.s3_requests import S3Requests

AT_ONCE = 8
"""Images that are fetched at the same time."""
FILLED = 128
"""Mask levels from here on count as filled."""


def look(settings: Settings, items: Sequence[Item], spec: Job) -> list[dict[str, Any]]:
    """What each image is: source, ok, format, size (width, height), bytes and, with a mask, how that is read; or its error."""
    with closing(Network()) as network:
        fetcher = Fetcher(settings.fetch, settings.files, S3Requests(settings.s3, network), network)
        fetcher = fetcher.within(Readable.of(settings.s3, spec.output.url))
        looker = Looker(fetcher, settings.worker.max_pixels, getattr(spec.options, "mask_from", "auto"))
        return network.call(_look_at_all(looker, items, getattr(spec.options, "mask", None)))


async def _look_at_all(looker: Looker, items: Sequence[Item], mask: str | None) -> list[dict[str, Any]]:
    return await asyncio.gather(*(looker.look(item.source, item.mask or mask) for item in items))


class Looker:
    """Fetches and decodes; errors of images become part of what is returned."""

    def __init__(self, fetcher: Fetcher, max_pixels: int, mask_from: MaskFrom) -> None:
        self._fetcher, self._max_pixels, self._mask_from = fetcher, max_pixels, mask_from
        self._turns, self._decoding = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(1)

    async def look(self, source: str, mask: str | None) -> dict[str, Any]:
        """One image and its mask."""
        async with self._turns:
            seen: dict[str, Any] = {"source": source, "ok": True}
            try:
                seen |= await self._opened(source, self._describe)
            except ImageError as error:
                seen |= {"ok": False, "error": f"{error.code}: {error.message}"}
            if mask is not None:
                try:
                    seen |= await self._opened(mask, self._describe_mask, mask=True)
                except ImageError as error:
                    seen |= {"ok": False, "mask": f"{error.code}: {error.message}"}
            return seen

    async def _opened(self, url: str, describe: Any, *, mask: bool = False) -> dict[str, Any]:
        """Fetch and describe; room is given back in the loop's thread."""
        fetched = await self._fetcher.fetch(url, mask=mask)
        try:
            async with self._decoding:
                described: dict[str, Any] = await asyncio.to_thread(describe, fetched.data)
                return described
        finally:
            (self._fetcher.mask_room if mask else self._fetcher.room).release(fetched.room)

    def _describe(self, data: bytes) -> dict[str, Any]:
        header = codec.probe(data, max_pixels=self._max_pixels)
        codec.decode(data, header)  # finds damage behind the header
        return {"format": header.format, "size": header.size, "bytes": len(data)}

    def _describe_mask(self, data: bytes) -> dict[str, Any]:
        levels, notes = read_mask(data, max_pixels=self._max_pixels, mask_from=self._mask_from)
        share = float((levels >= FILLED).mean())
        return {"mask": ", ".join([f"fills {share:.1%} of {levels.shape[1]}×{levels.shape[0]} pixels", *notes])}
