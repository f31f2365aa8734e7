"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """The result of one check, and how to fix the problem if there is one."""

    check: str
    state: Literal["ok", "warning", "failed"]
    found: str
    fix: str = ""
