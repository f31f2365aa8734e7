"""Every error that imagemill raises on purpose, in one tree.

    ImagemillError
    ├── UsageError                   exit 2: what was asked for is wrong
    │   ├── InvalidOption
    │   ├── InvalidPreset
    │   ├── InvalidSource
    │   ├── JobNotFound
    │   └── MissingExtra
    ├── ConfigurationError           exit 2: how this process is set up is wrong
    ├── ServiceUnavailable           exit 3: something that we depend on does not answer
    │   └── BrokerUnavailable
    ├── DeviceLost                   the process ends: its GPU answers it with errors only
    └── ImageError                   one image fails, its neighbours do not
        ├── UnsupportedUrl  ForbiddenAddress  AccessDenied  NotFound  TooLarge  TooManyRedirects
        ├── Timeout  Unreachable  ServerError  HttpError          (fetch)
        ├── EmptyFile  NotAnImage  Truncated  TooManyPixels       (codec)
        ├── BadMask  BadReference  OperationFailed  OutOfMemory   (operation)
        ├── UnsafeContent
        ├── StorageUnavailable  StorageRefused                    (store)
        └── WorkerLost  InternalError                             (flow)

Each leaf has a stable `code`, which is part of the public interface, and says whether trying
again can help. Foreign exceptions are translated where they enter, with `raise ... from`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar


class ImagemillError(Exception):
    """Base of all; `message` is one sentence for a person."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)  # all of the state is in args, so pickling keeps it
        self.message = message


class UsageError(ImagemillError):
    """What was asked for can't be done as asked."""

    code = "usage"
    exit_code = 2


class InvalidOption(UsageError):
    """An option that does not exist, or a value outside its range."""

    code = "invalid_option"


class InvalidPreset(UsageError):
    """A preset that can't be read or used; the message begins with its file and line."""

    code = "invalid_preset"


class InvalidSource(UsageError):
    """A list that can't be read, or rows of it that aren't images' addresses.

    `rows` has the first bad ones, each with `place`, `reason` and `text` (imagemill.producer.sources.BadRow).
    """

    code = "invalid_source"

    def __init__(self, message: str, rows: Iterable[Any] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)  # in __dict__, which pickling keeps


class JobNotFound(UsageError):
    """No job of that name; it may have expired."""

    code = "job_not_found"


class MissingExtra(UsageError):
    """A part of imagemill that isn't installed; the message has the install command."""

    code = "missing_extra"


class ConfigurationError(ImagemillError):
    """This process is set up so that it can't work."""

    code = "configuration"
    exit_code = 2


class ServiceUnavailable(ImagemillError):
    """Something that imagemill depends on does not answer."""

    code = "service_unavailable"
    retryable = True
    exit_code = 3


class BrokerUnavailable(ServiceUnavailable):
    """Redis does not answer, refuses the password or is full."""

    code = "broker_unavailable"


class DeviceLost(ImagemillError):
    """The device is of no more use to this process, which must end; another one may work on it."""

    code = "device_lost"
    retryable = True


class ImageError(ImagemillError):
    """One image fails; its neighbours do not. `tries` says how often it was tried before this was raised."""

    code = "image_error"
    tries: int = 1


class UnsupportedUrl(ImageError):
    """A scheme other than http, https, s3 and file, or no host."""

    code = "unsupported_url"


class ForbiddenAddress(ImageError):
    """The address, or one it redirects to, lies where workers may not go."""

    code = "forbidden_address"


class AccessDenied(ImageError):
    """The server answered 401 or 403."""

    code = "access_denied"


class NotFound(ImageError):
    """The server answered 404 or 410, or the file or object isn't there."""

    code = "not_found"


class TooLarge(ImageError):
    """More bytes than the limit."""

    code = "too_large"


class TooManyRedirects(ImageError):
    """More redirects than the limit."""

    code = "too_many_redirects"


class Timeout(ImageError):
    """The server did not connect, or did not finish, in time."""

    code = "timeout"
    retryable = True


class Unreachable(ImageError):
    """No such host, connection refused or broken off, or TLS failed."""

    code = "unreachable"
    retryable = True


class ServerError(ImageError):
    """The server answered 5xx or 429; `retry_after` is how many seconds it asked to wait."""

    code = "server_error"
    retryable = True
    retry_after: float = 0.0


class HttpError(ImageError):
    """The server answered with another status that is no success."""

    code = "http_error"


class EmptyFile(ImageError):
    """Zero bytes."""

    code = "empty_file"


class NotAnImage(ImageError):
    """The bytes are of no image format that imagemill reads."""

    code = "not_an_image"


class Truncated(ImageError):
    """The image's data ends early or is damaged."""

    code = "truncated"


class TooManyPixels(ImageError):
    """More pixels than the limit; refused before they are decoded."""

    code = "too_many_pixels"


class BadMask(ImageError):
    """The mask is missing, unreadable, or does not fit its image."""

    code = "bad_mask"


class BadReference(ImageError):
    """The job's reference image can't be read."""

    code = "bad_reference"


class OperationFailed(ImageError):
    """The operation can't be done on this image."""

    code = "operation_failed"


class UnsafeContent(ImageError):
    """The safety checker that the operator has turned on refused the result."""

    code = "unsafe_content"


class OutOfMemory(ImageError):
    """The image does not fit into memory, even alone."""

    code = "out_of_memory"


class StorageUnavailable(ImageError):
    """The store did not take the result, after retries."""

    code = "storage_unavailable"
    retryable = True


class StorageRefused(ImageError):
    """The store says no: no such bucket, no permission, a folder that isn't allowed."""

    code = "storage_refused"


class WorkerLost(ImageError):
    """The worker process died each time it worked on this image."""

    code = "worker_lost"


class InternalError(ImageError):
    """A fault in imagemill; the worker's log has the traceback."""

    code = "internal_error"


def sentence(error: BaseException) -> str:
    """The first line of an error, for logs and for wrapping foreign errors into a message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
