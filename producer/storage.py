"""What the command line asks of S3: expiry of results, and links for the report."""

from __future__ import annotations

from collections.abc import Callable

from imagemill.shared.errors import ConfigurationError, ImageError, InvalidOption, ServiceUnavailable
from imagemill.shared.s3 import LONGEST_LINK, ensure_bucket, expire_after, make_client, make_signer, presign, split
from imagemill.shared.settings import S3Settings


def expire(settings: S3Settings, url: str, days: int) -> None:
    """Have S3 delete what lies below `s3://bucket/prefix` after `days`.

    Raises InvalidOption for an output that isn't in S3 or has no prefix, ServiceUnavailable where S3 does
    not answer, ConfigurationError where it refuses.
    """
    if not url.startswith("s3://"):
        raise InvalidOption("--expire-days needs an --output of s3://bucket/prefix")
    bucket, prefix = split(url)
    if not prefix:
        raise InvalidOption("--expire-days needs a prefix: in s3://bucket alone, everything would expire")
    client = make_client(settings)
    try:
        ensure_bucket(client, bucket, settings.create_bucket, settings.region)
        expire_after(client, bucket, prefix, days)
    except ImageError as error:
        raise (ServiceUnavailable if error.retryable else ConfigurationError)(error.message) from error


def picture_links(settings: S3Settings, complain: Callable[[str], None]) -> Callable[[str], str | None]:
    """What maps an address to one that a browser can load: S3's become links for seven days, others stay.

    Where no link can be made it gives None and says why once, through `complain`.
    """
    signer = None
    complained = False

    def link(url: str) -> str | None:
        nonlocal signer, complained
        if not url.startswith("s3://"):
            return url
        try:
            signer = signer or make_signer(settings)
            return presign(signer, url, LONGEST_LINK)
        except (ImageError, ConfigurationError) as error:
            if not complained:
                complain(f"the report lacks pictures: {error.message}")
            complained = True
            return None

    return link
