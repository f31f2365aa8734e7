"""S3 through boto3: clients, links, buckets, listings, and what botocore's errors mean.

boto3 takes half a second to import, so it is imported where it is needed and not by every command.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from imagemill.shared.errors import (
    AccessDenied,
    ConfigurationError,
    HttpError,
    ImageError,
    InvalidOption,
    InvalidSource,
    NotFound,
    ServerError,
    ServiceUnavailable,
    StorageRefused,
    StorageUnavailable,
    Timeout,
    Unreachable,
    UnsupportedUrl,
    sentence,
)
from imagemill.shared.settings import S3Settings

S3Client = Any
"""A boto3 S3 client; boto3 makes the class at run time. Thread-safe, but not to be shared across a fork."""

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
LONGEST_LINK = 7 * 24 * 3600
"""Seconds; the limit of signature version 4."""

MISSING = frozenset({"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "NotFound", "404"})
DENIED = frozenset(
    {
        "AccessDenied",
        "AllAccessDisabled",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "401",
        "403",
    }
)
# BadDigest: the bytes were damaged on their way, so sending them again helps.
BUSY = frozenset(
    {"SlowDown", "BadDigest", "InternalError", "ServiceUnavailable", "OperationAborted", "429", "500", "502", "503", "504"}
)
# MalformedXML: a server that takes the rules for another request, as Swift does.
NO_LIFECYCLE = frozenset({"NotImplemented", "MethodNotAllowed", "MalformedXML"})
SLOW = frozenset({"RequestTimeout", "408"})


def make_client(settings: S3Settings) -> S3Client:
    """A client with a session of its own: one per process, made after the fork.

    Raises ConfigurationError for an address, region or profile that boto3 can't use.
    """
    return _client(settings, settings.endpoint_url)


def lazy_client(settings: S3Settings) -> Callable[[], S3Client]:
    """A function that gives the process's one client and makes it at its first call; thread-safe."""
    lock = threading.Lock()
    made: list[S3Client] = []

    def client() -> S3Client:
        with lock:
            if not made:
                made.append(make_client(settings))
            return made[0]

    return client


def make_signer(settings: S3Settings) -> S3Client:
    """A client for `presign` only: links carry the address under which browsers reach the server."""
    return _client(settings, settings.public_url or settings.endpoint_url)


def _client(settings: S3Settings, endpoint: str | None) -> S3Client:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=5,
        read_timeout=30,
        retries={"total_max_attempts": 4, "mode": "standard"},
        max_pool_connections=settings.connections,
        # Unset, boto3 signs links for old regions with version 2, which newer servers refuse.
        signature_version="s3v4",
        # The checksums that boto3 adds by default are unknown to older MinIO; we send Content-MD5.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # MinIO and its like have no DNS name per bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    try:
        return boto3.Session().client("s3", endpoint_url=endpoint, region_name=settings.region, config=config)
    except (BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no address
        raise ConfigurationError(f"S3 at {endpoint or 'AWS'}: {sentence(error)}") from error


def split(url: str) -> tuple[str, str]:
    """(bucket, key) of `s3://bucket/key`. A key may contain ? and # and is not percent-encoded."""
    scheme, mark, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme.lower() != "s3" or not mark or not bucket:
        raise UnsupportedUrl(f"{url!r} is no s3://bucket/key")
    return bucket, key


def presign(signer: S3Client, url: str, seconds: int) -> str:
    """A link by which anyone can read `s3://bucket/key` for `seconds`, at most seven days."""
    if not 1 <= seconds <= LONGEST_LINK:
        raise InvalidOption(f"a link lasts 1 to {LONGEST_LINK} seconds, not {seconds}")
    bucket, key = split(url)
    with storing(url):
        link: str = signer.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=seconds)
    return link


def ensure_bucket(client: S3Client, bucket: str, create: bool, region: str) -> None:
    """The bucket is there afterwards: found, or made where `create` allows it.

    Raises StorageRefused where it is missing and may not be made, or belongs to someone else,
    StorageUnavailable where the server does not answer.
    """
    if _exists(client, bucket):
        return
    if not create:
        raise StorageRefused(f"there is no bucket {bucket!r}; make it, or set IMAGEMILL_S3__CREATE_BUCKET=true")
    from botocore.exceptions import ClientError

    # AWS refuses its oldest region as a location, and demands every other one.
    where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    with storing(f"bucket {bucket!r}"):
        try:
            client.create_bucket(Bucket=bucket, **where)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists", "OperationAborted"):
                raise
            client.head_bucket(Bucket=bucket)  # another worker was quicker, or it is someone else's: then this is refused


def _exists(client: S3Client, bucket: str) -> bool:
    from botocore.exceptions import ClientError

    with storing(f"bucket {bucket!r}"):
        try:
            client.head_bucket(Bucket=bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] in MISSING:
                return False
            if error.response["Error"]["Code"] not in DENIED:
                raise
            # Keys that may only write can't ask for the bucket itself; whether they may write is seen on writing.
    return True


def expire_after(client: S3Client, bucket: str, prefix: str, days: int) -> None:
    """Ask the server to delete what lies below `prefix` after `days`; its other lifecycle rules stay.

    Asked again for the same prefix, the new number of days replaces the old. Raises InvalidOption
    without a prefix, since that would empty the whole bucket.
    """
    from botocore.exceptions import ClientError

    prefix = prefix.strip("/")
    if not prefix or days < 1:
        raise InvalidOption("expiry needs a prefix in the output's address and at least one day")
    rule_id = f"imagemill-{hashlib.sha256(prefix.encode()).hexdigest()[:16]}"
    rule = {"ID": rule_id, "Status": "Enabled", "Filter": {"Prefix": f"{prefix}/"}, "Expiration": {"Days": days}}
    with storing(f"the lifecycle rules of bucket {bucket!r}"):
        kept = [other for other in _lifecycle_rules(client, bucket) if other.get("ID") != rule_id]
        try:
            client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [*kept, rule]})
        except ClientError as error:
            if error.response["Error"]["Code"] not in NO_LIFECYCLE:
                raise
            raise StorageRefused(
                f"the S3 server of bucket {bucket!r} does not offer expiry; leave --expire-days out"
            ) from error


def _lifecycle_rules(client: S3Client, bucket: str) -> list[dict[str, Any]]:
    from botocore.exceptions import ClientError

    try:
        rules: list[dict[str, Any]] = client.get_bucket_lifecycle_configuration(Bucket=bucket).get("Rules", [])
    except ClientError as error:
        if error.response["Error"]["Code"] == "NoSuchLifecycleConfiguration":
            return []
        raise
    return rules


def list_images(client: S3Client, url: str) -> Iterator[str]:
    """The `s3://` addresses of the images below `s3://bucket/prefix`, page by page, in the order of their keys.

    Raises InvalidSource where the bucket can't be listed, ServiceUnavailable where the server does not answer.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, prefix = split(url)
    try:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                if _is_image(entry["Key"]):
                    yield f"s3://{bucket}/{entry['Key']}"
    except (BotoCoreError, ClientError) as error:
        found = translate(error, url)
        raise (ServiceUnavailable if found.retryable else InvalidSource)(found.message) from error


def _is_image(key: str) -> bool:
    name = key.rpartition("/")[2]
    return "." in name and f".{name.rpartition('.')[2].lower()}" in IMAGE_EXTENSIONS


@contextmanager
def storing(what: str) -> Iterator[None]:
    """Botocore's errors inside become StorageUnavailable or StorageRefused."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        found = translate(error, what)
        raise (StorageUnavailable if found.retryable else StorageRefused)(found.message) from error


def translate(error: Exception, what: str) -> ImageError:
    """What a BotoCoreError or ClientError means for reading `what`, an address or a name that may be shown."""
    from botocore.exceptions import ClientError

    return _from_answer(error, what) if isinstance(error, ClientError) else _from_client(error, what)


def _from_answer(error: Any, what: str) -> ImageError:
    """The server answered, with an S3 error code or a bare status."""
    told = error.response.get("Error", {})
    code = str(told.get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return NotFound(f"{what}: there is no such bucket")
    if code in MISSING or status in (404, 410):
        return NotFound(f"{what} does not exist")
    if code in DENIED or status in (401, 403):
        return AccessDenied(f"{what}: the S3 server refuses access ({code or status})")
    if code in SLOW:
        return Timeout(f"{what}: the S3 server gave up waiting ({code})")
    if code == "NotImplemented" or status == 501:
        return HttpError(f"{what}: this S3 server does not offer that (NotImplemented)")
    if code in BUSY or status == 429 or status >= 500:
        return ServerError(f"{what}: the S3 server is in trouble ({code or status})")
    return HttpError(f"{what}: the S3 server answered {code or status}")


def _from_client(error: Exception, what: str) -> ImageError:
    """No answer, or the request was never sent. Botocore's own sentences name hosts and paths, no keys or signatures."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ConnectTimeoutError | boto.ReadTimeoutError):
        return Timeout(f"{what}: the S3 server did not answer in time")
    network = boto.ConnectionError | boto.HTTPClientError
    if isinstance(error, network | boto.IncompleteReadError | boto.ChecksumError | boto.FlexibleChecksumError):
        return Unreachable(f"{what}: no connection to the S3 server, or it broke off ({type(error).__name__})")
    keys = boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError | boto.ProfileNotFound
    tokens = boto.NoAuthTokenError | boto.TokenRetrievalError | boto.SSOError | boto.LoginError | boto.MetadataRetrievalError
    if isinstance(error, keys | tokens):
        return AccessDenied(f"{what}: no usable S3 keys; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, boto.ParamValidationError):
        return UnsupportedUrl(f"{what} is no name that S3 accepts")
    return HttpError(f"{what}: {sentence(error)}")
