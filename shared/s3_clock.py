"""Signs requests to S3 with the server's time if this host's clock is wrong: S3 refuses requests that are 15 minutes off.

AWS's other SDKs do the same; botocore leaves it to the host. Without it, a host with a wrong clock would hold its images until
they fail, although any other host could store them.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from botocore import auth, compat

log = logging.getLogger(__name__)

MOST_APART = timedelta(minutes=5)
"""Differences up to this need no correction; servers tolerate 15 minutes."""
FURTHEST = timedelta(days=36_525)
"""A date further off than this doesn't come from a clock."""
TOO_FAR_APART = ("RequestTimeTooSkewed", "403")
"""The codes of such a refusal: replies to HEAD have only their status."""


class _Shifted:
    """What both kinds of signatures, those in headers and those in links, add to this host's time."""

    skew = timedelta()

    def _modify_request_before_signing(self, request: Any) -> None:
        if _Shifted.skew:
            made = datetime.strptime(request.context["timestamp"], auth.SIGV4_TIMESTAMP).replace(tzinfo=UTC)
            request.context["timestamp"] = (made + _Shifted.skew).strftime(auth.SIGV4_TIMESTAMP)
        super()._modify_request_before_signing(request)  # type: ignore[misc]


class _Signer(_Shifted, auth.S3SigV4Auth):  # type: ignore[misc]
    pass


class _LinkSigner(_Shifted, auth.S3SigV4QueryAuth):  # type: ignore[misc]
    pass


def follow_server(client: Any) -> None:
    """Have this client sign with the server's time once the server has refused a request because its clock differs."""
    auth.AUTH_TYPE_MAPS |= {"s3v4": _Signer, "s3v4-query": _LinkSigner}
    client.meta.events.register("needs-retry.s3", _look_at_clock)


def _look_at_clock(response: Any = None, **_: Any) -> int | None:
    """0 (try again at once) if the server refused a request because we signed it with the wrong time."""
    code = response[1].get("Error", {}).get("Code") if response else None
    if response is None or code not in TOO_FAR_APART or "date" not in response[0].headers:
        return None
    try:
        skew = parsedate_to_datetime(response[0].headers["date"]) - compat.get_current_datetime().replace(tzinfo=UTC)
    except (ValueError, OverflowError, TypeError):  # not a date, beyond the calendar, or without a time zone
        return None
    if abs(skew - _Shifted.skew) < MOST_APART or abs(skew) > FURTHEST:
        return None
    _Shifted.skew = skew
    seconds = round(skew.total_seconds())
    log.warning(
        "the S3 server's clock differs; requests are signed with its time", extra={"action": "clock", "seconds": seconds}
    )
    return 0
