"""All errors that imagemill raises deliberately.

    ImagemillError
    ├── UsageError                   exit 2: the request is wrong
    │   ├── InvalidOption
    │   ├── InvalidPreset
    │   ├── InvalidSource
    │   ├── JobNotFound
    │   ├── JobUnreadable
    │   │   └── JobNewer
    │   ├── MissingExtra
    │   └── NameTaken
    ├── ConfigurationError           exit 2: the settings are wrong
    ├── ServiceUnavailable           exit 3: a service does not respond
    │   └── BrokerUnavailable
    ├── DeviceLost                   the process must end: its GPU only returns errors
    └── ImageError                   one image fails, the others do not
        ├── UnsupportedUrl  ForbiddenAddress  AccessDenied  NotFound  TooLarge  TooManyRedirects
        ├── Timeout  Unreachable  ServerError  HttpError          (fetch)
        ├── EmptyFile  NotAnImage  UnsupportedFormat  Truncated  TooManyPixels  TooCostly  (codec)
        ├── BadMask  BadReference  OperationFailed  OutOfMemory   (operation)
        ├── UnsafeContent  ModelUnavailable
        ├── StorageUnavailable  StorageFull  StorageRefused       (store)
        └── WorkerLost  Expired  RecordDamaged  InternalError     (flow)

Each leaf has a `code`, which is public and stable, and `retryable`, whether a retry can help.
Exceptions of libraries are translated where they enter, with `raise ... from`. The first line of a class's docstring
explains its code to users, the rest what to do about it; the documentation prints both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar


class ImagemillError(Exception):
    """Base class; `message` is one sentence for a person."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init_subclass__(cls, *, code: str, retryable: bool = False) -> None:
        cls.code = code
        cls.retryable = retryable or cls.retryable  # a parent's applies to its children

    def __init__(self, message: str) -> None:
        message = message.encode(errors="backslashreplace").decode()  # it may quote a file name that is not text
        super().__init__(message)  # all of the state is in args, so pickling keeps it
        self.message = message


class UsageError(ImagemillError, code="usage"):
    """The request can't be carried out as given."""

    exit_code = 2


class InvalidOption(UsageError, code="invalid_option"):
    """An option does not exist, or its value is out of range."""


class InvalidPreset(UsageError, code="invalid_preset"):
    """A preset can't be read or used.

    The message starts with its file and line.
    """


class InvalidSource(UsageError, code="invalid_source"):
    """The list of images can't be read, or some of its rows are not image URLs.

    Fix these rows, or skip them with --skip-invalid. `rows` holds the first bad ones (imagemill.producer.sources.BadRow), and
    `warnings` what else there is to say about the list, such as columns whose names look like typos.
    """

    def __init__(self, message: str, rows: Iterable[Any] = (), warnings: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.rows, self.warnings = tuple(rows), tuple(warnings)  # in __dict__, which pickling keeps


class JobNotFound(UsageError, code="job_not_found"):
    """There is no job with this ID; it may have expired."""


class JobUnreadable(UsageError, code="job_unreadable"):
    """The job's record in Redis is damaged, or was written by a newer version of imagemill.

    `imagemill jobs --dead` shows what was damaged. For a newer version, update this installation.
    """


class JobNewer(JobUnreadable, code="job_newer"):
    """A newer version of imagemill submitted the job.

    Update this installation.
    """


class MissingExtra(UsageError, code="missing_extra"):
    """A part of imagemill is not installed.

    The message contains the install command.
    """


class NameTaken(UsageError, code="name_taken"):
    """Another job has this name, with a different list or different options.

    Reuse a name only with the same list and options, to continue a submission that broke off.
    """


class ConfigurationError(ImagemillError, code="configuration"):
    """A setting is wrong or missing.

    The message names the variable.
    """

    exit_code = 2


class ServiceUnavailable(ImagemillError, code="service_unavailable", retryable=True):
    """A service that imagemill needs does not respond."""

    exit_code = 3


class BrokerUnavailable(ServiceUnavailable, code="broker_unavailable"):
    """Redis does not respond, rejects the password or is out of memory."""


class DeviceLost(ImagemillError, code="device_lost", retryable=True):
    """The GPU returns only errors to this process, which must end; a new process may be able to use it."""


class ImageError(ImagemillError, code="image_error"):
    """One image failed; the job's other images are not affected.

    `tries` is how many times the failed step was tried.
    """

    tries: int = 1


class UnsupportedUrl(ImageError, code="unsupported_url"):
    """The URL's scheme is not http, https, s3 or file, or it has no host."""


class ForbiddenAddress(ImageError, code="forbidden_address"):
    """Workers may not fetch from this URL or one it redirects to.

    Allow private hosts with IMAGEMILL_FETCH__ALLOW_HOSTS, folders with IMAGEMILL_FILES__READ_ROOTS, and buckets other than the
    output's with IMAGEMILL_S3__READ_BUCKETS.
    """


class AccessDenied(ImageError, code="access_denied"):
    """The server denied access (status 401 or 403).

    Use a presigned link, or check the S3 keys.
    """


class NotFound(ImageError, code="not_found"):
    """The image does not exist (status 404 or 410, or no such file or object)."""


class TooLarge(ImageError, code="too_large"):
    """The file is larger than IMAGEMILL_FETCH__MAX_BYTES."""


class TooManyRedirects(ImageError, code="too_many_redirects"):
    """The URL redirects more often than IMAGEMILL_FETCH__MAX_REDIRECTS."""


class Timeout(ImageError, code="timeout", retryable=True):
    """The download did not start or finish in time."""


class Unreachable(ImageError, code="unreachable", retryable=True):
    """The server can't be reached: unknown host, refused or lost connection, or a TLS error."""


class ServerError(ImageError, code="server_error", retryable=True):
    """The server failed or is busy (status 5xx or 429).

    `retry_after` is how many seconds it asked to wait.
    """

    retry_after: float = 0.0


class HttpError(ImageError, code="http_error"):
    """The server responded with an unexpected status."""


class EmptyFile(ImageError, code="empty_file"):
    """The file is empty."""


class NotAnImage(ImageError, code="not_an_image"):
    """The file is not in an image format that imagemill reads."""


class UnsupportedFormat(ImageError, code="unsupported_format"):
    """The file is an image whose layout or colours imagemill doesn't read, such as HDR or floating-point samples.

    The message says what it is. The documentation lists what is read.
    """


class Truncated(ImageError, code="truncated"):
    """The image file is damaged or incomplete."""


class TooManyPixels(ImageError, code="too_many_pixels"):
    """The image has more pixels than IMAGEMILL_WORKER__MAX_PIXELS; it was not decoded."""


class TooCostly(ImageError, code="too_costly"):
    """Reading the file would take far more time or memory than its pixels warrant; most files like this are made to do harm.

    If yours is genuine, save it again as an ordinary PNG or JPEG.
    """


class BadMask(ImageError, code="bad_mask"):
    """The mask is missing or unreadable, or the mask, a box or a point does not fit the image."""


class BadReference(ImageError, code="bad_reference"):
    """The reference image can't be read."""


class OperationFailed(ImageError, code="operation_failed"):
    """The operation can't process this image."""


class UnsafeContent(ImageError, code="unsafe_content"):
    """The safety checker rejected the result.

    IMAGEMILL_DIFFUSION__SAFETY_CHECKER turns it on or off.
    """


class ModelUnavailable(ImageError, code="model_unavailable", retryable=True):
    """The worker can't use a model that the job asks for: it is missing, damaged or not for this device.

    No image fails because of it: the node takes no more work that needs the model until its files change, and the images go to
    other nodes or wait. `imagemill fleet` says why.
    """

    passing = False
    """Whether it may work later with the same files, because memory was short."""
    part = ""
    """The LoRA, ControlNet or VAE that can't be used, if it is not the job's `model` itself."""
    misfit = False
    """Whether that part may be sound, and only can't be used with this model."""

    @classmethod
    def of_part(cls, part: str, message: str, *, misfit: bool = False, passing: bool = False) -> ModelUnavailable:
        """The error for a LoRA, ControlNet or VAE."""
        error = cls(message)
        error.part, error.misfit, error.passing = part, misfit, passing
        return error


class OutOfMemory(ImageError, code="out_of_memory"):
    """The image does not fit into memory, even in a batch of one."""


class StorageUnavailable(ImageError, code="storage_unavailable", retryable=True):
    """The store did not respond for an hour.

    Shorter outages only delay the images.
    """


class StorageFull(ImageError, code="storage_full", retryable=True):
    """There is no space left in the output folder.

    Make room, then run `imagemill retry`.
    """


class StorageRefused(ImageError, code="storage_refused"):
    """The store refuses the result: no such bucket, no permission, or a folder that is not allowed.

    Allow folders with IMAGEMILL_FILES__WRITE_ROOTS.
    """


class WorkerLost(ImageError, code="worker_lost"):
    """The worker process died every time it processed this image."""


class Expired(ImageError, code="expired", retryable=True):
    """The job's deadline passed before this image began."""


class RecordDamaged(ImageError, code="record_damaged"):
    """The job's record in Redis was damaged, so this image could not be processed.

    `imagemill jobs --dead` shows what was damaged. Submit the image again.
    """


class InternalError(ImageError, code="internal_error"):
    """A bug in imagemill; the worker's log has the traceback."""


def sentence(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters, for logs and for the messages of our own errors."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def leaves(kind: type[ImagemillError]) -> Iterator[type[ImagemillError]]:
    """The errors below a kind that are raised."""
    below = [child for child in kind.__subclasses__() if child.__module__ == __name__]
    if not below:
        yield kind
    for child in below:
        yield from leaves(child)
