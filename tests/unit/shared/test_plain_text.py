"""Untrusted text, for terminals, logs and spreadsheets."""

from __future__ import annotations

import pytest

from imagemill.shared.plain_text import cell, harmless, shortened

STEERING = [*"\x1b\x07\r\n\t\0\x7f\x9b", *"\u202e\u2066\u200b\u2028\u2029\ud800"]


@pytest.mark.parametrize("character", STEERING)
def test_control_sequences_for_a_terminal_are_replaced(character: str) -> None:
    assert harmless(f"a{character}b") == cell(f"a{character}b") == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize("text", ["", "Größe 画.png", "[bold]x[/bold]", "👩 a  b", "https://x/?a=b#c"])
def test_other_text_stays(text: str) -> None:
    assert harmless(text) == cell(text) == text


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "＝1"])
def test_spreadsheets_compute_no_cell(text: str) -> None:
    assert cell(text) == f"'{text}"


def test_long_text_loses_its_middle() -> None:
    assert [shortened("abcdefghij", most) for most in (10, 7, 4)] == ["abcdefghij", "abc…hij", "ab…j"]
