"""Store results in an S3 bucket or a folder, under keys that are the same on every attempt."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol
from urllib.parse import urlsplit

from imagemill.shared.errors import NotFound, StorageFull, StorageRefused, StorageUnavailable, sentence
from imagemill.shared.messages import KEY_FIELD, Item
from imagemill.shared.s3 import IMAGE_EXTENSIONS, MISSING, S3Client, ensure_bucket, split, storing
from imagemill.shared.settings import FileSettings, S3Settings
from imagemill.shared.urls import check_output_url, path_of, safe_name
from imagemill.worker.transfer.files import is_below, open_at_once, writing

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Errors that an operator has to fix by changing the folder or its permissions; others, such as a full disk, may pass.
REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
}

BLOCK = 1 << 20
SILENCE_SECONDS = 10.0
"""How long a server that did not respond is not asked again whether it has a bucket."""
CHANGED = {"PreconditionFailed", "412"}


class Store(Protocol):
    """Stores results; thread-safe. Storing under an existing key replaces its content.

    `service` names what has to respond: it is the same for stores that fail together.
    """

    service: str

    def check(self) -> None:
        """Raise StorageRefused if nothing can be stored here, as far as can be determined in advance."""

    def put(self, key: str, data: bytes, content_type: str) -> str:
        """Write bytes below the output URL and return their full URL once they are stored durably.

        Raises StorageUnavailable if the store does not respond, StorageFull, or StorageRefused, which a retry can't help.
        """

    def put_file(self, key: str, path: Path, content_type: str) -> str:
        """Like `put` for a file's content, which need not fit into memory (at most 5 GB on S3)."""

    def copy(self, source: str, key: str, content_type: str, *, md5: str) -> str:
        """Copy an earlier result, from a URL that `put` returned in this or another job, below this output URL.

        Raises NotFound if `source` is out of this store's reach or doesn't have that MD5 (in hex); otherwise raises as `put`.
        After an error the key may hold its previous content, nothing or other bytes, until `put` replaces them.
        """


def open_store(url: str, *, s3: Callable[[], S3Client], files: FileSettings, s3_settings: S3Settings) -> Store:
    """Open the store at `s3://bucket/prefix` or `file:///folder`; `s3` returns the process's client.

    Raises StorageRefused for any other URL.
    """
    try:
        check_output_url(url)
    except ValueError as error:
        raise StorageRefused(f"can't store results at {url!r}: {error}") from error
    if urlsplit(url).scheme == "s3":
        return S3Store(url, s3(), s3_settings)
    return FolderStore(url, files)


def render_key(template: str, *, job: str, item: Item, extension: str) -> str:
    """The key of an item's result: the output's template with its fields filled in, plus the extension (without dot).

    `{name}` is the item's or the source's name, sanitised so that a key never leaves its prefix.
    """
    fields: dict[str, str | int] = {"job": job, "index": item.index, "item": item.id, "name": _name(item)}

    def fill(match: Any) -> str:
        value, width = fields[match[1]], match[2]
        return f"{value:0{width}d}" if width and isinstance(value, int) else str(value)

    return f"{KEY_FIELD.sub(fill, template)}.{extension.lstrip('.')}"


def _name(item: Item) -> str:
    if item.name is None:
        return safe_name(item.source)
    has_extension = Path(item.name).suffix.lower() in IMAGE_EXTENSIONS
    return safe_name(item.name if has_extension else f"{item.name}.")  # `v1.5` is a name without extension


class S3Store:
    """A prefix in a bucket. Each object is sent with its MD5, which the server verifies."""

    def __init__(self, url: str, client: S3Client, settings: S3Settings) -> None:
        self._bucket, self._prefix = split(url.rstrip("/"))
        self.service = f"s3://{self._bucket}"
        self._client = client
        self._settings = settings
        self._checking = threading.Lock()
        self._ask_at = 0.0

    def check(self) -> None:
        """See Store. Asks the server once and, if the operator allows it, creates the bucket."""
        with self._checking:
            if time.monotonic() < self._ask_at:  # or else a server's silence would hold up one thread after the other
                return
            try:
                refusal = self._refusal
            except StorageUnavailable:  # may be back when the first result is ready; `put` retries
                self._ask_at = time.monotonic() + SILENCE_SECONDS
                return
        if refusal is not None:
            raise StorageRefused(refusal)

    @cached_property
    def _refusal(self) -> str | None:
        """Why the bucket can't be used. Raises StorageUnavailable, and asks again next time, if the server can't be reached."""
        try:
            ensure_bucket(self._client, self._bucket, self._settings.create_bucket, self._settings.region)
        except StorageRefused as error:
            return error.message
        return None

    def put(self, key: str, data: bytes, content_type: str) -> str:
        """See Store."""
        return self._put(key, data, hashlib.md5(data, usedforsecurity=False).digest(), content_type)

    def put_file(self, key: str, path: Path, content_type: str) -> str:
        """See Store."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()
            file.seek(0)
            return self._put(key, file, digest, content_type)

    def copy(self, source: str, key: str, content_type: str, *, md5: str) -> str:
        """See Store. The server copies, within the bucket or from another that the worker's keys may read.

        With KMS encryption an ETag is not an MD5, so nothing can be copied.
        """
        from botocore.exceptions import ClientError

        if urlsplit(source).scheme != "s3":
            raise NotFound(f"{source} is not in S3")
        bucket, source_key = split(source)
        full_key, url = self._place(key)
        with storing(url):
            try:
                copied = self._client.copy_object(
                    Bucket=self._bucket,
                    Key=full_key,
                    CopySource={"Bucket": bucket, "Key": source_key},
                    CopySourceIfMatch=f'"{md5}"',
                    MetadataDirective="REPLACE",  # also required for copying an object onto itself
                    ContentType=content_type,
                )
            except ClientError as error:
                if error.response["Error"]["Code"] in MISSING | CHANGED:
                    raise NotFound(f"{source} was deleted or has changed") from error
                raise
        if copied["CopyObjectResult"]["ETag"].strip('"') != md5:  # changed between the server's check and its copy
            raise NotFound(f"{source} has changed")
        return url

    def _place(self, key: str) -> tuple[str, str]:
        """The full key and its URL."""
        full_key = f"{self._prefix}/{key}" if self._prefix else key
        return full_key, f"s3://{self._bucket}/{full_key}"

    def _put(self, key: str, body: bytes | IO[bytes], digest: bytes, content_type: str) -> str:
        full_key, url = self._place(key)
        md5 = base64.b64encode(digest).decode()

        with storing(url):
            self._client.put_object(Bucket=self._bucket, Key=full_key, Body=body, ContentType=content_type, ContentMD5=md5)
        return url


class FolderStore:
    """A folder below one of the operator's write roots. Files are written atomically."""

    def __init__(self, url: str, files: FileSettings) -> None:
        self.service, self._folder = url, path_of(url)
        self._roots = files.write_roots

    def check(self) -> None:
        """See Store."""
        with _folder_errors(f"can't store results in {self._folder}"):
            if _is_full(self._check(self._folder)):  # before anything is computed in vain
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def put(self, key: str, data: bytes, content_type: str) -> str:  # noqa: ARG002  # files have none
        """See Store."""
        return self._write(key, lambda file: file.write(data))

    def put_file(self, key: str, path: Path, content_type: str) -> str:  # noqa: ARG002
        """See Store."""
        with path.open("rb") as source:
            return self._write(key, lambda file: shutil.copyfileobj(source, file, BLOCK))

    def copy(self, source: str, key: str, content_type: str, *, md5: str) -> str:  # noqa: ARG002
        """See Store. Both files must be below the write roots."""
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
            with writing(folder / target.name) as file:
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
