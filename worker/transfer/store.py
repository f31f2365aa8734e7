"""Store results in an S3 bucket or a folder, under keys that are the same on every attempt."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, BinaryIO, Protocol
from urllib.parse import quote, urlsplit

from imagemill.shared.errors import NotFound, StorageFull, StorageRefused, StorageUnavailable, sentence
from imagemill.shared.keys import fill, item_name, of_part
from imagemill.shared.messages import Item
from imagemill.shared.s3 import MISSING, S3Client, ensure_bucket, split, storing
from imagemill.shared.settings import FileSettings, S3Settings
from imagemill.shared.urls import check_output_url, path_of
from imagemill.worker.transfer.files import is_below, open_at_once, replacing
from imagemill.worker.transfer.multipart import PART, Upload, content_md5
from imagemill.worker.transfer.s3_requests import PLAIN, S3Requests

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Errors that an operator has to fix by changing the folder or its permissions; others, such as a full disk, may pass.
REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
}

BLOCK = 1 << 20
SILENCE_SECONDS = 10.0
"""Seconds before an unresponsive server is asked again whether it has a bucket."""
CHANGED = {"PreconditionFailed", "412"}


class Store(Protocol):
    """Stores results; coroutines run in the network's loop. Storing under an existing key replaces its content.

    `service` names what has to respond: it is the same for stores that fail together.
    """

    service: str

    async def check(self) -> None:
        """Raise StorageRefused if nothing can be stored here, as far as can be determined in advance."""

    async def put(self, key: str, data: bytes, content_type: str, *, md5: str = "") -> str:
        """Write bytes below the output URL and return their full URL once they are stored durably.

        `md5`, in hex, saves computing it.

        Raises StorageUnavailable if the store does not respond, StorageFull, or StorageRefused, which a retry can't help.
        """

    def put_stream(self, key: str, lines: Iterable[bytes], content_type: str) -> str:
        """Like `check` and `put`, in the caller's thread, for content that need not fit into memory (at most 80 GB on S3).

        If `lines` raises, nothing is stored, and the exception passes.
        """

    async def copy(self, source: str, key: str, content_type: str, *, md5: str) -> str:
        """Copy an earlier result, from a URL that `put` returned in this or another job, below this output URL.

        Raises NotFound if `source` is out of this store's reach or doesn't have that MD5 (in hex); otherwise raises as `put`.
        After an error the key may hold its previous content, nothing or other bytes, until `put` replaces them.
        """


def open_store(url: str, *, s3: S3Requests, files: FileSettings, s3_settings: S3Settings) -> Store:
    """Open the store at `s3://bucket/prefix` or `file:///folder`.

    Raises StorageRefused for any other URL, and ConfigurationError for settings that boto3 can't use.
    """
    try:
        check_output_url(url)
    except ValueError as error:
        raise StorageRefused(f"can't store results at {url!r}: {error}") from error
    if urlsplit(url).scheme == "s3":
        return S3Store(url, s3, s3_settings)
    return FolderStore(url, files)


def render_key(template: str, *, job: str, item: Item, extension: str) -> str:
    """The key of an item's result: the output's template with its fields filled in, plus the extension (without dot).

    The item's own key, if it has one, is the template with the submitter's fields filled in already.
    """
    own: dict[str, str | int] = {"job": job, "index": item.index, "item": item.id, "name": item_name(item.name, item.source)}
    key = fill(template if item.key is None else item.key, own)
    return f"{of_part(key, item.part)}.{extension.lstrip('.')}"


class S3Store:
    """A prefix in a bucket. Each object is sent with its MD5, which the server verifies."""

    def __init__(self, url: str, s3: S3Requests, settings: S3Settings) -> None:
        self._bucket, self._prefix = split(url.rstrip("/"))
        self.service = f"s3://{self._bucket}"
        self._s3, self._client = s3, s3.client()
        self._settings = settings
        self._checking = asyncio.Lock()
        self._checked, self._refusal, self._ask_at = False, "", 0.0

    async def check(self) -> None:
        """See Store. Asks the server once and, if the operator allows it, creates the bucket."""
        async with self._checking:  # or else a server's silence would hold up one thread after the other
            if not self._checked and time.monotonic() >= self._ask_at:
                await self._s3.in_thread(self._ask)
        if self._refusal:
            raise StorageRefused(self._refusal)

    def _ask(self, client: S3Client) -> None:
        try:
            ensure_bucket(client, self._bucket, self._settings.create_bucket, self._settings.region)
            self._checked = True
        except StorageRefused as error:
            self._checked, self._refusal = True, error.message
        except StorageUnavailable:  # may be back when the first result is ready; `put` retries
            self._ask_at = time.monotonic() + SILENCE_SECONDS

    async def put(self, key: str, data: bytes, content_type: str, *, md5: str = "") -> str:
        """See Store."""
        full_key, url = self._place(key)
        checksum = base64.b64encode(bytes.fromhex(md5)).decode() if md5 else await asyncio.to_thread(content_md5, data)
        headers = {"Content-Type": content_type, "Content-MD5": checksum}
        if await self._s3.put(self._bucket, full_key, data, headers) is None:
            await self._s3.in_thread(lambda _: self._put(full_key, data, content_type, checksum))
        return url

    def put_stream(self, key: str, lines: Iterable[bytes], content_type: str) -> str:
        """See Store. What takes more than one part is uploaded part by part."""
        if not self._checked:
            self._ask(self._client)
        if self._refusal:
            raise StorageRefused(self._refusal)
        full_key, url = self._place(key)
        parts = _parts(lines)
        first = next(parts, b"")
        if len(first) < PART:
            self._put(full_key, first, content_type, content_md5(first))
            return url
        with Upload(self._client, self._bucket, full_key, url, content_type) as upload:
            for part in chain((first,), parts):
                upload.add(part)
        return url

    def _put(self, full_key: str, data: bytes, content_type: str, checksum: str) -> None:
        with storing(f"s3://{self._bucket}/{full_key}"):
            self._client.put_object(Bucket=self._bucket, Key=full_key, Body=data, ContentType=content_type, ContentMD5=checksum)

    async def copy(self, source: str, key: str, content_type: str, *, md5: str) -> str:
        """See Store. The server copies, within the bucket or from another that the worker's keys may read.

        With KMS encryption an ETag is not an MD5, so nothing can be copied.
        """
        if urlsplit(source).scheme != "s3":
            raise NotFound(f"{source} is not in S3")
        full_key, url = self._place(key)
        headers = {
            "Content-Type": content_type,
            "x-amz-copy-source": quote(source.partition("://")[2], PLAIN),
            "x-amz-copy-source-if-match": f'"{md5}"',
            "x-amz-metadata-directive": "REPLACE",  # also required for copying an object onto itself
        }
        answer = await self._s3.put(self._bucket, full_key, b"", headers)
        if answer is None or b"<CopyObjectResult" not in answer or md5.encode() not in answer:
            await self._s3.in_thread(lambda _: self._copy(source, full_key, content_type, md5))
        return url

    def _copy(self, source: str, full_key: str, content_type: str, md5: str) -> None:
        from botocore.exceptions import ClientError

        bucket, source_key = split(source)
        with storing(f"s3://{self._bucket}/{full_key}"):
            try:
                copied = self._client.copy_object(
                    Bucket=self._bucket,
                    Key=full_key,
                    CopySource={"Bucket": bucket, "Key": source_key},
                    CopySourceIfMatch=f'"{md5}"',
                    MetadataDirective="REPLACE",
                    ContentType=content_type,
                )
            except ClientError as error:
                if error.response["Error"]["Code"] in MISSING | CHANGED:
                    raise NotFound(f"{source} was deleted or has changed") from error
                raise
        if copied["CopyObjectResult"]["ETag"].strip('"') != md5:  # changed between the server's check and its copy
            raise NotFound(f"{source} has changed")

    def _place(self, key: str) -> tuple[str, str]:
        """The full key and its URL."""
        full_key = f"{self._prefix}/{key}" if self._prefix else key
        return full_key, f"s3://{self._bucket}/{full_key}"


class FolderStore:
    """A folder below one of the operator's write roots. Files are written atomically."""

    def __init__(self, url: str, files: FileSettings) -> None:
        self.service, self._folder = url, path_of(url)
        self._roots = files.write_roots

    async def check(self) -> None:
        """See Store."""
        await asyncio.to_thread(self.check_now)

    def check_now(self) -> None:
        """The same in the caller's thread."""
        with _folder_errors(f"can't store results in {self._folder}"):
            if _is_full(self._check(self._folder)):  # before anything is computed for nothing
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def put(self, key: str, data: bytes, content_type: str, *, md5: str = "") -> str:  # noqa: ARG002  # files have none
        """See Store."""
        return await asyncio.to_thread(self._write, key, lambda file: file.write(data))

    def put_stream(self, key: str, lines: Iterable[bytes], content_type: str) -> str:  # noqa: ARG002
        """See Store."""
        self.check_now()
        return self._write(key, lambda file: file.writelines(lines))

    async def copy(self, source: str, key: str, content_type: str, *, md5: str) -> str:  # noqa: ARG002
        """See Store. Both files must be below the write roots."""
        return await asyncio.to_thread(self._copy, source, key, md5)

    def _copy(self, source: str, key: str, md5: str) -> str:
        with self._open(source) as file:
            return self._write(key, lambda target: _copy_checked(file, target, md5, source))

    def _open(self, source: str) -> BinaryIO:
        """Open an earlier result. Raises NotFound."""
        try:
            if urlsplit(source).scheme != "file":
                raise NotFound(f"{source} is not in a folder")
            path = path_of(source).resolve(strict=True)
            if not is_below(path, self._roots):
                raise NotFound(f"{source} is not in a folder allowed by IMAGEMILL_FILES__WRITE_ROOTS")
            return open(path, "rb", opener=open_at_once)
        except (OSError, ValueError, RuntimeError) as error:
            raise NotFound(f"{source} can't be read: {sentence(error)}") from error

    def _write(self, key: str, fill: Callable[[IO[bytes]], object]) -> str:
        target = self._folder / key
        with _folder_errors(f"{target} can't be written"):
            folder = self._check(target.parent)  # with links resolved, before creating anything
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / target.name) as part, part.open("wb") as file:
                fill(file)
        return target.as_uri()

    def _check(self, folder: Path) -> Path:
        real = folder.resolve()
        if not is_below(real, self._roots):
            raise StorageRefused(f"{folder} is not in a folder allowed by IMAGEMILL_FILES__WRITE_ROOTS")
        return real


def _is_full(folder: Path) -> bool:
    """Whether no block is left where this folder is or will be created."""
    disk = os.statvfs(next(parent for parent in (folder, *folder.parents) if parent.exists()))
    return disk.f_blocks > 0 and (disk.f_bfree if os.geteuid() == 0 else disk.f_bavail) == 0


def _parts(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in parts of `PART` bytes or slightly more; the last may be smaller."""
    part = bytearray()
    for line in lines:
        part += line
        if len(part) >= PART:
            yield bytes(part)
            part.clear()
    if part:
        yield bytes(part)


def _copy_checked(source: BinaryIO, target: IO[bytes], md5: str, name: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    while block := source.read(BLOCK):
        digest.update(block)
        target.write(block)
    if digest.hexdigest() != md5:
        raise NotFound(f"{name} has changed")


@contextmanager
def _folder_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a zero byte; RuntimeError: symlink loop
        number = error.errno if isinstance(error, OSError) else errno.EINVAL
        reason = (error.strerror if isinstance(error, OSError) else None) or sentence(error)
        kind = StorageRefused if number in REFUSALS else StorageFull if number in FULL else StorageUnavailable
        raise kind(f"{what}: {reason[:1].lower()}{reason[1:]}") from error
