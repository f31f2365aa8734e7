"""Times on the command line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from imagemill.producer.times import brief, check_times, parse_time, written
from imagemill.shared.errors import InvalidOption
from imagemill.shared.messages import Policy

HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("text", "later"), [("90s", HOUR / 40), ("30m", HOUR / 2), ("1.5h", 1.5 * HOUR), ("1d", 24 * HOUR), (" 2h ", 2 * HOUR)]
)
def test_duration_counts_from_now(text: str, later: timedelta) -> None:
    found = parse_time("--until", text)
    assert found is not None
    assert abs(found - datetime.now(UTC) - later) < timedelta(seconds=5)


def test_date_without_a_zone_is_local() -> None:
    assert parse_time("--until", "2026-11-29T08:00") == datetime(2026, 11, 29, 8).astimezone()
    assert parse_time("--until", "2026-11-29 08:00+05:00") == datetime(2026, 11, 29, 3, tzinfo=UTC)
    assert parse_time("--until", None) is None


@pytest.mark.parametrize("text", ["", "soon", "-1h", "5", "5w", "2026-13-01", "9" * 30 + "d"])
def test_anything_else_is_refused_with_the_flag(text: str) -> None:
    with pytest.raises(InvalidOption, match="--until takes a time"):
        parse_time("--until", text)


def test_deadline_must_leave_time_to_work() -> None:
    now = datetime.now(UTC)
    check_times(Policy())
    check_times(Policy(not_before=now - HOUR))
    check_times(Policy(not_before=now + HOUR, until=now + 2 * HOUR))
    with pytest.raises(InvalidOption, match="must be in the future"):
        check_times(Policy(until=now - HOUR))
    with pytest.raises(InvalidOption, match="must be later than the start"):
        check_times(Policy(not_before=now + HOUR, until=now + HOUR))


def test_today_s_times_are_written_without_the_date() -> None:
    now = datetime.now(UTC).timestamp()
    assert written(now).endswith(f" {brief(now)}")
    assert brief(0) == written(0)
