"""All errors that imagemill raises deliberately.

    ImagemillError
    ├── UsageError                   exit 2: the request is wrong
    │   ├── InvalidOption
    │   ├── InvalidPreset
    │   ├── InvalidSource
    │   ├── JobNotFound
    │   └── MissingExtra
    ├── ConfigurationError           exit 2: the settings are wrong
    ├── ServiceUnavailable           exit 3: a service does not respond
    │   └── BrokerUnavailable
    ├── DeviceLost                   the process must end: its GPU only returns errors
    └── ImageError                   one image fails, the others do not
        ├── UnsupportedUrl  ForbiddenAddress  AccessDenied  NotFound  TooLarge  TooManyRedirects
        ├── Timeout  Unreachable  ServerError  HttpError          (fetch)
        ├── EmptyFile  NotAnImage  Truncated  TooManyPixels       (codec)
        ├── BadMask  BadReference  OperationFailed  OutOfMemory   (operation)
        ├── UnsafeContent
        ├── StorageUnavailable  StorageRefused                    (store)
        └── WorkerLost  InternalError                             (flow)

Each leaf has a `code`, which is public and stable, and `retryable`, whether a retry can help.
Exceptions of libraries are translated where they enter, with `raise ... from`. The first line of a class's docstring
says what its code means to a user, the rest what to do about it; the documentation prints both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar


class ImagemillError(Exception):
    """Base class; `message` is one sentence for a person."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)  # all of the state is in args, so pickling keeps it
        self.message = message


class UsageError(ImagemillError):
    """The request can't be carried out as given."""

    code = "usage"
    exit_code = 2


class InvalidOption(UsageError):
    """An option does not exist, or its value is out of range."""

    code = "invalid_option"


class InvalidPreset(UsageError):
    """A preset can't be read or used.

    The message starts with its file and line.
    """

    code = "invalid_preset"


class InvalidSource(UsageError):
    """The list of images can't be read, or some of its rows are not image URLs.

    Fix these rows, or skip them with --skip-invalid. `rows` holds the first bad ones (imagemill.producer.sources.BadRow).
    """

    code = "invalid_source"

    def __init__(self, message: str, rows: Iterable[Any] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)  # in __dict__, which pickling keeps


class JobNotFound(UsageError):
    """There is no job with this ID; it may have expired."""

    code = "job_not_found"


class MissingExtra(UsageError):
    """A part of imagemill is not installed.

    The message contains the install command.
    """

    code = "missing_extra"


class ConfigurationError(ImagemillError):
    """A setting is wrong or missing.

    The message names the variable.
    """

    code = "configuration"
    exit_code = 2


class ServiceUnavailable(ImagemillError):
    """A service that imagemill needs does not respond."""

    code = "service_unavailable"
    retryable = True
    exit_code = 3


class BrokerUnavailable(ServiceUnavailable):
    """Redis does not respond, rejects the password or is out of memory."""

    code = "broker_unavailable"


class DeviceLost(ImagemillError):
    """The GPU returns only errors to this process, which must end; a new process may be able to use it."""

    code = "device_lost"
    retryable = True


class ImageError(ImagemillError):
    """One image failed; the job's other images are not affected.

    `tries` is how often it was tried before.
    """

    code = "image_error"
    tries: int = 1


class UnsupportedUrl(ImageError):
    """The URL's scheme is not http, https, s3 or file, or it has no host."""

    code = "unsupported_url"


class ForbiddenAddress(ImageError):
    """Workers may not fetch from this URL or one it redirects to.

    Allow private hosts with IMAGEMILL_FETCH__ALLOW_HOSTS, and folders with IMAGEMILL_FILES__READ_ROOTS.
    """

    code = "forbidden_address"


class AccessDenied(ImageError):
    """The server denied access (status 401 or 403).

    Use a presigned link, or check the S3 keys.
    """

    code = "access_denied"


class NotFound(ImageError):
    """The image does not exist (status 404 or 410, or no such file or object)."""

    code = "not_found"


class TooLarge(ImageError):
    """The file is larger than IMAGEMILL_FETCH__MAX_BYTES."""

    code = "too_large"


class TooManyRedirects(ImageError):
    """The URL redirects more often than IMAGEMILL_FETCH__MAX_REDIRECTS."""

    code = "too_many_redirects"


class Timeout(ImageError):
    """The download did not start or finish in time."""

    code = "timeout"
    retryable = True


class Unreachable(ImageError):
    """The server can't be reached: unknown host, refused or lost connection, or a TLS error."""

    code = "unreachable"
    retryable = True


class ServerError(ImageError):
    """The server failed or is busy (status 5xx or 429).

    `retry_after` is how many seconds it asked to wait.
    """

    code = "server_error"
    retryable = True
    retry_after: float = 0.0


class HttpError(ImageError):
    """The server responded with an unexpected status."""

    code = "http_error"


class EmptyFile(ImageError):
    """The file is empty."""

    code = "empty_file"


class NotAnImage(ImageError):
    """The file is not in an image format that imagemill reads."""

    code = "not_an_image"


class Truncated(ImageError):
    """The image file is damaged or incomplete."""

    code = "truncated"


class TooManyPixels(ImageError):
    """The image has more pixels than IMAGEMILL_WORKER__MAX_PIXELS; it was not decoded."""

    code = "too_many_pixels"


class BadMask(ImageError):
    """The mask is missing or unreadable, or does not fit the image."""

    code = "bad_mask"


class BadReference(ImageError):
    """The reference image can't be read."""

    code = "bad_reference"


class OperationFailed(ImageError):
    """The operation can't process this image."""

    code = "operation_failed"


class UnsafeContent(ImageError):
    """The safety checker rejected the result.

    IMAGEMILL_DIFFUSION__SAFETY_CHECKER turns it on or off.
    """

    code = "unsafe_content"


class OutOfMemory(ImageError):
    """The image does not fit into memory, even in a batch of one."""

    code = "out_of_memory"


class StorageUnavailable(ImageError):
    """The result could not be stored, even after retries."""

    code = "storage_unavailable"
    retryable = True


class StorageRefused(ImageError):
    """The result may not be stored here: no such bucket, no permission, or a folder that is not allowed.

    Allow folders with IMAGEMILL_FILES__WRITE_ROOTS.
    """

    code = "storage_refused"


class WorkerLost(ImageError):
    """The worker process died every time it processed this image."""

    code = "worker_lost"


class InternalError(ImageError):
    """A bug in imagemill; the worker's log has the traceback."""

    code = "internal_error"


def sentence(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters, for logs and for the messages of our own errors."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
