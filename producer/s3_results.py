"""Results in S3: their expiry, and links to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from imagemill.shared.errors import ConfigurationError, ImageError, InvalidOption, ServiceUnavailable
from imagemill.shared.s3 import LONGEST_LINK, ensure_bucket, expire_after, make_client, make_signer, presign, split
from imagemill.shared.settings import S3Settings


def expire(settings: S3Settings, url: str, days: int) -> None:
    """Have S3 delete everything under `s3://bucket/prefix` after `days`.

    Raises InvalidOption if the output is not in S3 or has no prefix, ServiceUnavailable if S3 does not
    respond, ConfigurationError if it refuses.
    """
    if not url.startswith("s3://"):
        raise InvalidOption("--expire-days needs an --output of s3://bucket/prefix")
    bucket, prefix = split(url)
    if not prefix:
        raise InvalidOption("--expire-days needs a prefix: with s3://bucket alone, the whole bucket would expire")
    client = make_client(settings)
    try:
        ensure_bucket(client, bucket, settings.create_bucket, settings.region)
        expire_after(client, bucket, prefix, days)
    except ImageError as error:
        raise (ServiceUnavailable if error.retryable else ConfigurationError)(error.message) from error


def picture_links(settings: S3Settings, failures: list[str]) -> Callable[[str], str | None]:
    """A function from an image's URL to one that a browser can load.

    S3 URLs become links that are valid for seven days; others stay. If a link can't be made, the function
    returns None and adds the reason to `failures`.
    """
    signer = cache(lambda: make_signer(settings))

    def link(url: str) -> str | None:
        if not url.startswith("s3://"):
            return url
        try:
            return presign(signer(), url, LONGEST_LINK)
        except (ImageError, ConfigurationError) as error:
            failures.append(error.message)
            return None

    return link
