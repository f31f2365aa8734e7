"""Durations, sizes and counts as people write them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: int) -> str:
    """Bytes as `512 B`, `48 kB`, `3.1 MB`."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1000:.0f} kB" if count < 1_000_000 else f"{count / 1_000_000:.1f} MB"


def counted(number: int, word: str) -> str:
    """`1 image`, `5 images`."""
    return f"{number:,} {word}" + ("" if number == 1 else "s")
