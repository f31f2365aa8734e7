"""What this host's CPU can do."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU adds 8-bit products without saturating; otherwise weights must have 7 bits."""
    try:
        return any(name in cpuinfo.read_text() for name in ("avx512_vnni", "avx_vnni"))
    except OSError:
        return False
