"""Open a few images of a list for `submit --dry-run=fetch`, as a worker would: with its address rules, limits and decoders."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from imagemill.shared.errors import ImageError
from imagemill.shared.messages import Item, Job
from imagemill.shared.options.base import EngineOptions
from imagemill.shared.options.inpaint import InpaintOptions
from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.shared.settings import Settings
from imagemill.worker.imaging import codec
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.references import References
from imagemill.worker.operations.base import Inputs
from imagemill.worker.operations.inpaint.mask import build_mask
from imagemill.worker.operations.job_images import job_image
from imagemill.worker.operations.remove_background.prompts import prompts_of
from imagemill.worker.transfer.fetch import Fetched, Fetcher
from imagemill.worker.transfer.network import Network
from imagemill.worker.transfer.objects import Readable
from imagemill.worker.transfer.s3_requests import S3Requests

AT_ONCE = 8
"""Images that are fetched at the same time."""
FILLED = 128
"""Mask levels from here on count as filled."""
JOB_IMAGES = {"reference": "reference", "background_image": "background", "control_image": "control image"}
"""Options with the URL of an image that all images of a job need, and what errors call it."""

Brought = Fetched | ImageError
Seen = dict[str, Any]


def look(settings: Settings, items: Sequence[Item], spec: Job) -> list[Seen]:
    """What each image is: source, ok, format, size (width, height), bytes, and what its mask or control image is.

    For one that a job could not use, `ok` is false, `error` is the error that the job would give it, and `errors` are all.
    """
    with closing(Network()) as network:
        fetcher = Fetcher(settings.fetch, settings.files, S3Requests(settings.s3, network), network)
        looker = Looker(fetcher.within(Readable.of(settings.s3, spec.output.url)), settings.worker.max_pixels, spec.options)
        return network.call(looker.look_at_all(items))


class Looker:
    """Fetches and decodes all that images need; errors become part of what is returned."""

    def __init__(self, fetcher: Fetcher, max_pixels: int, options: EngineOptions) -> None:
        self._fetcher, self._max_pixels, self._options = fetcher, max_pixels, options
        self._references = References(fetcher, max_pixels=max_pixels, attempts=1)
        self._turns, self._decoding = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(1)

    async def look_at_all(self, items: Sequence[Item]) -> list[Seen]:
        """What each image is."""
        return await asyncio.gather(*(self._look(item) for item in items))

    async def _look(self, item: Item) -> Seen:
        """One image. Room is given back in the loop's thread."""
        takes = self._options.columns
        async with self._turns:
            source = await self._brought(item.source)
            own = item.companion(mask="mask" in takes, control="control_image" in takes)
            companion = await self._references.bring_mask(own) if own is not None else None
            try:
                await self._references.bring(self._options)
                async with self._decoding:
                    return await asyncio.to_thread(self._seen, item, source, companion)
            finally:
                for file, room in ((source, self._fetcher.room), (companion, self._fetcher.mask_room)):
                    if isinstance(file, Fetched):
                        room.release(file.room)

    async def _brought(self, url: str) -> Brought:
        try:
            return await self._fetcher.fetch(url)
        except ImageError as error:
            return error

    def _seen(self, item: Item, source: Brought, companion: Brought | None) -> Seen:
        """What an image is, in the order in which a job would find what is wrong with it."""
        seen: Seen = {"source": item.source, "ok": True}
        errors: list[ImageError] = []
        picture: Picture | None = None

        def add(describe: Callable[[], Seen]) -> None:
            try:
                seen.update(describe())
            except ImageError as error:
                errors.append(error)

        def opened() -> Seen:
            nonlocal picture
            data = _bytes(source)
            header = codec.probe(data, max_pixels=self._max_pixels)
            picture = codec.decode(data, header)  # finds damage behind the header
            return {"format": header.format, "size": header.size, "bytes": len(data)}

        own = companion.data if isinstance(companion, Fetched) else companion
        add(opened)
        add(lambda: self._mask(item, own, source.data if isinstance(source, Fetched) else b"", picture))
        add(lambda: self._prompts(item, picture))
        add(lambda: self._control(item, own))
        add(lambda: self._job_images(item))
        if errors:
            said = [f"{error.code}: {error.message}" for error in errors]
            seen |= {"ok": False, "error": said[0], "errors": said}
        return seen

    def _mask(self, item: Item, own: bytes | ImageError | None, source: bytes, picture: Picture | None) -> Seen:
        options = self._options
        if not isinstance(options, InpaintOptions):
            return {}
        mask = self._references.mask_of(item, options, own, source)
        levels = None if mask is None else mask.levels
        if picture is not None:
            build_mask(picture.size, Inputs(item, options, levels))
        if mask is None or levels is None:
            return {}
        share = float((levels >= FILLED).mean())
        return {"mask": ", ".join([f"fills {share:.1%} of {levels.shape[1]}×{levels.shape[0]} pixels", *mask.notes])}

    def _prompts(self, item: Item, picture: Picture | None) -> Seen:
        if isinstance(self._options, RembgRemoveBackground) and self._options.columns and picture is not None:
            prompts_of(Inputs(item, self._options), picture.size)
        return {}

    def _control(self, item: Item, own: bytes | ImageError | None) -> Seen:
        control = self._references.control_of(item, own) if "control_image" in self._options.columns else None
        return {} if control is None else {"control_image": f"{control.shape[1]}×{control.shape[0]} pixels"}

    def _job_images(self, item: Item) -> Seen:
        for option, kind in JOB_IMAGES.items():
            url = getattr(self._options, option, None)
            if url is not None and (option != "control_image" or item.control_image is None):
                job_image(kind, url, self._references.picture)
        return {}


def _bytes(brought: Brought) -> bytes:
    if isinstance(brought, Fetched):
        return brought.data
    raise brought
