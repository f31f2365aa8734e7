"""Read images from S3, within the limits of downloads."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass

import pycurl

from imagemill.shared import errors
from imagemill.shared.s3 import S3Client, split, translate
from imagemill.shared.settings import FetchSettings, S3Settings
from imagemill.worker.transfer.addresses import Target
from imagemill.worker.transfer.byte_budget import Claim, NoRoom
from imagemill.worker.transfer.download import Transfer
from imagemill.worker.transfer.encoding import unpacked
from imagemill.worker.transfer.s3_requests import S3Requests

BLOCK = 1 << 20


@dataclass(frozen=True)
class Readable:
    """The objects that a list may name: whole buckets, folders as `bucket/prefix`, or `*` for everything.

    Workers read them with their own keys, which may reach much more than those who submit lists should.
    """

    places: tuple[str, ...]

    @classmethod
    def of(cls, settings: S3Settings, output: str) -> Readable:
        """What the operator has listed, or else the bucket that the job's results go to."""
        own = split(output)[:1] if output.startswith("s3://") else ()
        return cls(tuple(place.removeprefix("s3://").rstrip("/") for place in settings.read_buckets) or own)

    def includes(self, bucket: str, key: str) -> bool:
        """Whether a list may name this object."""
        if not {"*", bucket}.isdisjoint(self.places):
            return True
        name = f"{bucket}/{key}"
        return ".." not in key.split("/") and any(name.startswith(f"{place}/") for place in self.places)


ANYWHERE = Readable(("*",))


async def read_object(s3: S3Requests, bucket: str, key: str, label: str, settings: FetchSettings, claim: Claim) -> bytes:
    """The bytes of an object; `label` names it in errors.

    Raises NotFound, AccessDenied, TooLarge and the other ImageErrors of downloads, and NoRoom if the claim can't cover it.
    """
    transfer = Transfer(Target(label, bucket, 0), settings, claim)

    def prepare(handle: pycurl.Curl) -> None:
        handle.setopt(pycurl.HEADERFUNCTION, transfer.lines.append)
        handle.setopt(pycurl.WRITEFUNCTION, transfer.on_body)
        handle.setopt(pycurl.MAXFILESIZE_LARGE, settings.max_bytes)
        handle.setopt(pycurl.TIMEOUT_MS, max(1, int(settings.total_timeout * 1000)))

    deadline = time.monotonic() + settings.total_timeout
    try:
        if await s3.get(bucket, key, prepare) == 200:
            return await unpacked(transfer.body, transfer.encoding, label, settings.max_bytes, claim)
    except pycurl.error as error:
        if claim.lacks:
            raise NoRoom from error
        explained = transfer.explain(error, label)
        if isinstance(explained, errors.TooLarge) or time.monotonic() >= deadline:
            raise explained from error
    transfer.blocks.clear()
    body, encoding = await s3.in_thread(lambda client: _read(client, bucket, key, label, settings, claim))
    return await unpacked(body, encoding, label, settings.max_bytes, claim)


def _read(client: S3Client, bucket: str, key: str, label: str, settings: FetchSettings, claim: Claim) -> tuple[bytes, str]:
    """The object as it is stored, and its Content-Encoding."""
    from botocore.exceptions import BotoCoreError, ClientError

    limit, deadline = settings.max_bytes, time.monotonic() + settings.total_timeout
    blocks, size = list[bytes](), 0
    try:
        reply = client.get_object(Bucket=bucket, Key=key)
        with closing(reply["Body"]) as body:
            announced = reply.get("ContentLength", 0)
            if announced > limit:
                raise errors.TooLarge(f"{label} has {announced} bytes; the limit is {limit}")
            if not claim.covers(announced, announced=True):
                raise NoRoom
            while block := body.read(BLOCK):
                blocks.append(block)
                size += len(block)
                if size > limit:
                    raise errors.TooLarge(f"{label} exceeds the limit of {limit} bytes")
                if not claim.covers(size):
                    raise NoRoom
                if time.monotonic() > deadline:
                    raise errors.Timeout(f"{label} timed out after {settings.total_timeout:g} s")
    except (BotoCoreError, ClientError) as error:
        raise translate(error, label) from error
    return b"".join(blocks), reply.get("ContentEncoding", "")
