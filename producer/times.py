"""Times on the command line: dates, and durations from now."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta

from imagemill.shared.errors import InvalidOption
from imagemill.shared.messages import Policy

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_time(flag: str, text: str | None) -> datetime | None:
    """A time given as ISO 8601 (in the local time zone, unless it has its own) or as a duration from now: `90s`, `2h`."""
    if text is None:
        return None
    try:
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip()):
            return datetime.now(UTC) + timedelta(**{UNITS[match[2]]: float(match[1])})
        return datetime.fromisoformat(text.strip()).astimezone()
    except (ValueError, OverflowError):
        raise InvalidOption(
            f"{flag} takes a time such as 2026-11-29T08:00, or a duration from now such as 90s, 30m, 2h or 1d, not {text!r}"
        ) from None


def check_times(policy: Policy) -> None:
    """Raise InvalidOption for a deadline that leaves no time to work."""
    if policy.until is None:
        return
    deadline = policy.until.timestamp()
    if deadline <= time.time():
        raise InvalidOption(f"the deadline (until) must be in the future, but {written(deadline)} has passed")
    if policy.not_before is not None and deadline <= policy.not_before.timestamp():
        begin = written(policy.not_before.timestamp())
        raise InvalidOption(f"the deadline (until), {written(deadline)}, must be later than the start (not before), {begin}")


def written(seconds: float) -> str:
    """Epoch seconds as `2026-11-29 08:00`, in the local time zone."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def brief(seconds: float) -> str:
    """The same, without the date if it is today's: `08:00`."""
    return written(seconds).removeprefix(time.strftime("%Y-%m-%d "))
