"""Job ids."""

from __future__ import annotations

import re

from imagemill.producer.submission import new_job_id


def test_job_ids_are_unique_and_start_with_the_date() -> None:
    ids = {new_job_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"\d{6}-[0-9a-f]{8}", job) for job in ids)
