"""Why jobs wait, and when they will begin and end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from imagemill.producer.explaining import explained
from imagemill.shared.forecast import Turn
from imagemill.shared.messages import JobStatus
from tests.unit.producer.jobs import LANE, status

BEHIND = Turn(3, 40.4, 140.4)


def explain(
    turn: Turn | None = None,
    *,
    speed: float = 10,
    lanes: tuple[str, ...] = (LANE,),
    faults: Mapping[str, str] = {},
    **facts: Any,
) -> JobStatus:
    job = status(0, state="queued").model_copy(update={"waiting": 100, **facts})
    return explained(job, {job.job: turn} if turn else {}, speed, lanes, faults)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"turn": BEHIND}, "behind 40 images of other jobs"),
        ({"turn": BEHIND, "priority": "low"}, "low priority, behind 40 images of other jobs"),
        ({"turn": Turn(0, 0, 100)}, "next in line"),
        ({"turn": BEHIND, "lanes": ()}, f"no node offers {LANE}"),
        ({"turn": BEHIND, "lanes": (), "faults": {LANE: ": out of service"}}, f"no node offers {LANE}: out of service"),
        ({"turn": BEHIND, "state": "running", "running": 8}, None),
        ({"state": "paused", "why": "paused"}, "paused"),
        ({"lanes": (), "why": "starts at 2026-11-29 08:00"}, "starts at 2026-11-29 08:00"),
        ({"lanes": (), "state": "done", "waiting": 0}, None),
    ],
)
def test_reason_is_the_first_that_applies(facts: dict[str, Any], why: str | None) -> None:
    assert explain(**facts).why == why


def test_forecast_divides_the_images_before_a_job_by_the_speed() -> None:
    now, job = time.time(), explain(BEHIND, running=5)
    assert (job.position, job.ahead) == (3, 40)
    assert job.starts == pytest.approx(now + 4.04, abs=1)
    assert job.ends == pytest.approx(now + 14.54, abs=1)
    assert explain(BEHIND, starts=5.0).starts == 5.0, "it has begun"


@pytest.mark.parametrize("facts", [{"turn": BEHIND, "speed": 0}, {"turn": BEHIND, "lanes": ()}, {"state": "paused"}])
def test_without_speed_nodes_or_turn_there_is_no_forecast(facts: dict[str, Any]) -> None:
    job = explain(**facts)
    assert (job.starts, job.ends) == (None, None)


def test_job_that_may_not_begin_yet_starts_then() -> None:
    job = explain(not_before=7.0)
    assert (job.position, job.starts, job.ends) == (None, 7.0, None)


def test_job_whose_last_images_run_ends_after_them() -> None:
    job = explain(waiting=0, running=20, state="running", starts=1.0)
    assert job.ends == pytest.approx(time.time() + 2, abs=1)
