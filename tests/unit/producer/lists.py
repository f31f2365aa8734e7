"""Lists to be read, and their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imagemill.producer.sources import BadRow, SourceRow, read_sources

A, B = "https://example.com/a.jpg", "https://example.com/b.jpg"


def no_s3() -> Any:
    raise AssertionError("S3 is not used here")


def read(*sources: str | Path) -> list[SourceRow | BadRow]:
    return list(read_sources([str(source) for source in sources], s3=no_s3))


def only(rows: list[SourceRow | BadRow]) -> Any:
    assert len(rows) == 1, rows
    return rows[0]
