from __future__ import annotations

from pathlib import Path

import pytest

from imagemill.worker.hardware.cpu import has_vnni


@pytest.mark.parametrize(
    ("flags", "expected"), [("sse avx512_vnni", True), ("avx_vnni", True), ("sse avx2", False), (None, False)]
)
def test_has_vnni_reads_the_flags_of_the_cpu(tmp_path: Path, flags: str | None, expected: bool) -> None:
    if flags:
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    assert has_vnni(tmp_path / "cpuinfo") is expected
