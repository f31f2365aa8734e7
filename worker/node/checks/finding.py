"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """The result of one check, and how to fix the problem if there is one."""

    check: str
    state: State
    found: str
    fix: str = ""
