"""S3 through boto3: clients, presigned links, buckets, listings, and botocore's errors translated.

boto3 takes half a second to import, so functions import it when they need it.
"""

from __future__ import annotations

import hashlib
import os
import re
import ssl
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from urllib.parse import urlsplit

from imagemill.shared import errors
from imagemill.shared.settings import S3Settings
from imagemill.shared.urls import shown_server

S3Client = Any
"""A boto3 S3 client, whose class boto3 creates at run time. Thread-safe, but don't share it across a fork."""

LONGEST_LINK = 7 * 24 * 3600
"""Seconds; the maximum of signature version 4."""

MISSING = frozenset({"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "NotFound", "404"})
# S3 sends some of these codes with status 400, or in the body of a 200.
DENIED = frozenset(
    {"AccessDenied", "AllAccessDisabled", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
)
BUSY = frozenset({"SlowDown", "BadDigest", "InternalError", "ServiceUnavailable", "OperationAborted"})
"""BadDigest: the bytes were damaged in transit, so a retry helps."""
SKEWED = "RequestTimeTooSkewed"
"""The clock of this host, or of the server, is wrong: sent with status 403, but no key would help."""
WHY_NO_TLS = re.compile(r"certificate verify failed: [\w -]+|hostname '[\w.:-]+' doesn't match '[\w.*:-]+'")
"""What to tell of botocore's message, which contains the signed URL."""
# MalformedXML: the server mistakes the rules for a different request, as Swift does.
NO_LIFECYCLE = frozenset({"NotImplemented", "MethodNotAllowed", "MalformedXML"})


def make_signer(settings: S3Settings) -> S3Client:
    """A client for `presign` only: its links use the public URL."""
    return make_client(settings.model_copy(update={"endpoint_url": settings.public_url or settings.endpoint_url}))


def make_client(settings: S3Settings, *, patient: bool = True) -> S3Client:
    """A client with its own session; create one per process, after the fork.

    One that is not `patient` gives up after the first attempt, within seconds.
    Raises ConfigurationError for an endpoint, region, profile or AWS_CA_BUNDLE that boto3 can't use.
    """
    _check_ca_bundle()
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    from imagemill.shared.s3_clock import follow_server

    config = Config(
        connect_timeout=5,
        read_timeout=30 if patient else 5,
        retries={"total_max_attempts": 4 if patient else 1, "mode": "standard"},
        max_pool_connections=settings.connections,
        # By default boto3 signs links for old regions with version 2, which newer servers reject.
        signature_version="s3v4",
        # Older MinIO does not know the checksums that boto3 adds by default; we send Content-MD5.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # MinIO and similar servers have no DNS name per bucket.
        s3={"addressing_style": "path" if settings.endpoint_url else "auto"},
    )
    if settings.endpoint_url is not None:
        _check_endpoint(settings.endpoint_url)
    try:
        client = boto3.Session().client("s3", endpoint_url=settings.endpoint_url, region_name=settings.region, config=config)
    except (BotoCoreError, ValueError) as error:  # ValueError: the endpoint is not a URL
        raise errors.ConfigurationError(f"S3 at {settings.endpoint_url or 'AWS'}: {errors.sentence(error)}") from error
    follow_server(client)
    return client


def _check_ca_bundle() -> None:
    """Boto3 would say so only after several attempts to connect, as if the server were down."""
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(bundle)
        except OSError as error:
            reason = "not a PEM file with certificates" if isinstance(error, ssl.SSLError) else error.strerror
            raise errors.ConfigurationError(f"AWS_CA_BUNDLE={bundle}: {reason}") from error


def split(url: str) -> tuple[str, str]:
    """(bucket, key) of `s3://bucket/key`. A key may contain ? and # and is not percent-encoded."""
    scheme, mark, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme.lower() != "s3" or not mark or not bucket:
        raise errors.UnsupportedUrl(f"{url!r} is not of the form s3://bucket/key")
    return bucket, key


def presign(signer: S3Client, url: str, seconds: int) -> str:
    """A link with which anyone can read `s3://bucket/key` for `seconds`, at most seven days."""
    if not 1 <= seconds <= LONGEST_LINK:
        raise errors.InvalidOption(f"a link can last 1 to {LONGEST_LINK} seconds, not {seconds}")
    bucket, key = split(url)
    with storing(url):
        link: str = signer.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=seconds)
    return link


def ensure_bucket(client: S3Client, bucket: str, create: bool, region: str) -> None:
    """Check that a bucket exists; create it if it doesn't and `create` is set.

    Raises StorageRefused if it is missing and `create` is not set, or if it belongs to someone else;
    StorageUnavailable if the server does not respond.
    """
    if _exists(client, bucket):
        return
    if not create:
        raise errors.StorageRefused(f"there is no bucket {bucket!r}; create it, or set IMAGEMILL_S3__CREATE_BUCKET=true")
    from botocore.exceptions import ClientError

    # AWS rejects its oldest region as a location constraint and requires one for every other region.
    where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    with storing(f"bucket {bucket!r}"):
        try:
            client.create_bucket(Bucket=bucket, **where)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists", "OperationAborted"):
                raise
            client.head_bucket(Bucket=bucket)  # raises unless it was another worker that created it


def _check_endpoint(url: str) -> None:
    """Boto3 accepts nearly anything, and quotes all of it in errors much later."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in url
        _ = parts.port  # raises ValueError unless it is a number
    except ValueError:
        fits = False
    if not fits:
        raise errors.ConfigurationError(
            f"S3 at {shown_server(url)}: expected a URL such as https://HOST:PORT, without keys: "
            "those belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def _exists(client: S3Client, bucket: str) -> bool:
    from botocore.exceptions import ClientError

    with storing(f"bucket {bucket!r}"):
        try:
            client.head_bucket(Bucket=bucket)
        except ClientError as error:
            meaning = translate(error, bucket)
            if isinstance(meaning, errors.NotFound):
                return False
            if not isinstance(meaning, errors.AccessDenied):
                raise
            # Write-only keys may not query the bucket; the first upload shows whether they may write.
    return True


def expire_after(client: S3Client, bucket: str, prefix: str, days: int) -> None:
    """Add a lifecycle rule that deletes objects below `prefix` after `days`; the bucket's other rules stay.

    A second call for the same prefix replaces the number of days. Raises InvalidOption
    without a prefix, since the rule would empty the whole bucket.
    """
    from botocore.exceptions import ClientError

    prefix = prefix.strip("/")
    if not prefix or days < 1:
        raise errors.InvalidOption("expiry needs a prefix in the output URL and at least one day")
    rule_id = f"imagemill-{hashlib.sha256(prefix.encode()).hexdigest()[:16]}"
    rule = {"ID": rule_id, "Status": "Enabled", "Filter": {"Prefix": f"{prefix}/"}, "Expiration": {"Days": days}}
    with storing(f"the lifecycle rules of bucket {bucket!r}"):
        try:
            rules = client.get_bucket_lifecycle_configuration(Bucket=bucket).get("Rules", [])
        except ClientError as error:
            if error.response["Error"]["Code"] != "NoSuchLifecycleConfiguration":
                raise
            rules = []
        rules = [other for other in rules if other.get("ID") != rule_id] + [rule]
        try:
            client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": rules})
        except ClientError as error:
            if error.response["Error"]["Code"] not in NO_LIFECYCLE:
                raise
            raise errors.StorageRefused(
                f"the S3 server of bucket {bucket!r} does not offer expiry; omit --expire-days"
            ) from error


def list_objects(client: S3Client, url: str) -> Iterator[tuple[str, str, int]]:
    """Bucket, key and size in bytes of the objects below `s3://bucket/prefix`, page by page, in key order.

    Raises InvalidSource if the bucket can't be listed, ServiceUnavailable if the server does not respond.
    """
    bucket, prefix = split(url)
    with _translated(url, errors.ServiceUnavailable, errors.InvalidSource):
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                yield bucket, entry["Key"], entry.get("Size", 0)


def read_head(client: S3Client, bucket: str, key: str, size: int) -> bytes:
    """The first `size` bytes of an object. Raises like `list_objects`."""
    with _translated(f"s3://{bucket}/{key}", errors.ServiceUnavailable, errors.InvalidSource):
        body = client.get_object(Bucket=bucket, Key=key, Range=f"bytes=0-{size - 1}")["Body"]
        return bytes(body.read(size))


def storing(what: str) -> AbstractContextManager[None]:
    """Turns botocore's errors into StorageUnavailable or StorageRefused."""
    return _translated(what, errors.StorageUnavailable, errors.StorageRefused)


@contextmanager
def _translated(what: str, unavailable: type[errors.ImagemillError], refused: type[errors.ImagemillError]) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        meaning = translate(error, what)
        raise (unavailable if meaning.retryable else refused)(meaning.message) from error


def translate(error: Exception, what: str) -> errors.ImageError:
    """The ImageError for a BotoCoreError or ClientError about `what`, a URL or name without secrets."""
    from botocore.exceptions import ClientError

    if not isinstance(error, ClientError):
        return _from_client(error, what)
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return errors.NotFound(f"{what}: there is no such bucket")
    if code in MISSING or status in (404, 410):
        return errors.NotFound(f"{what} does not exist")
    if code == SKEWED:
        return errors.ServerError(f"{what}: this host's clock and the S3 server's differ too much ({code})")
    if code in DENIED or status in (401, 403):
        return errors.AccessDenied(f"{what}: the S3 server refuses access ({code or status})")
    if code == "RequestTimeout" or status == 408:
        return errors.Timeout(f"{what}: the S3 server timed out ({code or status})")
    if code == "NotImplemented" or status == 501:
        return errors.HttpError(f"{what}: this S3 server does not support the request (NotImplemented)")
    if code in BUSY or status == 429 or status >= 500:
        return errors.ServerError(f"{what}: the S3 server failed or is busy ({code or status})")
    return errors.HttpError(f"{what}: the S3 server responded {code or status}")


def _from_client(error: Exception, what: str) -> errors.ImageError:
    """No answer, or no request was sent. Botocore's own messages contain hosts and paths, but no keys or signatures."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ConnectTimeoutError | boto.ReadTimeoutError):
        return errors.Timeout(f"{what}: the S3 server did not respond in time")
    if isinstance(error, boto.SSLError):
        reason = WHY_NO_TLS.search(str(error))
        why = f" ({reason[0].strip()})" if reason else ""
        return errors.Unreachable(f"{what}: no TLS connection to the S3 server; AWS_CA_BUNDLE can name your own CA{why}")
    network = boto.ConnectionError | boto.HTTPClientError
    if isinstance(error, network | boto.IncompleteReadError | boto.ChecksumError | boto.FlexibleChecksumError):
        return errors.Unreachable(f"{what}: no connection to the S3 server, or it was lost ({type(error).__name__})")
    keys = boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError | boto.ProfileNotFound
    tokens = boto.NoAuthTokenError | boto.TokenRetrievalError | boto.SSOError | boto.LoginError | boto.MetadataRetrievalError
    if isinstance(error, keys | tokens):
        return errors.AccessDenied(f"{what}: no usable S3 keys; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, boto.ParamValidationError):
        return errors.UnsupportedUrl(f"{what} is not a name that S3 accepts")
    return errors.HttpError(f"{what}: {errors.sentence(error)}")
