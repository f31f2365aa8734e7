"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

START_REDIS = "start Redis, or set IMAGEMILL_REDIS_URL to its address"
WAIT_SECONDS = 6.0
"""Longer than the interval between a node's reports: a node that became busy meanwhile has said so."""

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """The result of one check, and how to fix the problem if there is one."""

    check: str
    state: State
    found: str
    fix: str = ""
